"""Cache of the activations that later students read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from bdistil.boosting.ledger.rows import LARGEST_HALF, Array, RowFile, Storage, allocate, is_complete, publish
from bdistil.models.stages import FEATURES
from bdistil.utils import distributed

Shapes = Mapping[int, tuple[int, ...]]


class FeatureCache:
    """Activations (N, ...) of recent students by sample index, on disk: features in float32, others in float16.

    The cache saves running the bodies of earlier students in training: a step costs the same in round 2 and in round
    20. Activations of a student have the keys of `bdistil.models.stages`.

    Args:
        folder: folder of the files.
        samples: N.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self._open: dict[tuple[int, int], tuple[RowFile, tuple[int, ...]]] = {}
        self._next: dict[int, RowFile] = {}  # files being written

    def _file(self, number: int, key: int) -> Path:
        name = f"features.{number:03d}.f32" if key == FEATURES else f"features.{number:03d}.{key + 1}.f16"
        return self.folder / name

    def begin(self, shapes: Shapes) -> None:
        """Creates the files of a student, given the shape of each activation of one sample, by key."""
        self._next = {
            key: allocate(self.folder / f"features.next{key + 1}.tmp", (self.samples, prod(shape)), _storage(key))
            for key, shape in shapes.items()
        }

    def write(self, low: int, activations: Mapping[int, Tensor]) -> None:
        """Writes activations (rows, ...) from row `low` on; skips those for which no file was created."""
        for key, file in self._next.items():
            rows = activations[key].flatten(1)
            file.write(low, rows if key == FEATURES else rows.clamp(-LARGEST_HALF, LARGEST_HALF))

    def publish(self, number: int) -> None:
        """Publishes the written files as those of student `number`."""
        written, self._next = self._next, {}
        for key, file in written.items():
            publish(file.path, self._file(number, key))

    def has(self, number: int, shapes: Shapes) -> bool:
        """Whether a student's activations are complete on disk."""
        return all(
            is_complete(self._file(number, key), (self.samples, prod(shape)), _storage(key))
            for key, shape in shapes.items()
        )

    def use(self, shapes: Mapping[int, Shapes]) -> None:
        """Opens activations of students, given as {number: shapes}; removes others, which can be computed again."""
        wanted = {(number, key): shape for number, by_key in shapes.items() for key, shape in by_key.items()}
        self._open = {
            (number, key): (RowFile(self._file(number, key), (self.samples, prod(shape)), _storage(key)), shape)
            for (number, key), shape in wanted.items()
        }
        distributed.barrier()
        if distributed.rank() == 0:
            for path in set(self.folder.glob("features.*")) - {self._file(*place) for place in wanted}:
                path.unlink(missing_ok=True)

    def holds(self, places: Sequence[tuple[int, int]]) -> bool:
        """Whether all the given activations, identified by (number, key), are open."""
        return all(place in self._open for place in places)

    def rows(self, places: Sequence[tuple[int, int]], index: Array) -> list[Tensor]:
        """Activations (B, ...) of samples, identified by (number, key) and in this order, on the CPU."""
        opened = [self._open[place] for place in places]
        return [file.gather(index).view(len(index), *shape) for file, shape in opened]


def _storage(key: int) -> Storage:
    return "float32" if key == FEATURES else "float16"
