"""Sketches of all samples at the time the teacher was evaluated, stored with its logits."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from bdistil.boosting.ledger.rows import Array, RowFile, allocate, is_complete, publish


class SampleSketches:
    """Sketches of x and y, (N, 2) by sample index, on disk.

    Args:
        folder: folder of the file.
        samples: N.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.shape = folder, (samples, 2)
        self._open: RowFile | None = None
        self._next: RowFile | None = None  # file being written

    @property
    def _file(self) -> Path:
        return self.folder / "samples.f32"

    def begin(self) -> None:
        """Creates the file."""
        self._open, self._next = None, allocate(self.folder / "samples.next.tmp", self.shape)

    def write(self, low: int, sketches: Tensor) -> None:
        """Writes sketches (B, 2) from sample `low` on."""
        assert self._next is not None, "begin() creates the file"
        self._next.write(low, sketches)

    def publish(self) -> None:
        """Publishes the written file."""
        assert self._next is not None, "begin() creates the file"
        path, self._next = self._next.path, None
        publish(path, self._file)

    def exists(self) -> bool:
        """Whether the file is complete."""
        return is_complete(self._file, self.shape)

    def rows(self, index: Array) -> Tensor:
        """Sketches (B, 2) of samples (B,)."""
        if self._open is None:
            self._open = RowFile(self._file, self.shape)
        return self._open.gather(index)
