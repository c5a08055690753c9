"""Sample order of a user's loader: which samples it yields, and how they are split over processes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from bdistil.errors import RunError, UserError
from bdistil.utils import distributed
from bdistil.utils.seeding import drawn_from, seed_of

SEEDED = "generator=torch.Generator().manual_seed(0)"
BEFORE_TRAINING = "its samples can be read before training"


def worker_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """Options of the user's loader that do not depend on the order of its samples."""
    names = ["num_workers", "pin_memory", "timeout", "worker_init_fn"]
    if loader.num_workers > 0:
        names += ["prefetch_factor", "multiprocessing_context", "persistent_workers"]
    return {name: getattr(loader, name) for name in names}


def own_batches(loader: DataLoader[Any]) -> Any:
    """The user-defined batch sampler of a loader; None for torch's."""
    return None if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler


def sampler_of(loader: DataLoader[Any]) -> Any:
    """The sampler from which torch's batch sampler of a loader makes batches; or the user-defined batch sampler."""
    batches: Any = loader.batch_sampler
    return batches.sampler if type(batches) is BatchSampler else batches


def batch_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """Batch size and `drop_last` of a loader with torch's batch sampler."""
    batches = cast(BatchSampler, loader.batch_sampler)
    return {"batch_size": batches.batch_size, "drop_last": batches.drop_last}


def reads_all(loader: DataLoader[Any]) -> bool:
    """Whether one of torch's samplers reads each sample once per epoch, shuffled or in order."""
    sampler, samples = sampler_of(loader), len(cast(Sized, loader.dataset))
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source) == samples
    return type(sampler) is SequentialSampler and len(sampler.data_source) == samples


def begin_epoch(loader: Any, epoch: int) -> None:
    """Sets the epoch of a loader and its samplers."""
    if isinstance(loader, EpochLoader):
        loader.epoch = epoch
    samplers: list[Any] = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    for sampler in samplers:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def is_shared(sampler: Any) -> bool:
    """Whether a user-defined sampler already yields only this process's share."""
    return hasattr(sampler, "num_replicas") and hasattr(sampler, "rank")


def largest_batch(loader: DataLoader[Any]) -> int:
    """Number of samples in the largest batch that a loader makes."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(size, int):
        return size
    check_length(loader.batch_sampler, BEFORE_TRAINING)
    return max(map(len, _drawn(loader.batch_sampler, 0)), default=1)


class EpochLoader(DataLoader[Any]):
    """Seeds its workers and the generators of its samplers by the epoch, so that a resumed one draws as before.

    Workers that persist over epochs are an exception: torch seeds them once.

    Attributes:
        seed: seed of the order.
        epoch: the epoch that the next iterator reads, see `begin_epoch`.
    """

    seed, epoch = 0, 0

    def __iter__(self) -> Any:
        # A generator that is new after a restart would begin with the order of the first epoch.
        for place, generator in enumerate(generators_of(self)):
            generator.manual_seed(seed_of(self.seed, self.epoch, place, "order"))
        if isinstance(self.sampler, DistributedSampler):
            self.generator.manual_seed(seed_of(self.sampler.seed, self.sampler.epoch, self.sampler.rank, "workers"))
        return super().__iter__()


def generators_of(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators of a loader's samplers, also of those inside a batch sampler or a `SharedOrder`.

    None of a user-defined sampler that yields this process's share: the ranks may have seeds of their own.
    """
    found: list[torch.Generator] = []
    samplers: list[Any] = [loader.batch_sampler, loader.sampler]
    if any(is_shared(sampler) and not isinstance(sampler, SharedOrder) for sampler in samplers):
        return found
    while samplers:
        sampler = samplers.pop()
        if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
            found.append(generator)
        inner = [getattr(sampler, "sampler", None), sampler.dataset if isinstance(sampler, SharedOrder) else None]
        samplers += [one for one in inner if one is not None]
    return found


