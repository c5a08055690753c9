"""Units and metadata of a ledger, and the evidence by which a new student is accepted or rejected."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bdistil.errors import RunError, UserError
from bdistil.functional.distillation import centre
from bdistil.storage.files import write_atomically


@dataclass(frozen=True)
class Units:
    """Units of a ledger, expressed in the teacher's units.

    Attributes:
        scale: one value for all outputs, or one per output in a regression.
        offset: one value per output. None in classification, where logits are centred per sample, as softmax does not
            depend on their mean.
    """

    scale: float | tuple[float, ...] = 1.0
    offset: tuple[float, ...] | None = None

    def inward(self, answers: Tensor) -> Tensor:
        """Converts answers of the teacher (..., L) to units of the ledger."""
        if self.offset is None:
            return centre(answers) / self._scale(answers)
        return (answers - answers.new_tensor(self.offset)) / self._scale(answers)

    def outward(self, numbers: Tensor) -> Tensor:
        """Converts numbers of the ledger (..., L) to the teacher's units."""
        answers = numbers * self._scale(numbers)
        return answers if self.offset is None else answers + numbers.new_tensor(self.offset)

    def _scale(self, like: Tensor) -> float | Tensor:
        return like.new_tensor(self.scale) if isinstance(self.scale, tuple) else self.scale


@dataclass(frozen=True)
class LedgerHead:
    """Contents of `ledger.json`.

    Attributes:
        samples: N.
        outputs: L.
        scale: scale of `Units`.
        offset: offset of `Units`.
        largest: max|g|, in units of the ledger.
        teacher: fingerprint of the teacher's weights; empty if unknown.
    """

    samples: int
    outputs: int
    scale: float | tuple[float, ...]
    offset: tuple[float, ...] | None
    largest: float
    teacher: str

    @classmethod
    def read(cls, path: Path) -> LedgerHead:
        """Reads the file that `write` wrote.

        Raises:
            RunError: the file is missing or torn.
        """
        try:
            head: Any = json.loads(path.read_text()).items()
            values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in head}
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path} is missing or torn ({error}). Nothing was deleted. "
                f"Remove {path.parent}: the teacher's logits are then computed again."
            ) from error

    def write(self, path: Path) -> None:
        """Writes the file atomically."""
        write_atomically(path, json.dumps(asdict(self), indent=1))

    def refuse_others(self, folder: Path, samples: int, teacher: str) -> None:
        """Rejects the ledger of another dataset or teacher.

        Args:
            folder: folder of the ledger.
            samples: N of the dataset.
            teacher: fingerprint; empty if unknown.

        Raises:
            UserError: N or the teacher differs from the start of the run.
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
    """Evaluation of a new student over all samples, by which it is accepted or rejected.

    Attributes:
        margin_share: share of the L outputs whose margin is at least -tolerance * b.
        margin_min: smallest margin.
        rms_before: rms error to the teacher of the prefix without the student; in round 0, of a constant prediction.
        rms_after: rms error to the teacher of the prefix with the student.
        sup_after: largest error to the teacher of the prefix with the student.
    """

    margin_share: float
    margin_min: float
    rms_before: float
    rms_after: float
    sup_after: float
