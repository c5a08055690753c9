"""Label noise of a training part that changes between fits, and labels that are no class numbers."""

import lightning as L
import pytest
import torch
from helpers.toys import CLASSES, Toys
from torch.utils.data import DataLoader, Subset, TensorDataset

from bdistil import UserError
from bdistil.data.label_noise import LabelNoise, NoisyLabels, flip_labels


class Folds(L.LightningDataModule):
    """The validation part is every fourth sample, from `fold` on."""

    fold = 0

    def train_dataloader(self):
        x, y = Toys().parts["train"]
        kept = [row for row in range(len(x)) if row % 4 != self.fold]
        return DataLoader(Subset(TensorDataset(x, y), kept), batch_size=32)


def test_another_training_part_has_labels_of_its_own():
    folds = Folds()
    noise = LabelNoise(folds, rate=0.25)
    for folds.fold in (0, 1):
        given, noisy = (torch.cat([x for x, _ in data.train_dataloader()]) for data in (folds, noise))
        assert torch.equal(given, noisy)
        assert int(noise.noisy.flipped.sum()) == 36


def test_loaders_of_an_instance_are_those_of_the_wrapper():
    """As Lightning makes them of datasets; one wrapper inside another has them, too."""
    dataset = TensorDataset(*Toys().parts["train"])
    inner = L.LightningDataModule.from_datasets(dataset, dataset, batch_size=32)
    for noise in (LabelNoise(inner, rate=0.25), LabelNoise(LabelNoise(inner, rate=0.25), rate=0.25)):
        assert len(noise.val_dataloader()) == 6
        noise.train_dataloader = "replaced for a fit"
        assert len(inner.train_dataloader()) == 6


def test_attributes_of_the_data_module_are_set_there():
    """Lightning's Tuner sets `batch_size`, and measures what the loaders then give."""
    folds = Folds()
    folds.batch_size = 4
    noise = LabelNoise(folds, rate=0.25)
    noise.batch_size, noise.own = 8, "mine"
    assert (folds.batch_size, noise.batch_size) == (8, 8)
    assert not hasattr(folds, "own")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (TensorDataset(torch.zeros(4, 2), torch.rand(4)), r"got float32 of shape \(4,\)"),
        (TensorDataset(torch.zeros(4, 2), torch.eye(4, dtype=torch.int64)), r"got int64 of shape \(4, 4\)"),
        ([(torch.zeros(2), 0.75)] * 4, r"got float32 of shape \(4,\)"),
        ([(torch.zeros(2), 1, "name")] * 4, r"Expected items \(x, y\) .* got a tuple of 3"),
        ([{"x": torch.zeros(2), "labels": 1}] * 4, r"Expected items \(x, y\) .* got a dict"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(dataset, message):
    with pytest.raises(UserError, match=message):
        NoisyLabels(dataset, 0.5)


def test_class_numbers_in_a_column_are_labels():
    labels = torch.arange(8)[:, None] % CLASSES
    noisy = NoisyLabels(TensorDataset(torch.zeros(8, 2), labels), 0.5)
    assert noisy.labels.shape == (8,)
    assert torch.equal(noisy.labels != labels[:, 0], noisy.flipped)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(UserError, match=r"Expected labels in 0 … 1 for 2 classes, got 7"):
        flip_labels(torch.tensor([0, 7]), 0.5, classes=2, seed=0)


def test_one_class_has_no_wrong_labels():
    with pytest.raises(UserError, match=r"two or more `classes`.*, got 1"):
        flip_labels(torch.zeros(4, dtype=torch.long), 0.5, classes=1, seed=0)
