"""Base class of callbacks whose state belongs to a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl


class FitState(pl.Callback, ABC):
    """A callback whose state is restored from a checkpoint in a fit only.

    Lightning restores the state of callbacks in `Trainer.test` and `Trainer.validate`, too. The checkpoint was saved
    before the fit ended, so that would discard what the callback has recorded since.
    """

    _in_fit = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Records whether this is a fit."""
        self._in_fit = stage == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of a checkpoint in a fit."""
        if self._in_fit:
            self.restore(state_dict)

    @abstractmethod
    def restore(self, state_dict: dict[str, Any]) -> None:
        """Restores the state from what `state_dict` returned."""
