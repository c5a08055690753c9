"""Labels that are known without reading the samples, and the shapes of samples."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from bdistil.boosting.labels import check_samples, declared_labels
from bdistil.data.loaders import paired
from bdistil.errors import UserError

N = 40
X, Y = torch.randn(N, 3), torch.arange(N) % 4


class Declared(Dataset):
    """Counts how often a sample is read; labels are declared, truly or not."""

    def __init__(self, given=Y, **declared):
        self.given, self.read = given, 0
        vars(self).update(declared)

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.read += 1
        return X[index], int(self.given[index])


def loader(dataset, **options):
    return paired(DataLoader(dataset, **{"batch_size": 8, **options}))


def look(dataset, **options):
    return check_samples(loader(dataset, **options), "train_dataloader", "classification", 4)


@pytest.mark.parametrize(
    "declared",
    [{"targets": Y.tolist()}, {"labels": Y}, {"targets": Y.numpy().astype(np.uint8)}],
    ids=["list", "tensor", "array"],
)
def test_declared_labels_save_reading_the_samples(declared):
    data = Declared(**declared)
    assert look(data).shape == (3,)
    assert data.read < N / 2
    half = Subset(data, range(1, N, 2))
    assert declared_labels(loader(half)).tolist() == Y[1::2].tolist()


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (Declared(targets=(Y + 1).tolist()), {}),  # a transform of the target, for example
        (Declared(targets=Y[:-1].tolist()), {}),
        (Declared(labels=[f"class {y}" for y in Y.tolist()]), {}),
        (Declared(targets=[f"{row}.xml" for row in range(N)]), {}),
        (Declared(), {}),
        (Declared(targets=Y.tolist()), {"collate_fn": lambda items: default_collate(items)}),
        (Declared(targets=Y.tolist()), {"batch_size": 1}),
    ],
    ids=["others", "too few", "names", "files", "none", "collate function", "one by one"],
)
def test_other_samples_are_read(data, options):
    assert declared_labels(loader(data, **options)) is None
    data.read = 0
    look(data, **options)
    assert data.read >= N


def test_a_wrong_label_of_a_sample_that_no_probe_reads_is_found():
    wrong = Y.clone()
    wrong[23] = 9
    for data in (Declared(wrong, targets=wrong.tolist()), Declared(wrong), TensorDataset(X, wrong)):
        with pytest.raises(UserError, match="got 9 for sample 23 of `train_dataloader"):
            look(data)
    with pytest.raises(UserError, match="got 9 for sample 11 of"):
        look(Subset(Declared(wrong, targets=wrong.tolist()), range(1, N, 2)))


def test_workers_read_the_samples():
    assert look(Declared(), num_workers=1).shape == (3,)
