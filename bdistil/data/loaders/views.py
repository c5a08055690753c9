"""Fixed views of randomly augmented samples: the random numbers of a view depend on sample and view alone.

What is cached for a view therefore belongs to the x of a batch, in any process, epoch and round.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import Dataset, DistributedSampler

from bdistil.utils.seeding import seed_of

# The view on which S is defined, and the view of the validation part.
CANONICAL = 0


@dataclass(frozen=True)
class ViewPlan:
    """Number and seed of the views of a dataset that augments at random.

    Attributes:
        seed: seed of the run; the views are the same in all its rounds.
        count: K, the number of views of a sample.
    """

    seed: int
    count: int = 1


class Views(Dataset[Any]):
    """A dataset whose N samples are addressed as number + N * view.

    Args:
        dataset: draws its augmentation from the global generators of Python, NumPy or torch.
        seed: seed of the run.
        first: view of the numbers 0 … N-1.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, first: int = CANONICAL) -> None:
        self.dataset, self.seed, self.first = dataset, seed, first

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        with isolate_rng(include_cuda=False):
            return [self._drawn(number) for number in numbers]

    def _drawn(self, number: int) -> Any:
        view, index = divmod(number, len(self))
        seed = seed_of(self.seed, "view", index, self.first + view)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


class ViewSampler(DistributedSampler[Any]):
    """The order of an epoch, as numbers of one view: epoch e reads view e mod K.

    Args:
        views: K.
        args: arguments of `DistributedSampler`.
        kwargs: arguments of `DistributedSampler`.
    """

    def __init__(self, views: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.views = views

    def __iter__(self) -> Iterator[int]:
        shift = len(cast(Any, self.dataset)) * (self.epoch % self.views)
        return (number + shift for number in super().__iter__())
