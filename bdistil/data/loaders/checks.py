"""Checks of a user's data loader: one loader, a map-style dataset of (x, y), random augmentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from bdistil.data.loaders.batches import PairCollate, pairs_of
from bdistil.data.loaders.fingerprints import spread
from bdistil.data.loaders.order import EpochLoader, KeptShare
from bdistil.errors import UserError
from bdistil.utils.trees import fields_of, joined_rows, row_count, take_rows

TRIES = 16  # samples that are read twice, to see whether x is random


def single_loader(loader: Any) -> Any:
    """Unwraps a list of one loader, as some data modules return it, unless its entry is a batch."""
    one = isinstance(loader, list | tuple) and len(loader) == 1
    return loader[0] if one and not isinstance(loader[0], list | tuple | Mapping | Tensor) else loader


def first_samples(loader: Any, count: int, labels: str | None = "labels") -> Any:
    """x (n, ...) of the first n <= `count` samples of a loader, or of a list of one, in the structure of x.

    `labels` is the key of the labels in batches that are mappings; None where a batch is x alone.
    """
    batches: list[Any] = []
    for x, _ in pairs_of(single_loader(loader), labels):
        batches.append(x)
        if sum(map(row_count, batches)) >= count:
            break
    return take_rows(joined_rows(batches), slice(count))


def is_indexed(dataset: Any) -> bool:
    """Whether a dataset is map-style with a length, not a stream."""
    return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def check_dataset(loader: Any, name: str) -> int:
    """Checks the loader that a user's method `name` returned; returns its number of samples.

    Raises:
        UserError: not one DataLoader; an iterable or empty dataset; batches that are not (x, y).
    """
    loader = single_loader(loader)
    if not isinstance(loader, DataLoader):
        raise UserError(f"Expected `{name}()` to return one torch DataLoader, got {type(loader).__name__}.")
    if loader.batch_sampler is None:
        raise UserError(
            f"Expected the loader of `{name}()` to make batches, got batch_size=None. Give it a batch_size."
        )
    if type(loader).__iter__ not in (DataLoader.__iter__, EpochLoader.__iter__):
        raise UserError(
            f"Expected the loader of `{name}()` to iterate as a torch DataLoader does, got {type(loader).__name__} "
            "with an `__iter__` of its own, which could change batches after they are read. Change samples in the "
            "dataset or the collate function, and keep workers between epochs by persistent_workers=True."
        )
    dataset: Any = loader.dataset
    if not is_indexed(dataset):
        raise UserError(
            f"Expected the dataset of `{name}()` to be map-style (with __len__ and __getitem__), got the iterable "
            f"{type(dataset).__name__}. The ledger addresses samples by index: read the data into a map-style dataset."
        )
    if len(dataset) == 0:
        raise UserError(f"Expected the dataset of `{name}()` to hold samples, got an empty {type(dataset).__name__}.")
    if isinstance(loader, EpochLoader):  # its batches have the index already
        return len(dataset)
    collate = loader.collate_fn
    collate = collate if isinstance(collate, PairCollate) else PairCollate(collate, name=name)
    collate([dataset[0]])
    return len(dataset)


def is_random(dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None = None) -> bool:
    """Whether two reads of a sample differ in x (random augmentation), tried on samples all over the dataset.

    With a collate function, whether batches of one sample differ.
    """

    def read(number: int) -> Any:
        item = dataset[number]
        return _x_of(item if collate is None else collate([item]))

    return not all(same_x(read(number), read(number)) for number in spread(len(cast(Sized, dataset)), TRIES))


def _x_of(item: Any) -> Any:
    """An item without its label, if it is a pair."""
    return item[0] if isinstance(item, tuple | list) and len(item) == 2 else item


def same_x(first: Any, second: Any) -> bool:
    """Whether two x hold equal numbers; NaN equals NaN."""
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same_x(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(same_x, first, second))
    if isinstance(first, Tensor):
        same = first.shape == second.shape and first.dtype == second.dtype
        return same and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if isinstance(first, np.ndarray):
        return bool(np.array_equal(first, second, equal_nan=first.dtype.kind in "fc"))
    if hasattr(first, "__array_interface__"):  # an image of PIL
        return same_x(np.asarray(first), np.asarray(second))
    if (fields := fields_of(first)) is not None:
        return same_x(fields, fields_of(second))
    return True  # equality is not defined for other types


def distinct_samples(loader: Any, read: int) -> int:
    """Number of distinct samples read in an epoch.

    A `DistributedSampler` repeats samples so that all processes get equally many. Repeats come last in a process, so
    they occur only if a whole epoch was read. `read` counts the samples read by all processes.
    """
    sampler = getattr(loader, "sampler", None)
    users = isinstance(sampler, KeptShare)  # which may draw samples repeatedly
    if users or not isinstance(sampler, DistributedSampler) or loader.batch_size is None:  # whole batches are repeated
        return read
    return min(read, len(cast(Sized, sampler.dataset)))
