"""The student of the best epoch of a round, where `keep_epoch` is `best`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


class BestEpoch:
    """Weights of the epoch with the smallest error so far; part of the round's checkpoint.

    Attributes:
        error: the smallest error so far.
        epoch: epoch in which it was measured, from 0; None before the first validation.

    Example:
        >>> import torch
        >>> best, student = BestEpoch(), nn.Linear(1, 1)
        >>> _ = nn.init.constant_(student.weight, 1.0)
        >>> best.evaluate(student)  # before the validation that gives the error
        >>> best.consider(0.5, epoch=0)
        >>> _ = nn.init.constant_(student.weight, 2.0)
        >>> best.evaluate(student)
        >>> best.consider(0.7, epoch=1)
        >>> best.restore(student)
        >>> student.weight.item(), best.epoch
        (1.0, 0)
    """

    def __init__(self) -> None:
        self.error, self.epoch = math.inf, None  # type: float, int | None
        self._weights: dict[str, Tensor] = {}
        self._evaluated: dict[str, Tensor] = {}

    def evaluate(self, student: nn.Module) -> None:
        """Copies the weights being validated, which an averaging callback swaps in for the validation only."""
        self._evaluated = {name: value.detach().clone() for name, value in student.state_dict().items()}

    def consider(self, error: float, epoch: int) -> None:
        """Keeps the weights of this validation if its error is the smallest so far."""
        if error < self.error:
            self.error, self.epoch, self._weights = error, epoch, self._evaluated
        self._evaluated = {}

    def restore(self, student: nn.Module) -> None:
        """Loads the best weights into a student; does nothing if there was no validation."""
        if self.epoch is not None:
            student.load_state_dict(self._weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {"error": self.error, "epoch": self.epoch, "weights": self._weights}

    def load(self, values: dict[str, Any]) -> None:
        """Restores the values of a checkpoint."""
        self.error, self.epoch, self._weights = values["error"], values["epoch"], values["weights"]
