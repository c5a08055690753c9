"""Views of a sample under random augmentation: what is drawn for one is a pure function of sample and view.

So whatever is cached of a view belongs to the very x that a batch brings, in any process, epoch and round.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from bdistil.utils.seeding import seed_of

# The view on which S is defined, and that of the validation part.
CANONICAL = 0


@dataclass(frozen=True)
class ViewPlan:
    """Which views of a dataset that augments at random are read.

    Attributes:
        seed: of the run: the views are the same in all its rounds.
        count: K, how many there are of a sample.
    """

    seed: int
    count: int = 1


@contextmanager
def _state_kept() -> Iterator[None]:
    """Python, NumPy and torch (CPU) draw after this context what they would have drawn without it."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


class Views(Dataset[Any]):
    """A dataset whose N samples are addressed as number + N * view.

    Args:
        dataset: draws its augmentation from the generators of Python, NumPy or torch.
        seed: of the run.
        first: the view of the numbers 0 … N-1.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, first: int = CANONICAL) -> None:
        self.dataset, self.seed, self.first = dataset, seed, first

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        with _state_kept():
            return [self._drawn(number) for number in numbers]

    def _drawn(self, number: int) -> Any:
        view, index = divmod(number, len(self))
        seed = seed_of(self.seed, "view", index, self.first + view)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


class ViewSampler(DistributedSampler[Any]):
    """The order of an epoch, as numbers of the view that the epoch is to see: epoch e sees view e mod K.

    Args:
        views: K.
        args: of torch's sampler.
        kwargs: of torch's sampler.
    """

    def __init__(self, views: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.views = views

    def __iter__(self) -> Iterator[int]:
        shift = len(cast(Any, self.dataset)) * (self.epoch % self.views)
        return (number + shift for number in super().__iter__())
