"""Joint training of all students of an ensemble on the sum of the losses of its prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from bdistil.boosting.costs import student_cost
from bdistil.boosting.plan import RunPlan
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.run import Boosting, RoundPlan
from bdistil.comparison.students import build_students, planned_rungs
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.models.student import Rung, run_all
from bdistil.utils.seeding import reseed


class Chain(nn.Module):
    """The students of an ensemble as one network; unlike in boosting, gradients pass through the links.

    Args:
        students: the linked students, in order.
    """

    def __init__(self, students: Sequence[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)

    def forward(self, x: Any) -> Tensor:
        """Logits of all prefixes (T, B, L) in training mode; of the last prefix (B, L) in eval mode."""
        own = torch.stack(run_all(list(self.students), x)[0])
        prefixes = own.cumsum(0) / torch.arange(1, len(own) + 1, device=own.device)[:, None, None]
        return prefixes if self.training else prefixes[-1]


class JointRound(BoostingRound):
    """Trains a `Chain`; each prefix contributes the loss of a first student to the sum."""

    def loss(self, deviation: Tensor, error: Tensor, target: Tensor) -> Tensor:
        """The loss () of a batch, given the deviations (T, B, L) of the prefixes from g (B, L), and S = 0."""
        return torch.stack([super(JointRound, self).loss(prefix, error, target) for prefix in deviation]).sum()


class JointLedger(pl.Callback):
    """Opens the ledger of a joint run when the fit starts, and counts the samples that the fit reads.

    The teacher is evaluated on all samples for the ledger.

    Attributes:
        samples_seen: number of samples in all finished epochs, including those before a restart.
    """

    def __init__(self, boosting: Boosting, plan: RoundPlan) -> None:
        self.boosting, self.plan = boosting, plan
        self.samples_seen, self._read = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Number of samples seen."""
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of samples seen."""
        self.samples_seen = int(state_dict["samples_seen"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the ledger on the device of the module."""
        self.boosting.open(self.plan)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the samples of a batch."""
        self._read += len(batch[-1])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the samples of the epoch before its checkpoint is saved."""
        self.samples_seen, self._read = self.samples_seen + self._read, 0


def plan_joint(boosting: Boosting, plan: RunPlan) -> RoundPlan:
    """Plans the joint training of a run's students as a single student in a first round.

    Args:
        boosting: the run.
        plan: result of the checks of the run.
    """
    settings = boosting.settings
    reseed(boosting.seed, "joint")
    students = build_students(boosting.make, planned_rungs(boosting.make, settings), plan.example)
    costs = [student_cost(student, students[:n], plan.example, "record") for n, student in enumerate(students)]
    module = JointRound(
        Chain(students).train(),
        number=0,
        settings=settings,
        earlier=[],
        train=plan.parts.train,
        val=plan.parts.val,
        views=plan.parts.views,
        teacher=boosting.teacher if settings.state == "recompute" else None,
        optimization=boosting.optimization,
        run_dir=boosting.run.root,
    )
    macs, params = sum(cost.macs for cost in costs), sum(cost.params for cost in costs)
    cost = replace(costs[0], macs=macs, params=params)
    return RoundPlan(plan, module, [Rung(0)], 0, cost, boosting.teacher.fingerprint)


def joint_ensemble(plan: RoundPlan) -> ProgressiveEnsemble:
    """The ensemble of the students of a trained `Chain`."""
    chain, head = plan.module.student, plan.checked.parts.train.ledger.head
    assert isinstance(chain, Chain)
    students = list(chain.cpu().train(False).students)
    costs = (student_cost(student, students[:n], plan.checked.example, "record") for n, student in enumerate(students))
    macs = list(accumulate(cost.macs for cost in costs))
    return ProgressiveEnsemble(
        students, scale=head.scale, offset=head.offset, macs=macs, task=plan.module.settings.task
    )
