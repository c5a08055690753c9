"""A boosting round whose target is, sample by sample, a mix of label and teacher."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.round import BoostingRound
from bdistil.data.loaders.indexing import Index
from bdistil.errors import UserError
from bdistil.functional.boosting import log_normaliser
from bdistil.functional.loss_mixing import MixingSettings, label_target, mixed_target
from bdistil.mixing_store import MixingStore


def check_round(module: BoostingRound, settings: MixingSettings) -> None:
    """Refuses what the target of a round can not be mixed of.

    Raises:
        UserError: weights that do not sum to 1, or real outputs.
    """
    if settings.mode != "convex":
        raise UserError(
            "Expected `mode` of the mixing settings to be 'convex' in a boosting run, whose target is a mix of "
            f"label and teacher, got {settings.mode!r}."
        )
    if module.settings.task == "regression":
        raise UserError("Expected a boosting run of classes beside LossMixing, got task='regression'.")


class RoundMix:
    """Target and error of a round, given what was learned of each sample (`functional.loss_mixing.mixed_target`).

    Args:
        module: the round, once its ledger is open.
        store: of one number a sample, the teacher's share.
        labels: of all samples, (N,) on the CPU.
    """

    def __init__(self, module: BoostingRound, store: MixingStore, labels: Tensor) -> None:
        self.module, self.store, self.labels = module, store, labels

    def __call__(self, target: Tensor, error: Tensor, labels: Tensor, index: Index) -> tuple[Tensor, Tensor]:
        """g' and S' (B, L) of a batch."""
        share = self.store.rows(index)[:, 0].to(target.device)
        return mixed_target(target, error, label_target(labels, target.shape[1]), share, self.module.number)

    def install(self) -> None:
        """Makes it the target of the round, and the game that of the errors to it: one pass over the ledger."""
        ledger, total = self.module.ledger, torch.full((self.module.ledger.outputs,), -torch.inf, dtype=torch.float64)
        for low in range(0, ledger.samples, 8 * BLOCK):
            index = np.arange(low, min(low + 8 * BLOCK, ledger.samples))
            _, error = self(*ledger.rows(index), self.labels[index], index)
            total = torch.logaddexp(total, log_normaliser(error.double(), self.module.settings.eta))
        self.module.log_z = total.float().to(self.module.device)
        self.module.mix = self
