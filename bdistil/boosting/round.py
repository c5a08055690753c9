"""One round of boosting: a LightningModule that trains one student against the teacher and the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.boosting.part import Part
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import Index
from bdistil.errors import RunError, UserError
from bdistil.functional.boosting import prefix_error, round_loss
from bdistil.metrics.quality import as_columns, output_figures, output_sums
from bdistil.models.student import linked_numbers, links_of, run_student
from bdistil.utils import distributed

# Makes of g, S, the labels and the index of a batch the target and the error of a round that mixes labels in.
Mix = Callable[[Tensor, Tensor, Tensor, Index], tuple[Tensor, Tensor]]

# Training steps between two looks at the loss for NaN: each look waits for the device.
WATCH_EVERY = 50


class BoostingRound(pl.LightningModule):
    """Trains student t; the earlier students and the teacher are out of its module tree.

    They are in no checkpoint, no gradient reaches them, and there is nothing of them for DDP to reduce.

    Args:
        student: the student of this round, linked.
        number: t, from 0.
        settings: of the run.
        earlier: the committed students, in order, in eval mode.
        train: g, S and linked features of the training part.
        val: the same of the validation part.
        views: g and linked features of further views of the training part, where it augments at random.
        teacher: asked about each batch where settings.state is `recompute`.
        run_dir: the run directory, for what callbacks leave there.
    """

    earlier: list[nn.Module]
    teacher: nn.Module | None

    def __init__(
        self,
        student: nn.Module,
        *,
        number: int,
        settings: BoostingSettings,
        earlier: Sequence[nn.Module],
        train: Part,
        val: Part,
        views: Sequence[Part] = (),
        teacher: nn.Module | None = None,
        run_dir: Path,
    ) -> None:
        super().__init__()
        self.student, self.run_dir = student, run_dir
        self.number, self.settings, self.train_part, self.val_part = number, settings, train, val
        self.ledger, self.views = train.ledger, [train, *views]
        object.__setattr__(self, "earlier", list(earlier))
        object.__setattr__(self, "teacher", teacher)
        self.recompute = settings.state == "recompute"
        self._regression = settings.task == "regression"
        self.mix: Mix | None = None  # set by LossMixing

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module, but quickly where Lightning notes the hook under way, some 40 times a step.

        A module looks for parameters and buffers first, which takes longer than the arithmetic of the game.
        """
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) of this round's student, in units of the ledger."""
        return run_student(self.student, self.earlier, x)

    def answer(self, x: Any, index: Index, part: Part) -> Tensor:
        """Logits (B, L) float32 of this round's student for samples of a part, whose linked features are cached."""
        if self.recompute or not self._reads:
            return run_student(self.student, self.earlier, x).float()
        logits: Tensor = self.student(x, part.linked(self._reads, index, self.device))
        return logits.float()

    def on_fit_start(self) -> None:
        """Refuses a Trainer without the controller, which opens the ledger."""
        if not hasattr(self, "log_z"):
            raise UserError(
                "A round is fitted by a Trainer with callbacks=[controller]; this one has no RoundController."
            )

    # ---- training

    def training_step(self, batch: tuple[Any, Any, Index], batch_idx: int) -> Tensor:
        """The log-barrier loss of a batch (x, y, index)."""
        x, y, index = batch
        part, index = self._view_of(index)
        target, error = self.state(x, index, part)
        if self.mix is not None:
            target, error = self.mix(target, error, y, index)
        deviation = self.answer(x, index, part) - target
        loss = round_loss(deviation, error, self.log_z, **self.game)
        self._watch(loss, batch_idx)
        return loss

    def _view_of(self, index: Index) -> tuple[Part, Index]:
        """The view that a batch is of, and the numbers of its samples."""
        if len(self.views) == 1:
            return self.train_part, index
        views, rows = np.divmod(index, self.ledger.samples)
        return self.views[int(views[0])], rows

    def state(self, x: Any, index: Index, part: Part) -> tuple[Tensor, Tensor]:
        """g of the view that a batch is of, and S, which is defined on the canonical view, both (B, L)."""
        if self.recompute:
            assert self.teacher is not None
            error = self.ledger.errors(index).to(self.device, non_blocking=True)
            return self.ledger.units.inward(self.teacher(x).float()), error
        target, error = self.ledger.rows(index)
        if part is not self.train_part:
            target = part.ledger.targets(index)
        if self._on_cpu:
            return target, error
        return target.to(self.device, non_blocking=True), error.to(self.device, non_blocking=True)

    def prepare(self) -> None:
        """Reads from the ledger what holds for all batches of the round, and moves what is hidden to the device."""
        self.log_z = self.ledger.log_normaliser(self.settings.eta).float().to(self.device)
        self._on_cpu = self.device.type == "cpu"
        bound, eta = self.ledger.bound, self.settings.eta
        self.game: dict[str, Any] = {
            "eta": eta, "population": self.ledger.samples, "bound": bound, "gamma": self.settings.gamma_for(bound),
            "across": distributed.all_mean if distributed.world_size() > 1 else None,
        }  # fmt: skip
        self._reads = linked_numbers(self.earlier, links_of(self.student))
        self._recent = [torch.zeros((), device=self.device)] * WATCH_EVERY
        for module in [*self.earlier, *([self.teacher] if self.teacher is not None else [])]:
            module.to(self.device)

    def _watch(self, loss: Tensor, batch_idx: int) -> None:
        """Remembers the loss of a batch; looks at the last ones now and then."""
        place = batch_idx % WATCH_EVERY
        self._recent[place] = loss.detach()
        if place == WATCH_EVERY - 1:
            self.check_finite(batch_idx - place)

    def check_finite(self, first: int) -> None:
        """Stops the round if one of the last losses was NaN or infinite.

        Args:
            first: batch of the first of them.

        Raises:
            RunError: names round, epoch and batch.
        """
        bad = (~torch.stack(self._recent).isfinite()).nonzero()
        if len(bad):
            batch = first + int(bad[0])
            raise RunError(
                f"The loss of round {self.number + 1}, epoch {self.current_epoch}, batch {batch} is NaN or infinite. "
                f"Nothing of this round was committed; the {self.number} committed rounds are intact. "
                f"Look at that batch, or lower `lr` (now {self.settings.lr:g}) and start again in a new `run_dir`."
            )

    def on_train_epoch_end(self) -> None:
        """A last look at the epoch's losses."""
        last = self.trainer.fit_loop.batch_idx
        self.check_finite(last - last % WATCH_EVERY)

    # ---- validation: sums on the device, logged once an epoch

    def on_validation_epoch_start(self) -> None:
        """Starts the sums: of the labels, then squared error to the teacher, and outputs."""
        outputs = self.val_part.ledger.outputs
        self._label_sums = torch.zeros((3, outputs + 1) if self._regression else (3,), device=self.device)
        self._teacher_sums = torch.zeros(2, device=self.device)

    def validation_step(self, batch: tuple[Any, Tensor, Index], batch_idx: int) -> None:
        """Scores the prefix that ends with this student."""
        x, y, index = batch
        target, error = (rows.to(self.device) for rows in self.val_part.ledger.rows(index))
        miss = prefix_error(self.answer(x, index, self.val_part), target, error, self.number)
        self._label_sums += self._against_labels(target + miss, y)
        self._teacher_sums += torch.stack((miss.square().sum(), miss.new_full((), miss.numel())))

    def _against_labels(self, answers: Tensor, y: Tensor) -> Tensor:
        """Sums of answers (B, L) in units of the ledger; real labels are put into the same, where they are small."""
        units = self.ledger.units
        if self._regression:
            return output_sums(answers, units.inward(as_columns(y, self.ledger.outputs).float()))
        logits = units.outward(answers)
        right, entropy = (logits.argmax(-1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")
        return torch.stack((right, entropy, right.new_full((), len(y))))

    def on_validation_epoch_end(self) -> None:
        """Logs accuracy and loss (R² and rms error of real outputs), and the rms error to the teacher."""
        sums, (squares, outputs) = (
            self.trainer.strategy.reduce(part, reduce_op="sum") for part in (self._label_sums, self._teacher_sums)
        )
        if self._regression:
            accuracy, loss = output_figures(sums, sums.new_tensor(self.ledger.units.scale))
        else:
            accuracy, loss = sums[:2] / sums[2]
        self.log_dict(
            {"val_accuracy": accuracy, "val_loss": loss, "val_rms": (squares / outputs).sqrt()},
            prog_bar=True,
            rank_zero_only=False,
        )

    # ---- the rest

    def configure_optimizers(self) -> Any:
        """AdamW, fused where the precision allows it, on a cosine over the epochs."""
        # A gradient scaler unscales outside the optimizer, which a fused step does not allow.
        fused = str(self.trainer.precision) != "16-mixed"
        optimizer = torch.optim.AdamW(
            self.student.parameters(), self.settings.lr, weight_decay=self.settings.weight_decay, fused=fused
        )
        epochs = self.trainer.max_epochs or -1
        if self.settings.schedule == "constant" or epochs <= 0:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)]
