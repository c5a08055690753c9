"""Loaders that yield (x, y, index): a user's data loader with the number of each sample added.

Dataset, batch size, workers and collate function are those of the user's loader; the order of training samples is a
pure function of (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from bdistil.data.loaders.batches import PairCollate, paired
from bdistil.data.loaders.checks import single_loader
from bdistil.data.loaders.views import ViewPlan, Views, ViewSampler
from bdistil.errors import UserError
from bdistil.metrics.quality import UNLABELLED
from bdistil.utils.seeding import seed_of

LOADERS = ("train_dataloader", "val_dataloader")
Index = np.ndarray[Any, np.dtype[np.int64]]


class IndexedDataset(Dataset[Any]):
    """A map-style dataset that yields each item with its number.

    A dataset of tensors yields a whole batch at once; `collate` takes both forms, with that of the user's loader.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.dataset, self._collate = dataset, collate if isinstance(collate, PairCollate) else PairCollate(collate)
        plain = type(dataset) is TensorDataset and self._collate.collate is default_collate
        self._tensors = cast(TensorDataset, dataset).tensors if plain else None

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], index

    def __getitems__(self, indices: Sequence[int]) -> Any:
        if self._tensors is None:
            indices = list(indices)
            read = getattr(self.dataset, "__getitems__", None)
            items = read(indices) if read else [self.dataset[index] for index in indices]
            return list(zip(items, indices, strict=True))
        rows = np.asarray(indices)
        return (*self._collate.split([tensor[torch.from_numpy(rows)] for tensor in self._tensors]), rows)

    def collate(self, batch: Any) -> Any:
        """(x, y, index) of a batch; index is (B,) int64 in NumPy, which no Trainer moves to a device."""
        if isinstance(batch, tuple):
            return batch
        items, indices = zip(*batch, strict=True)
        return (*self._collate(list(items)), np.asarray(indices))


def _settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """Options of the user's loader that do not depend on the order of its samples."""
    names = ["num_workers", "pin_memory", "timeout", "worker_init_fn"]
    if loader.num_workers > 0:
        names += ["prefetch_factor", "multiprocessing_context", "persistent_workers"]
    return {name: getattr(loader, name) for name in names}


def _order(loader: DataLoader[Any]) -> dict[str, Any]:
    """Options that keep the batches of the user's loader as they are."""
    if type(loader.batch_sampler) is not BatchSampler:
        return {"batch_sampler": loader.batch_sampler}
    return {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}


def _reads_all(loader: DataLoader[Any]) -> bool:
    """Whether each sample is read once an epoch, shuffled or in order, by a sampler of torch's own."""
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler


def _indexed(loader: DataLoader[Any], plan: ViewPlan | None) -> tuple[IndexedDataset, dict[str, Any]]:
    """The dataset with the index, or of its views, and options of its loader that do not depend on the order."""
    indexed = IndexedDataset(Views(loader.dataset, plan.seed) if plan else loader.dataset, loader.collate_fn)
    return indexed, {"collate_fn": indexed.collate, **_settings(loader)}


class _EpochLoader(DataLoader[Any]):
    """Seeds its workers by the order of the epoch, so that a resumed epoch draws what it would have drawn."""

    def __iter__(self) -> Any:
        sampler = cast(DistributedSampler[Any], self.sampler)
        self.generator.manual_seed(seed_of(sampler.seed, sampler.epoch, sampler.rank, "workers"))
        return super().__iter__()


def training_loader(
    loader: DataLoader[Any],
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    plan: ViewPlan | None = None,
) -> DataLoader[Any]:
    """The user's training loader with the index, in an order that depends on (seed, epoch) alone.

    A loader that shuffles, or reads in order, gets a sampler that also splits the samples over the processes; any
    other sampler of the user is kept.

    `epoch` is the one that starts now: Lightning sets the following ones, but the first one too late for workers. With
    a plan, each epoch reads one of the fixed views of a dataset that augments at random; the index is then number +
    N * view.
    """
    indexed, options = _indexed(loader, plan)
    if not _reads_all(loader):
        return DataLoader(indexed, **_order(loader), **options)
    shuffle = isinstance(loader.sampler, RandomSampler)
    order = {"num_replicas": world_size, "rank": rank, "shuffle": shuffle, "seed": seed}
    sampler = ViewSampler(plan.count if plan else 1, indexed, **order)
    sampler.set_epoch(epoch)
    options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return _EpochLoader(indexed, sampler=sampler, generator=torch.Generator(), **options)


