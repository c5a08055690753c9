"""A boosting round as a LightningModule: trains one student against the teacher and the errors in the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from bdistil.boosting.best_epoch import BestEpoch
from bdistil.boosting.checks.batches import indexed
from bdistil.boosting.ledger.ledger import ErrorLedger
from bdistil.boosting.optimization import Optimization
from bdistil.boosting.part import Part
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import Index
from bdistil.errors import RunError, UserError
from bdistil.functional.boosting import prefix_kl_loss, round_loss
from bdistil.functional.distillation import at_least_float32
from bdistil.metrics.quality import PrefixMetric, prefix_metric, whole_figures
from bdistil.models.student import run_all, run_student, sources
from bdistil.utils import distributed
from bdistil.utils.modules import first_difference, structure_of
from bdistil.utils.optimizers import other_length
from bdistil.utils.resumption import FitProgress
from bdistil.utils.trees import python_numbers

# (g, S, labels, index) of a batch -> target and error of a round that mixes in the labels.
Mix = Callable[[Tensor, Tensor, Tensor, Index], tuple[Tensor, Tensor]]

# Training steps between two checks of the losses for NaN: each check waits for the device.
CHECK_EVERY = 50


@dataclass(frozen=True)
class Game:
    """Constants of the loss in one round; arguments of `bdistil.functional.round_loss`.

    Attributes:
        log_z: log-normaliser of the game's weights over all N samples, shape (L,), float32, on the device.
        eta: step size of the game.
        gamma: weight of the squared error against the barrier.
        bound: b = 2 max|g|.
        population: N.
        across: mean over the processes that share a batch; None for one process.
    """

    log_z: Tensor
    eta: float
    gamma: float
    bound: float
    population: int
    across: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, ledger: ErrorLedger, settings: BoostingSettings, device: torch.device) -> Game:
        """Constants for the current S of a ledger."""
        alone = settings.independent  # S is 0 for such a student
        log_z = ledger.log_normaliser(settings.eta).float()
        return cls(
            log_z=(torch.full_like(log_z, math.log(2 * ledger.samples)) if alone else log_z).to(device),
            eta=settings.eta,
            gamma=settings.gamma_for(ledger.bound),
            bound=ledger.bound,
            population=ledger.samples,
            across=distributed.all_mean if distributed.world_size() > 1 else None,
        )

    @property
    def kappa(self) -> float:
        """Correction strength: a student aims at g - kappa S."""
        return self.eta / (4.0 * self.bound * self.gamma)

    def loss(self, deviation: Tensor, error: Tensor) -> Tensor:
        """The loss () of a batch, given d = f - g and S, both (B, L)."""
        return round_loss(
            deviation, error, self.log_z, eta=self.eta, population=self.population, bound=self.bound,
            gamma=self.gamma, across=self.across,
        )  # fmt: skip


@dataclass
class RoundState(FitProgress):
    """Progress of one try of one round.

    Attributes:
        number: index of the round, from 0.
        attempt: index of this try among the rungs of the round.
        samples_seen: number of training samples over all processes.
    """

    number: int = 0
    attempt: int = 0
    samples_seen: int = 0

    def load(self, values: dict[str, Any]) -> None:
        """Restores the values of a checkpoint.

        Raises:
            RunError: the checkpoint belongs to another round or try.
        """
        found, expected = (values["number"], values["attempt"]), (self.number, self.attempt)
        if found != expected:
            raise RunError(
                f"Expected a checkpoint of (round, try) {expected}, got one of {found}. Fit with "
                "ckpt_path=controller.ckpt_path; under SLURM give each round's Trainer a default_root_dir of its own."
            )
        super().load(values)


class BoostingRound(pl.LightningModule):
    """Trains student t.

    The teacher and the earlier students are outside its module tree: they are in no checkpoint, receive no gradient,
    and DDP does not reduce them.

    Args:
        student: the student of this round, linked.
        number: t, from 0.
        settings: settings of the run.
        earlier: the committed students, in order, in eval mode.
        train: training part: g, S and linked features.
        val: validation part.
        views: further views of a randomly augmented training part.
        teacher: evaluated on each batch if settings.state is `recompute`; otherwise None.
        optimization: optimizer and schedule; those of the settings by default.
        run_dir: the run directory, where callbacks write their files.
    """

    earlier: list[nn.Module]
    teacher: nn.Module | None
    _scores: PrefixMetric

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
        optimization: Optimization | None = None,
        run_dir: Path,
    ) -> None:
        super().__init__()
        self.student, self.run_dir, self.number, self.settings = student, run_dir, number, settings
        self.train_part, self.val_part, self.views = train, val, [train, *views]
        object.__setattr__(self, "earlier", list(earlier))
        object.__setattr__(self, "teacher", teacher)
        self.mix: Mix | None = None  # set by LossMixing
        self._linked = sources(student, self.earlier) if teacher is None else []
        self._game: Game | None = None
        self._losses: list[Tensor] = []  # not yet checked for NaN
        self._sizes: list[int] = []  # samples of their batches
        self._loss_sum, self._loss_samples = 0.0, 0  # over the epoch
        self._misses: list[float] = []  # squared errors to the teacher, and their number
        self.structure = structure_of(student)  # before a Trainer converts modules
        self.initial = [parameter.detach().cpu().clone() for parameter in student.parameters()]
        self.optimization = optimization or Optimization()
        self.best = BestEpoch() if settings.keep_epoch == "best" else None

    @property
    def ledger(self) -> ErrorLedger:
        """g and S of the training part."""
        return self.train_part.ledger

    @property
    def game(self) -> Game:
        """Constants of the loss, once `start` has set them."""
        assert self._game is not None
        return self._game

    def start(self, game: Game) -> None:
        """Sets the constants of the loss: once the ledger is open, and again if a callback changes the errors."""
        self._game = game

    def on_fit_start(self) -> None:
        """Moves the earlier students and the teacher to the device.

        Raises:
            UserError: the Trainer has no RoundController, which opens the ledger.
        """
        if self._game is None:
            raise UserError(
                "A round is fitted by a Trainer with callbacks=[controller]; this one has no RoundController."
            )
        for module in [*self.earlier, *([self.teacher] if self.teacher is not None else [])]:
            module.to(self.device)

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) of this round's student, in units of the ledger."""
        return run_student(self.student, self.earlier, x)

    def answer(self, x: Any, index: Index, part: Part) -> Tensor:
        """Logits (B, L) float32 of this round's student for samples of a part, from cached activations if possible."""
        if not self.reads_cache(part):
            return run_student(self.student, self.earlier, x).float()
        logits: Tensor = self.student(x, part.linked(self._linked, index, self.device))
        return logits.float()

    def reads_cache(self, part: Part) -> bool:
        """Whether the activations that the student reads from earlier ones are cached for the samples of a part."""
        return bool(self._linked) and part.features.holds(self._linked)

    def state(self, x: Any, index: Index) -> tuple[Tensor, Tensor, Tensor]:
        """The student's output f, g and S on a batch of the training part, or of one of its views, all (B, L)."""
        if self.teacher is not None:
            return self._recomputed(x, self.teacher)
        part, index = self._view_of(index)
        target, error = part.ledger.rows(index)
        moved = target.to(self.device, non_blocking=True), error.to(self.device, non_blocking=True)
        return self.answer(x, index, part), *moved

    def _recomputed(self, x: Any, teacher: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Recomputes f, g and S for a freshly augmented x, by running the teacher and all students on it."""
        with torch.no_grad():
            target = self.ledger.units.inward(teacher(x).float())
            answers, made = run_all(self.earlier, x)
            error = sum((answer.float() - target for answer in answers), torch.zeros_like(target))
        linked = [made[number][key] for number, key in sources(self.student, self.earlier)]
        answer: Tensor = self.student(x, linked) if linked else self.student(x)
        return answer.float(), target, error

    # ---- training

    def training_step(self, batch: tuple[Any, Any, Index], batch_idx: int) -> Tensor:
        """Returns the loss of a batch (x, y, index)."""
        x, y, index = indexed(batch)
        answer, target, error = self.state(x, index)
        if self.settings.independent:
            error = torch.zeros_like(error)
        if self.mix is not None:
            target, error = self.mix(target, error, y, self._view_of(index)[1])
        loss = self.loss(answer - target, error, target)
        self._losses.append(loss.detach())
        self._sizes.append(len(index))
        if len(self._losses) == CHECK_EVERY:
            self._check_losses(batch_idx)
        return loss

    def loss(self, deviation: Tensor, error: Tensor, target: Tensor) -> Tensor:
        """The loss () of a batch, given d = f - g, S and g, all (B, L); see `BoostingSettings.loss`."""
        settings = self.settings
        if settings.loss == "game":
            return self.game.loss(deviation, error)
        if settings.loss == "residual":
            return (at_least_float32(deviation) + error).square().mean()
        scale, alone = self.ledger.head.scale, settings.loss == "prefix_kl"
        earlier = 0 if settings.independent else self.number
        assert not isinstance(scale, tuple), "only a regression has a unit for each output"
        loss = prefix_kl_loss(
            deviation, error, target, earlier=earlier, scale=scale, temperature=settings.temperature,
            residual=settings.residual_weight if alone else 0.0,
        )  # fmt: skip
        return loss if alone else loss + settings.residual_weight * self.game.loss(deviation, error)

    def _view_of(self, index: Index) -> tuple[Part, Index]:
        """The view of a batch, and its sample numbers in it."""
        if len(self.views) == 1:
            return self.train_part, index
        views, rows = np.divmod(index, self.ledger.samples)
        return self.views[int(views[0])], rows

    def _check_losses(self, last: int) -> None:
        """Accumulates the losses up to batch `last`. Raises RunError if one of them is NaN or infinite."""
        losses, sizes = torch.stack(self._losses).cpu().double(), self._sizes
        self._losses, self._sizes = [], []
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            batch = last + 1 - len(losses) + int(bad[0])
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise RunError(
                f"The loss of round {self.number + 1}, epoch {self.current_epoch}, batch {batch} is NaN or infinite. "
                f"Nothing of this round was committed; the {self.number} committed rounds are intact. "
                f"Look at that batch, or lower the learning rate (now {float(rate):g}) and start again in a new "
                "`run_dir`."
            )
        self._loss_sum += float(losses @ torch.tensor(sizes, dtype=torch.float64))
        self._loss_samples += sum(sizes)

    def on_train_epoch_end(self) -> None:
        """Checks the remaining losses of the epoch for NaN, and logs the mean loss per sample."""
        if self._losses:
            self._check_losses(self.trainer.fit_loop.batch_idx)
        sums = distributed.all_sum(torch.tensor([self._loss_sum, self._loss_samples], dtype=torch.float64))
        self._loss_sum, self._loss_samples = 0.0, 0
        if sums[1] > 0:  # 0 if a fit with max_steps is resumed at the end of an epoch, which runs this hook first
            self.log("train_loss", float(sums[0] / sums[1]))

    # ---- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the best epoch so far, the structure of the student, and which of its parameters are trained.

        NumPy's numbers, such as learning rates, become Python's: Lightning loads checkpoints with
        ``weights_only=True``, which refuses them.
        """
        for key in ("callbacks", "optimizer_states", "lr_schedulers"):
            if key in checkpoint:
                checkpoint[key] = python_numbers(checkpoint[key])
        checkpoint["structure"] = self.structure
        checkpoint["trained"] = {name: value.requires_grad for name, value in self.student.named_parameters()}
        if self.best is not None:
            checkpoint["best_epoch"] = self.best.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the best epoch so far, and what a callback has frozen or unfrozen.

        Raises:
            UserError: the checkpoint belongs to another student than this round's.
        """
        check_same_student(checkpoint["state_dict"], self.state_dict(), self.run_dir, self.number)
        self._check_structure(checkpoint)
        for name, value in self.student.named_parameters():
            value.requires_grad_(checkpoint.get("trained", {}).get(name, value.requires_grad))
        if self.best is not None and "best_epoch" in checkpoint:
            self.best.load(checkpoint["best_epoch"])

    def _check_structure(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError if a checkpoint has another student structure or cosine length than this round."""
        work = self.run_dir / "work"
        if found := first_difference(checkpoint.get("structure"), self.structure):
            raise UserError(
                f"The student of round {self.number + 1}, which is under way in {self.run_dir}, differs from what "
                f"`student` makes now: {found}. Give the function that the round was started with, choose another "
                f"`run_dir`, or remove {work} to train the round anew."
            )
        if self.optimization == Optimization() and (lengths := other_length(checkpoint, self.trainer)):
            raise UserError(
                f"Round {self.number + 1}, which is under way in {self.run_dir}, was started with a cosine over "
                f"{lengths[0]} epochs or steps, now the Trainer ends after {lengths[1]}. Give the former `max_epochs` "
                f"or `max_steps`, or remove {work} to train the round anew."
            )

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        """Resets the scores against the labels and the teacher; copies the weights as a candidate for the best.

        Raises:
            UserError: the round has not been fitted yet.
        """
        if self._game is None:
            raise UserError("A round is validated during or after its fit, which opens the ledger, not before.")
        if self.best is not None and not self.trainer.sanity_checking:
            self.best.evaluate(self.student)
        scores = prefix_metric(self.settings.task, self.ledger.outputs)
        object.__setattr__(self, "_scores", scores)  # in no checkpoint
        self._misses = [0.0, 0.0]

    def validation_step(self, batch: tuple[Any, Tensor | None, Index], batch_idx: int) -> None:
        """Adds the scores of the prefix that ends with this student."""
        x, y, index = indexed(batch)
        target, error = self.val_part.ledger.rows(index)
        answer, labels = self.answer(x, index, self.val_part).cpu(), None if y is None else y.cpu()
        miss = self.val_part.add_scores(self._scores, answer, target, error, self.number, labels)
        self._misses[0] += float(miss.square().sum())
        self._misses[1] += miss.numel()

    def on_validation_epoch_end(self) -> None:
        """Logs accuracy and loss (R² and rms error in a regression), and the rms error to the teacher."""
        accuracy, loss = whole_figures(self._scores, self.ledger.outputs)
        squares, count = distributed.all_sum(torch.tensor(self._misses, dtype=torch.float64)).tolist()
        rms = math.sqrt(squares / count)
        self.log_dict({"val_accuracy": accuracy, "val_loss": loss, "val_rms": rms}, prog_bar=True)
        if self.best is not None and not self.trainer.sanity_checking:
            self.best.consider(rms, self.current_epoch)

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule over the fit or a constant rate, or the user's optimizer and schedule."""
        return self.optimization.configure(self.student, self.settings, self.trainer)


def check_same_student(there: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path, number: int) -> None:
    """Raises UserError if two state dicts of a round differ in the names or shapes of their tensors."""
    old, new = ({k: tuple(getattr(v, "shape", ())) for k, v in state.items()} for state in (there, now))
    differing = sorted(key for key in old | new if old.get(key) != new.get(key))
    if differing:
        key = differing[0]
        raise UserError(
            f"The student of round {number + 1}, which is under way in {run_dir}, differs from what `student` makes "
            f"now: {key} is {old.get(key, 'absent')} there, {new.get(key, 'absent')} now. Give the function that the "
            f"round was started with, choose another `run_dir`, or remove {run_dir / 'work'} to train the round anew."
        )
