"""Cache of the features that later students are linked to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bdistil.boosting.ledger.rows import Array, RowFile, allocate, is_complete, publish
from bdistil.utils import distributed


class FeatureCache:
    """Features (N, D) of recent students by sample index, on disk.

    With them no body of an earlier student runs in training: a step costs the same in round 2 and in round 20.

    Args:
        folder: of the files.
        samples: N.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self._open: dict[int, RowFile] = {}
        self._next: RowFile | None = None  # while it is written

    def _file(self, number: int) -> Path:
        return self.folder / f"features.{number:03d}.f32"

    def begin(self, width: int) -> None:
        """Creates the file of a student with features of that width."""
        self._next = allocate(self.folder / "features.next.tmp", (self.samples, width))

    def write(self, low: int, features: Tensor) -> None:
        """Writes features (rows, D) from row `low` on."""
        assert self._next is not None, "begin() creates the file"
        self._next.write(low, features)

    def publish(self, number: int) -> None:
        """Makes the file that was written that of student `number`."""
        assert self._next is not None, "begin() creates the file"
        path, self._next = self._next.path, None
        publish(path, self._file(number))

    def has(self, number: int, width: int) -> bool:
        """Whether a student's features are complete on disk."""
        return is_complete(self._file(number), (self.samples, width))

    def use(self, widths: dict[int, int]) -> None:
        """Opens the features of students, given as {number: width}; removes others, which can be computed again."""
        self._open = {number: RowFile(self._file(number), (self.samples, width)) for number, width in widths.items()}
        distributed.barrier()
        if distributed.rank() == 0:
            for path in set(self.folder.glob("features.*")) - {self._file(number) for number in widths}:
                path.unlink(missing_ok=True)

    def rows(self, numbers: Sequence[int], index: Array) -> list[Tensor]:
        """Features (B, D) of some students, in the order of `numbers`, on the CPU."""
        return [self._open[number].gather(index) for number in numbers]
