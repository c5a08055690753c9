"""Fixed views of randomly augmented samples: the random numbers of a view depend on sample and view alone.

Values cached for a view therefore match the x of a batch in any process, epoch and round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import Dataset, DistributedSampler

from bdistil.utils.seeding import seed_cpu, seed_of

# The view on which S is defined, and the view of the validation part.
CANONICAL = 0


@dataclass(frozen=True)
class ViewPlan:
    """Seed of the run, and the number K of views of each randomly augmented sample, the same in all rounds."""

    seed: int
    count: int = 1


class Views(Dataset[Any]):
    """Views of a dataset that draws its augmentation from the global generators of Python, NumPy or torch.

    Number i + N * v is sample i of N in the view `first` + v.
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
        seed_cpu(seed_of(self.seed, "view", index, self.first + view))
        return self.dataset[index]


class ViewSampler(DistributedSampler[Any]):
    """The order of an epoch, as numbers of one of K views: epoch e reads view e mod K."""

    def __init__(self, views: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.views = views

    def __iter__(self) -> Iterator[int]:
        shift = len(cast(Any, self.dataset)) * (self.epoch % self.views)
        return (number + shift for number in super().__iter__())
