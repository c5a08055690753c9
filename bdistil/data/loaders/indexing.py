"""The index that travels with each sample, added to anybody's data loader.

A user's training loader yields (x, y). What a round trains on yields (x, y, index): the same dataset, batch size,
workers and collate function, in an order that is a pure function of (seed, round, epoch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

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

from bdistil.data.loaders.views import ViewPlan, Views, ViewSampler
from bdistil.errors import UserError
from bdistil.utils.seeding import seed_of


class IndexedDataset(Dataset[Any]):
    """A map-style dataset whose items know their number.

    A whole batch is fetched at once where the dataset is tensors; `collate` knows both forms.

    Args:
        dataset: yields (x, y).
        collate: the collate function of the user's loader.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.dataset, self._collate = dataset, collate
        self._tensors = dataset.tensors if type(dataset) is TensorDataset and collate is default_collate else None

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], index

    def __getitems__(self, indices: list[int]) -> Any:
        if self._tensors is None:
            read = getattr(self.dataset, "__getitems__", None)
            items = read(indices) if read else [self.dataset[index] for index in indices]
            return list(zip(items, indices, strict=True))
        rows = np.asarray(indices)
        return (*(tensor[torch.from_numpy(rows)] for tensor in self._tensors), rows)

    def collate(self, batch: Any) -> Any:
        """(x, y, index) of a batch; index is (B,) int64 in NumPy, which no Trainer moves to a device."""
        if isinstance(batch, tuple):
            return batch
        items, indices = zip(*batch, strict=True)
        return (*self._collate(list(items)), np.asarray(indices))


def _settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """What is taken over from the user's loader, whatever order its samples come in."""
    kept: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
    }
    if loader.num_workers > 0:
        kept |= {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "persistent_workers": loader.persistent_workers,
        }
    return kept


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
    """The user's training loader, with the index and an order of its own for (seed, epoch).

    A loader that shuffles, or reads in order, gets a sampler that also splits the samples over the processes; any
    other sampler of the user is kept as it is.

    Args:
        loader: yields (x, y).
        seed: of this round.
        epoch: the epoch that starts now. Lightning sets the following ones, but the first one too late for workers.
        rank: number of this process.
        world_size: how many processes train.
        plan: fixed views of a dataset that augments at random, one an epoch; the index is then number + N * view.
    """
    dataset = Views(loader.dataset, plan.seed) if plan else loader.dataset
    indexed = IndexedDataset(dataset, loader.collate_fn)
    options: dict[str, Any] = {"collate_fn": indexed.collate, **_settings(loader)}
    plain = type(loader.batch_sampler) is BatchSampler
    if not plain or not _reads_all(loader):
        if plain:
            options |= {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
        else:
            options |= {"batch_sampler": loader.batch_sampler}
        return DataLoader(indexed, **options)
    shuffle = isinstance(loader.sampler, RandomSampler)
    order = {"num_replicas": world_size, "rank": rank, "shuffle": shuffle, "seed": seed}
    sampler = ViewSampler(plan.count if plan else 1, indexed, **order)
    sampler.set_epoch(epoch)
    return _EpochLoader(
        indexed,
        batch_size=loader.batch_size,
        sampler=sampler,
        drop_last=loader.drop_last,
        generator=torch.Generator(),
        **options,
    )


def _reads_all(loader: DataLoader[Any]) -> bool:
    """Does the loader read each sample once an epoch, shuffled or in order, by a sampler of torch's own?"""
    sampler = loader.sampler
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler


class _Groups:
    """Batches of given rows."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def block_loader(
    loader: DataLoader[Any], blocks: list[tuple[int, int]], *, seed: int = 0, views: Views | None = None
) -> DataLoader[Any]:
    """Reads given blocks of the loader's dataset, or of views of it, in order, each as one batch (x, y, index)."""
    return rows_loader(loader, [range(low, high) for low, high in blocks], seed=seed, views=views)


def rows_loader(
    loader: DataLoader[Any], batches: Sequence[Sequence[int]], *, seed: int = 0, views: Views | None = None
) -> DataLoader[Any]:
    """Reads given rows of the loader's dataset, or of views of it, each group as one batch (x, y, index).

    A dataset that has the index already is read as it is.
    """
    dataset = views or loader.dataset
    indexed = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset, loader.collate_fn)
    settings = {k: v for k, v in _settings(loader).items() if k != "persistent_workers"}
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        indexed, batch_sampler=_Groups(batches), collate_fn=indexed.collate, generator=generator, **settings
    )


def with_dataset(loader: DataLoader[Any], dataset: Dataset[Any]) -> DataLoader[Any]:
    """The user's loader over another dataset of as many samples, in the order that it had."""
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "generator": loader.generator, **_settings(loader)}
    if type(loader.batch_sampler) is not BatchSampler:
        return DataLoader(dataset, batch_sampler=loader.batch_sampler, **options)
    options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if _reads_all(loader):
        return DataLoader(dataset, shuffle=isinstance(loader.sampler, RandomSampler), **options)
    return DataLoader(dataset, sampler=loader.sampler, **options)


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

    Of a dataset that augments at random, the canonical views are read where a plan is given.
    """
    dataset = Views(loader.dataset, plan.seed) if plan else loader.dataset
    indexed = IndexedDataset(dataset, loader.collate_fn)
    if len(indexed) < world_size:  # a process without a batch would not take part in the sums at the end
        raise UserError(f"Expected a validation sample for each of {world_size} processes, got {len(indexed)}.")
    options: dict[str, Any] = {"collate_fn": indexed.collate, **_settings(loader)}
    return DataLoader(indexed, batch_size=loader.batch_size or 1, sampler=_Share(indexed, world_size, rank), **options)


Index = np.ndarray[Any, np.dtype[np.int64]]