def rows_loader(
    loader: DataLoader[Any], batches: Sequence[Sequence[int]], *, seed: int = 0, views: Views | None = None
) -> DataLoader[Any]:
    """Reads given rows of the loader's dataset, or of views of it, each group as one batch (x, y, index).

    A dataset that has the index already is read as it is.
    """
    dataset = views or loader.dataset
    indexed = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset, loader.collate_fn)
    options: dict[str, Any] = {"collate_fn": indexed.collate, **_settings(loader), "batch_sampler": batches}
    options.pop("persistent_workers", None)
    return DataLoader(indexed, generator=torch.Generator().manual_seed(seed), **options)


def with_dataset(loader: DataLoader[Any], dataset: Dataset[Any]) -> DataLoader[Any]:
    """The user's loader over another dataset of as many samples, in the order that it had."""
    order = _order(loader)
    if _reads_all(loader):  # torch's samplers hold the dataset
        order |= {"sampler": None, "shuffle": isinstance(loader.sampler, RandomSampler)}
    return DataLoader(dataset, collate_fn=loader.collate_fn, generator=loader.generator, **order, **_settings(loader))


class _Share(DistributedSampler[Any]):
    """The samples of one process in order, each of them in one process only.

    Lightning leaves a `DistributedSampler` in place; its own would repeat samples to give every process as many.
    """

    def __init__(self, dataset: IndexedDataset, world_size: int, rank: int) -> None:
        super().__init__(dataset, world_size, rank, shuffle=False)
        self.num_samples = len(range(rank, len(dataset), world_size))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(cast(Sized, self.dataset)), self.num_replicas))


def sequential_loader(
    loader: DataLoader[Any], *, rank: int = 0, world_size: int = 1, plan: ViewPlan | None = None
) -> DataLoader[Any]:
    """The user's loader with the index, in the order of the dataset; of several processes, each reads its share.

    With a plan, the canonical views of a dataset that augments at random are read.

    Raises:
        UserError: fewer samples than processes.
    """
    indexed, options = _indexed(loader, plan)
    if len(indexed) < world_size:  # a process without a batch would not take part in the sums at the end
        raise UserError(f"Expected a validation sample for each of {world_size} processes, got {len(indexed)}.")
    return DataLoader(indexed, batch_size=loader.batch_size or 1, sampler=_Share(indexed, world_size, rank), **options)


@contextmanager
def indexed_loaders(
    datamodule: pl.LightningDataModule,
    seed: int,
    train: ViewPlan | None = None,
    val: ViewPlan | None = None,
    names: Sequence[str] = LOADERS,
    labels: str | None = "labels",
    ignore_index: int = UNLABELLED,
) -> Iterator[None]:
    """Context in which the loaders that the named methods of a user's data module return yield (x, y, index).

    `seed` is that of the order of training samples; `train` and `val` are the views of parts that augment at random;
    `labels` and `ignore_index` are those of `PairCollate`.
    """
    before = {name: vars(datamodule)[name] for name in names if name in vars(datamodule)}
    for name in names:
        plan = train if name == LOADERS[0] else val
        pairs = partial(paired, labels=labels, ignore_index=ignore_index, name=name)
        vars(datamodule)[name] = partial(
            _indexed_loader, name, getattr(datamodule, name), datamodule, seed, plan, pairs
        )
    try:
        yield
    finally:
        for name in names:
            vars(datamodule).pop(name, None)
        vars(datamodule).update(before)


def _indexed_loader(
    name: str,
    original: Callable[[], Any],
    datamodule: pl.LightningDataModule,
    seed: int,
    plan: ViewPlan | None,
    pairs: Callable[[Any], Any],
) -> DataLoader[Any]:
    """The loader that a method of a data module returns, with the index."""
    loader, trainer = pairs(single_loader(original())), cast(Any, datamodule.trainer)
    ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    if name != LOADERS[0]:
        return sequential_loader(loader, plan=plan, **ranks)
    epoch = trainer.fit_loop.epoch_progress.current.processed  # current_epoch is one behind in a resumed fit
    return training_loader(loader, seed=seed, epoch=epoch, plan=plan, **ranks)
