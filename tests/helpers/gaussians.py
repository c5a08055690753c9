"""Twenty Gaussians, a share of wrong labels, and a teacher that was trained on them."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil.data.label_noise import NoisyLabels

CLASSES, WIDTH = 20, 10


def points(count, seed):
    """x (count, 10) around one of 20 centres, and which."""
    centres = 1.8 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return centres[y] + torch.randn(count, WIDTH, generator=generator), y


class Gaussians(L.LightningDataModule):
    """Noisy training part, clean validation and test part."""

    def __init__(self, rate=0.4, seed=0, train=2000, val=200, test=2000):
        super().__init__()
        self.train = NoisyLabels(TensorDataset(*points(train, 3 * seed)), rate, classes=CLASSES, seed=seed)
        self.val, self.test = (TensorDataset(*points(n, 3 * seed + s)) for n, s in ((val, 1), (test, 2)))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=128, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=500)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=500)


def mlp(width):
    return nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, CLASSES))


def trained_teacher(data, seed=0, epochs=20):
    """A wide network, trained on the noisy labels."""
    torch.manual_seed(seed)
    teacher, x, y = mlp(128), data.train.dataset.tensors[0], data.train.labels
    optimizer = torch.optim.AdamW(teacher.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(teacher(x[rows]), y[rows]).backward()
            optimizer.step()
    return teacher