class SharedOrder(DistributedSampler[Any]):
    """Splits the samples, or whole batches, of a user-defined sampler over the processes.

    All processes draw the same order, as it depends on (seed, epoch), and each takes its share; some entries are
    repeated to make the shares equal. Lightning leaves a `DistributedSampler` in place.

    Args:
        given: the user's sampler, or batch sampler.
        samples: N, the length of its dataset.
        views: K; epoch e reads view e mod K, whose numbers start at N (e mod K).
        order: number and rank of the processes, and the seed.

    Attributes:
        drawn: checksum of the last order, the same on all processes.
    """

    def __init__(self, given: Any, *, samples: int, views: int = 1, **order: Any) -> None:
        super().__init__(given, shuffle=False, **order)
        self.samples, self.views, self.drawn = samples, views, 0

    def __iter__(self) -> Iterator[Any]:
        shift = self.samples * (self.epoch % self.views)
        order = [_shifted(entry, shift) for entry in _drawn(self.dataset, self.seed, self.epoch)]
        self.drawn = zlib.crc32(_flat(order).tobytes())
        each = -(-len(order) // self.num_replicas)
        return islice(cycle(order), self.rank, each * self.num_replicas, self.num_replicas)

    def __len__(self) -> int:
        return -(-len(cast(Sized, self.dataset)) // self.num_replicas)


class KeptShare(DistributedSampler[Any]):
    """A user-defined sampler, or batch sampler, that yields this process's share already, in the view of the epoch.

    Lightning leaves a `DistributedSampler` in place, and would split any other one over the processes.

    Args:
        dataset: its N samples.
        given: the user's sampler.
        views: K; epoch e reads view e mod K, whose numbers start at N (e mod K).
        order: number and rank of the processes, and the seed.
    """

    def __init__(self, dataset: Dataset[Any], given: Any, *, views: int = 1, **order: Any) -> None:
        super().__init__(dataset, shuffle=False, **order)
        self.given, self.views = given, views

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of both samplers."""
        super().set_epoch(epoch)
        if hasattr(self.given, "set_epoch"):
            self.given.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        shift = len(cast(Sized, self.dataset)) * (self.epoch % self.views)
        return (_shifted(entry, shift) for entry in self.given)

    def __len__(self) -> int:
        return len(self.given)


def _shifted(entry: Any, shift: int) -> Any:
    """Shifts a sample number, or a batch of them, to the numbers of a view."""
    numbers = entry.tolist() if isinstance(entry, Tensor | np.ndarray) else entry
    return [int(number) + shift for number in numbers] if isinstance(numbers, Iterable) else int(numbers) + shift


def _drawn(sampler: Any, *key: object) -> list[Any]:
    """All entries of a sampler, drawn from generators seeded by a key."""
    with drawn_from(*key, "order"):
        return list(sampler)


def check_length(sampler: Any, purpose: str) -> None:
    """Raises UserError for a user-defined sampler without a length, which may never end."""
    if not hasattr(sampler, "__len__"):
        raise UserError(
            f"Expected a sampler that has a `__len__`, so that {purpose}, got {type(sampler).__name__} without one. "
            "Define it; a sampler that never ends can only be used for training in one process."
        )


def check_drawn(loader: Any) -> None:
    """Raises RunError if the processes have drawn different orders from a user-defined sampler.

    Collective: all processes must call it.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SharedOrder):
        drawn = torch.tensor([sampler.drawn, -sampler.drawn], dtype=torch.float64)
        largest, smallest = distributed.all_max(drawn).tolist()
        if largest != -smallest:
            raise RunError(
                f"{type(sampler.dataset).__name__}, the sampler of `train_dataloader()`, has given each process "
                "another order, so that some samples of the epoch were in no step and others in several. Let it draw "
                f"from torch's global generator, or give it {SEEDED}. The committed rounds are intact."
            )


def only_given(loader: DataLoader[Any], name: str) -> DataLoader[Any]:
    """The user's loader over the samples that its sampler yields, each once, in the order of the dataset.

    Raises:
        UserError: the sampler yields no samples, or different ones on each pass.
    """
    rows = given_rows(loader, name)
    if rows is None:
        return loader
    return DataLoader(
        Subset(loader.dataset, rows),
        batch_size=largest_batch(loader),
        collate_fn=loader.collate_fn,
        **worker_options(loader),
    )


def given_rows(loader: DataLoader[Any], name: str) -> Sequence[int] | None:
    """Numbers of the samples that a loader yields, in order; None if it yields all of them.

    Raises:
        UserError: the sampler yields no samples, or different ones on each pass.
    """
    sampler = sampler_of(loader)
    if reads_all(loader) or is_shared(sampler):
        return None  # each process gets a share of all samples
    check_length(sampler, BEFORE_TRAINING)
    states = [(generator, generator.get_state()) for generator in generators_of(loader)]
    first, second = (np.unique(_flat(_drawn(sampler, number))) for number in (0, 1))
    for generator, state in states:  # the user's, which the next epoch draws from
        generator.set_state(state)
    kind = type(sampler).__name__
    if not np.array_equal(first, second):
        raise UserError(
            f"Expected the sampler of `{name}()` to give the same samples at each reading, got a {kind} that gives "
            "others. Figures are compared only on the same samples: give SubsetRandomSampler(indices), or a "
            "torch.utils.data.Subset of the dataset."
        )
    if not len(first):
        raise UserError(f"Expected the sampler of `{name}()` to give samples, got a {kind} that gives none.")
    return None if len(first) == len(cast(Sized, loader.dataset)) else [int(row) for row in first]


def _flat(entries: list[Any]) -> np.ndarray[Any, Any]:
    """Flattens sample numbers, or batches of them, into one array."""
    plain = [_shifted(entry, 0) for entry in entries]
    flat = [number for entry in plain for number in (entry if isinstance(entry, list) else [entry])]
    return np.asarray(flat, dtype=np.int64)
