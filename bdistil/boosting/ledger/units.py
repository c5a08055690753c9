"""How the numbers of a ledger and the answers of a teacher translate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bdistil.functional.distillation import centre


@dataclass(frozen=True)
class Units:
    """Units of a ledger in those of the teacher.

    Attributes:
        scale: one for all outputs (classes), or one an output (regression).
        offset: one an output. None of classes, whose logits are centred per sample, as softmax does not see their mean.
    """

    scale: float | tuple[float, ...] = 1.0
    offset: tuple[float, ...] | None = None

    def inward(self, answers: Tensor) -> Tensor:
        """Numbers of the ledger (..., L) for answers of the teacher (..., L)."""
        if self.offset is None:
            return centre(answers) / self._scale(answers)
        return (answers - answers.new_tensor(self.offset)) / self._scale(answers)

    def outward(self, numbers: Tensor) -> Tensor:
        """Answers in the teacher's units (..., L) for numbers of the ledger (..., L)."""
        answers = numbers * self._scale(numbers)
        return answers if self.offset is None else answers + numbers.new_tensor(self.offset)

    def _scale(self, like: Tensor) -> float | Tensor:
        return like.new_tensor(self.scale) if isinstance(self.scale, tuple) else self.scale
