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
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    default_collate,
)

from bdistil.data.loaders.batches import PairCollate, paired
from bdistil.data.loaders.checks import single_loader
from bdistil.data.loaders.order import (
    EpochLoader,
    KeptShare,
    SharedOrder,
    batch_options,
    check_length,
    is_shared,
    largest_batch,
    only_given,
    own_batches,
    reads_all,
    sampler_of,
    worker_options,
)
from bdistil.data.loaders.views import ViewPlan, Views, ViewSampler
from bdistil.errors import UserError
from bdistil.metrics.quality import UNLABELLED

LOADERS = ("train_dataloader", "val_dataloader")
Index = np.ndarray[Any, np.dtype[np.int64]]


class IndexedDataset(Dataset[Any]):
    """A map-style dataset that yields each item with its number.

    A dataset of tensors yields a whole batch at once; `collate` accepts both, using the user's collate function.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.dataset, self._collate = dataset, collate if isinstance(collate, PairCollate) else PairCollate(collate)
        plain = type(dataset) is TensorDataset and self._collate.collate is default_collate
        self._tensors = cast(TensorDataset, dataset).tensors if plain else None

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int | list[int]) -> Any:
        return self.__getitems__(index) if isinstance(index, list) else (self.dataset[index], index)

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


def _indexed(loader: DataLoader[Any], plan: ViewPlan | None) -> tuple[IndexedDataset, dict[str, Any]]:
    """The dataset with the index, or of its views, and options of its loader that do not depend on the order."""
    indexed = IndexedDataset(Views(loader.dataset, plan.seed) if plan else loader.dataset, loader.collate_fn)
    return indexed, {"collate_fn": indexed.collate, **worker_options(loader)}


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

    A loader that shuffles or reads in order gets a sampler that also splits the samples over the processes. The output
    of any other sampler or batch sampler of the user is split over the processes; with one process it is kept.

    `epoch` is the one about to start: Lightning sets later ones, but the first one too late for workers. With a plan,
    each epoch reads one of the fixed views of a randomly augmented dataset; the index is then number + N * view.

    Raises:
        UserError: several processes, and a user-defined sampler without a length.
    """
    indexed, options = _indexed(loader, plan)
    ranks, views = {"num_replicas": world_size, "rank": rank, "seed": seed}, plan.count if plan else 1
    batches, given = own_batches(loader), sampler_of(loader)
    if reads_all(loader):
        sampler: Any = ViewSampler(views, indexed, shuffle=isinstance(given, RandomSampler), **ranks)
    elif world_size == views == 1:
        sampler = given
    elif is_shared(given):
        sampler = KeptShare(indexed, given, views=views, **ranks)
    else:
        check_length(given, "several processes can share what `train_dataloader()` gives")
        sampler = SharedOrder(given, samples=len(indexed), views=views, **ranks)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    if batches is None:
        options |= {"sampler": sampler, **batch_options(loader)}
    elif sampler is batches:
        options |= {"batch_sampler": batches}
    else:  # a batch in place of a sample
        options |= {"sampler": sampler, "batch_size": None}
    generator = torch.Generator() if isinstance(sampler, DistributedSampler) else None
    made = EpochLoader(indexed, generator=generator, **options)
    made.seed, made.epoch = seed, epoch
    return made


def rows_loader(
    loader: DataLoader[Any], batches: Sequence[Sequence[int]], *, seed: int = 0, views: Views | None = None
) -> DataLoader[Any]:
    """Reads given rows of the loader's dataset, or of views of it, each group as one batch (x, y, index).

    A dataset that has the index already is read as it is.
    """
    dataset = views or loader.dataset
    indexed = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset, loader.collate_fn)
    options: dict[str, Any] = {"collate_fn": indexed.collate, **worker_options(loader), "batch_sampler": batches}
    options.pop("persistent_workers", None)
    return DataLoader(indexed, generator=torch.Generator().manual_seed(seed), **options)


