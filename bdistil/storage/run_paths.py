"""Where the files of a run are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


class RunPlaces:
    """Names of files and folders of a run. None of them need be there.

    Args:
        root: the folder of the run.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    @property
    def config(self) -> Path:
        """The resolved configuration, as it ran."""
        return self.root / "config.yaml"

    @property
    def teacher(self) -> Path:
        """Weights of a teacher that the recipe trained."""
        return self.root / "teacher.safetensors"

    @property
    def scratch(self) -> Path | None:
        """A disk of the node, where BDISTIL_SCRATCH names one: its ledgers are there."""
        named = os.environ.get("BDISTIL_SCRATCH")
        return Path(named) if named else None

    @property
    def ledger(self) -> Path:
        """Folder of the ledger's files."""
        if self.scratch is None:
            return self.root / "ledger"
        place = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:8]
        return self.scratch / f"bdistil-{self.root.name}-{place}" / "ledger"

    @property
    def emulation(self) -> Path:
        """Folder of MEKD, where the training set of the rounds is generated."""
        return self.root / "mekd"

    @property
    def curve(self) -> Path:
        """One row a prefix, the teacher first."""
        return self.root / "curve.csv"

    @property
    def picture(self) -> Path:
        """Accuracy against cost."""
        return self.root / "curve.png"

    @property
    def report(self) -> Path:
        """The run at a glance, one self-contained file."""
        return self.root / "report.html"

    def folder(self, number: int) -> Path:
        """Folder of a committed round."""
        return self.root / "rounds" / f"{number:03d}"

    def work(self, number: int) -> Path:
        """Folder of the round under way; safe to delete: costs that round."""
        return self.root / "work" / f"{number:03d}"

    def checkpoint(self, number: int) -> Path:
        """Lightning's checkpoint of the round under way."""
        return self.work(number) / "last.ckpt"

    @property
    def teacher_checkpoint(self) -> Path:
        """Lightning's checkpoint of a teacher under training."""
        return self.root / "work" / "teacher" / "last.ckpt"
