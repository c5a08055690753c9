"""What a ledger's file says of all its rows, and what a pass over them says of a student."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdistil.errors import RunError, UserError
from bdistil.storage.files import write_atomically


@dataclass(frozen=True)
class LedgerHead:
    """What is known of all rows: N samples, L outputs, their units, and the largest value in these."""

    samples: int
    outputs: int
    scale: float | tuple[float, ...]
    offset: tuple[float, ...] | None
    largest: float
    teacher: str

    @classmethod
    def read(cls, path: Path) -> LedgerHead:
        """Reads what `write` wrote.

        Raises:
            RunError: the file is torn.
        """
        try:
            head: Any = json.loads(path.read_text()).items()
            values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in head}
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path} is missing or torn ({error}). Nothing was deleted. "
                f"Remove {path.parent} to have the teacher asked again."
            ) from error

    def write(self, path: Path) -> None:
        """Writes the file atomically."""
        write_atomically(path, json.dumps(asdict(self), indent=1))

    def refuse_others(self, folder: Path, samples: int, teacher: str) -> None:
        """Refuses the ledger of another dataset or teacher.

        Args:
            folder: of the ledger.
            samples: N of the dataset.
            teacher: fingerprint; empty where it is not known.

        Raises:
            UserError: one is another than at the start of the run.
        """
        part = "validation" if folder.name == "val" else "training"
        if self.samples != samples:
            raise UserError(
                f"The {part} dataset has {samples} samples, but the run in {folder.parent} was started with "
                f"{self.samples}. Give the dataset it was started with, or choose another `run_dir`."
            )
        if teacher and self.teacher and teacher != self.teacher:
            raise UserError(
                f"The teacher's weights differ from those that the run in {folder.parent} was started with. "
                "Give that teacher, or choose another `run_dir`."
            )


@dataclass(frozen=True)
class RoundEvidence:
    """What one pass of a student over all samples says of it.

    Attributes:
        margin_share: share of the L outputs whose margin is at least -tolerance * b.
        margin_min: smallest margin.
        rms_before: rms error to the teacher of the prefix without the student; of round 0, of a constant answer.
        rms_after: the same with the student.
        sup_after: largest error to the teacher of the prefix with the student.
    """

    margin_share: float
    margin_min: float
    rms_before: float
    rms_after: float
    sup_after: float