def with_dataset(loader: DataLoader[Any], dataset: Dataset[Any]) -> DataLoader[Any]:
    """The user's loader over another dataset of the same length, in the same order."""
    options, batches = {"generator": loader.generator, **worker_options(loader)}, own_batches(loader)
    if batches is not None:
        return DataLoader(dataset, collate_fn=loader.collate_fn, batch_sampler=batches, **options)
    sampler = sampler_of(loader)
    if reads_all(loader):  # torch's samplers hold the dataset
        shuffled = isinstance(sampler, RandomSampler)
        sampler = RandomSampler(cast(Sized, dataset), generator=sampler.generator) if shuffled else None
    options |= {"sampler": sampler, **batch_options(loader)}
    return DataLoader(dataset, collate_fn=loader.collate_fn, **options)


class _Share(DistributedSampler[Any]):
    """The samples of one process in order, each of them in one process only.

    Lightning leaves a `DistributedSampler` in place; its own would repeat samples to even out the processes.
    """

    def __init__(self, dataset: IndexedDataset, world_size: int, rank: int) -> None:
        super().__init__(dataset, world_size, rank, shuffle=False)
        self.num_samples = len(range(rank, len(dataset), world_size))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(cast(Sized, self.dataset)), self.num_replicas))


def sequential_loader(
    loader: DataLoader[Any], *, rank: int = 0, world_size: int = 1, plan: ViewPlan | None = None
) -> DataLoader[Any]:
    """The user's loader with the index, in the order of the dataset; each process reads its share.

    A user-defined sampler selects the samples, see `only_given`. With a plan, the canonical views of a randomly
    augmented dataset are read.

    Raises:
        UserError: fewer samples than processes, or a sampler that yields different samples on each pass.
    """
    loader = only_given(loader, LOADERS[1])
    indexed, options = _indexed(loader, plan)
    if len(indexed) < world_size:  # a process without a batch would not take part in the sums at the end
        raise UserError(f"Expected a validation sample for each of {world_size} processes, got {len(indexed)}.")
    return DataLoader(indexed, batch_size=largest_batch(loader), sampler=_Share(indexed, world_size, rank), **options)


@contextmanager
def indexed_loaders(
    datamodule: pl.LightningDataModule,
    seed: int,
    train: ViewPlan | None = None,
    val: ViewPlan | None = None,
    names: Sequence[str] = LOADERS,
    labels: str | None = "labels",
    ignore_index: int = UNLABELLED,
    prepare: Callable[[str, Any], Any] = lambda name, loader: loader,
) -> Iterator[None]:
    """Context in which the named loader methods of a user's data module return loaders of (x, y, index) during a fit.

    `seed` sets the order of training samples; `train` and `val` are the views of randomly augmented parts; `labels` and
    `ignore_index` are those of `PairCollate`. `prepare` receives the name of a method and its loader with batches
    (x, y), and returns the loader to index.
    """
    before = {name: vars(datamodule)[name] for name in names if name in vars(datamodule)}
    for name in names:
        plan = train if name == LOADERS[0] else val
        pairs = partial(paired, labels=labels, ignore_index=ignore_index, name=name)
        vars(datamodule)[name] = partial(
            _indexed_loader, name, getattr(datamodule, name), datamodule, seed, plan, pairs, prepare
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
    prepare: Callable[[str, Any], Any],
) -> Any:
    """The loader that a method of a data module returns: with the index during a fit, otherwise unchanged."""
    given, trainer = original(), cast(Any, datamodule.trainer)
    if trainer is None or trainer.state.status != TrainerStatus.RUNNING:
        return given
    loader = prepare(name, pairs(single_loader(given)))
    ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    if name != LOADERS[0]:
        return sequential_loader(loader, plan=plan, **ranks)
    epoch = trainer.fit_loop.epoch_progress.current.processed  # current_epoch is one behind in a resumed fit
    return training_loader(loader, seed=seed, epoch=epoch, plan=plan, **ranks)
