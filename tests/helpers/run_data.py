"""Data modules of a user that a configuration names: `helpers.run_data.NAME`."""

import os

import lightning as L
import torch
from helpers.toys import BATCH, Toys, samples
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, random_split


class Drawn(Toys):
    """Splits in its constructor by the global generator, which `fit` seeds and later commands do not."""

    def __init__(self):
        super().__init__()
        drawn = random_split(TensorDataset(*samples(256, 14)), (128, 64, 64))
        self.drawn = dict(zip(("train", "val", "test"), drawn, strict=True))

    def train_dataloader(self):
        return DataLoader(self.drawn["train"], BATCH, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.drawn["val"], BATCH)

    def test_dataloader(self):
        return DataLoader(self.drawn["test"], BATCH)


class BySeed(Drawn):
    """Splits by the seed of the run: the same parts in every process with that seed."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(int(os.environ["PL_GLOBAL_SEED"]))
            super().__init__()


class SampledBySeed(Toys):
    """Chooses its validation samples by the seed of the run."""

    def val_dataloader(self):
        data, seed = TensorDataset(*self.parts["val"]), int(os.environ["PL_GLOBAL_SEED"])
        return DataLoader(data, BATCH, sampler=SubsetRandomSampler(range(seed, seed + 32)))


class DrawnTest(Toys):
    """Draws its test part alone by the global generator; training and validation part are always the same."""

    def __init__(self):
        super().__init__()
        self.test, _ = random_split(TensorDataset(*samples(128, 14)), (64, 64))

    def test_dataloader(self):
        return DataLoader(self.test, BATCH)


class Sampled(Toys):
    """Chooses its validation samples by a sampler."""

    def val_dataloader(self):
        data = TensorDataset(*self.parts["val"])
        return DataLoader(data, BATCH, sampler=SubsetRandomSampler(range(1, len(data), 2)))


class Asking(Toys):
    """Asks its Trainer in `setup`, has labels that are no names of classes, and training samples sorted by class."""

    def __init__(self):
        super().__init__()
        x, y = self.parts["train"]
        order = y.argsort()
        self.parts["train"] = x[order], y[order]
        self.labels = self.parts["train"][1]

    def setup(self, stage):
        assert self.trainer.world_size == 1


class Untested(L.LightningDataModule):
    """Has no test part."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(*samples(128, 14)), BATCH, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*samples(64, 15)), BATCH)


class Declared(Toys):
    """Declares the normalisation of its samples in numbers."""

    normalisation = 0.5, 0.25


class Misdeclared(Toys):
    """Declares a normalisation that is none."""

    normalisation = "imagenet"
