"""Distillation of a single student as a LightningModule, without boosting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from bdistil.boosting.checks.trainer import check_precision
from bdistil.boosting.labels import check_labels
from bdistil.boosting.run import is_attached
from bdistil.data.loaders import LOADERS, Index, PairCollate, check_dataset, paired, single_loader
from bdistil.data.loaders.order import own_batches, reads_all
from bdistil.distillation.last_layer import last_layers
from bdistil.errors import UserError
from bdistil.functional.distillation import KDTerms, at_least_float32, kd_terms
from bdistil.functional.gradient_noise import Suggestion, scheduled_weight
from bdistil.functional.loss_mixing import mixed_loss
from bdistil.metrics.quality import class_sums
from bdistil.teachers.checks import check_apart, warn_of_probabilities
from bdistil.teachers.wrappers import FrozenTeacher
from bdistil.utils.modules import kept_buffers
from bdistil.utils.optimizers import adamw_cosine, other_length, schedule_length

CAUTIOUS = 0.1  # weight used by `auto` before the first suggestion


@runtime_checkable
class WeightSetter(Protocol):
    """A callback that sets `Distillation.weight` where ``distillation_weight`` is "auto", such as GradientNoise."""

    def set_weight(self, module: Any, suggestion: Suggestion) -> float:
        """Sets the weight of a module and returns it."""


class Distillation(pl.LightningModule):
    """Distils one or several teachers into a student with the loss (1 - w) CE + w tau^2 KL.

    With several teachers, KL is the mean over them. With the callback `LossMixing`, its per-sample weights replace w.

    Args:
        student: maps x to logits (B, L) and ends with a linear layer.
        teacher: a module (x -> logits), or several.
        distillation_weight: w in 0 … 1; `auto` follows the suggestions of `GradientNoise`.
        weight_factor: w decays (< 1) or grows (> 1) by this factor per epoch.
        temperature: tau.
        unbiased: adds w times the mean control variate at the start of the epoch, as SVRG does: the teacher reduces
            the noise without a bias towards its own errors. Costs an additional pass over the training part per epoch;
            the sampler must draw each sample once per epoch.
        lr: learning rate of AdamW, with a cosine schedule over the fit. Override `configure_optimizers` for another
            optimizer.
        weight_decay: weight decay of AdamW.
        labels: key of y in batches that are mappings.

    Raises:
        UserError: a weight, factor or temperature is out of range; in a fit, options or data are incompatible.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> module = Distillation(nn.Linear(4, 3), teacher=nn.Linear(4, 3), distillation_weight=0.5, temperature=2.0)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> module.training_step((x, y), 0).shape
        torch.Size([])
        >>> [name for name, _ in module.named_parameters()]  # the teacher is frozen, and in no checkpoint
        ['student.weight', 'student.bias']
    """

    teachers: list[FrozenTeacher]
    sample_weights: Callable[[Index], Tensor] | None = None  # set by LossMixing, returns weights (B, K)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        *,
        distillation_weight: float | Literal["auto"] = 0.9,
        weight_factor: float = 1.0,
        temperature: float = 4.0,
        unbiased: bool = False,
        lr: float = 1e-2,
        weight_decay: float = 1e-4,
        labels: str = "labels",
    ) -> None:
        super().__init__()
        weight = CAUTIOUS if distillation_weight == "auto" else distillation_weight
        if isinstance(weight, str) or not 0 <= weight <= 1:
            raise UserError(f"Expected `distillation_weight` to be in 0 … 1, or 'auto', got {weight!r}.")
        if weight_factor <= 0 or temperature <= 0:
            raise UserError(f"Expected `weight_factor` and `temperature` > 0, got {weight_factor} and {temperature}.")
        if distillation_weight == "auto" and weight_factor != 1:
            raise UserError(
                f"Expected `weight_factor` = 1 with `distillation_weight: auto`, which changes the weight itself, got "
                f"{weight_factor}."
            )
        self.student, self.last_layer = student, last_layers(student)[-1]
        teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        if not teachers:
            raise UserError("Expected `teacher` to be a module or several, got an empty list.")
        for module in teachers:
            check_apart(student, (parameter for parameter in module.parameters() if parameter.requires_grad))
        # Outside the module tree: in no checkpoint, and never in train mode.
        object.__setattr__(self, "teachers", [FrozenTeacher(module) for module in teachers])
        self.distillation_weight, self.weight_factor, self.temperature = distillation_weight, weight_factor, temperature
        self.unbiased, self.lr, self.weight_decay = unbiased, lr, weight_decay
        self.weight, self.labels = float(weight), labels
        self._pairs = PairCollate(list, labels, name="dataloader", optional=False)
        self._control: list[Tensor] = []
        self._checked = False  # whether a batch was looked at

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) of the student, in float32 even with mixed precision."""
        return at_least_float32(self.student(x))

    def teacher_logits(self, x: Any, index: Index | None = None) -> Tensor:
        """Logits of the teacher (B, L), or of M teachers (M, B, L)."""
        answers = [at_least_float32(teacher(x)) for teacher in self.teachers]
        return answers[0] if len(answers) == 1 else torch.stack(answers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch: (x, y), a mapping with a key for y, or, with LossMixing, (x, y, index)."""
        x, y, *index = self._split(batch)
        terms = self._terms(x, y, *index)
        if self.sample_weights is not None:
            return mixed_loss(terms, self.sample_weights(index[0]))
        loss = ((1.0 - self.weight) * terms.ce + self.weight * _mean_kl(terms)).mean()
        if not self.unbiased:
            return loss
        if not self._control:  # a fit that was resumed within an epoch
            self._control = self.control_variate()
        pull = sum((c * p).sum() for c, p in zip(self._control, self._trained(), strict=True))
        return loss + self.weight * pull

    def _split(self, batch: Any) -> tuple[Any, ...]:
        """(x, y) of a batch, with what follows it: an index, or names.

        Raises:
            UserError: a third part are real numbers, such as weights of the samples, which no loss here reads.
        """
        pair, index = (batch, ()) if isinstance(batch, Mapping) else (batch[:2], batch[2:])
        if any(isinstance(part, Tensor | np.ndarray) and torch.as_tensor(part).is_floating_point() for part in index):
            raise UserError(
                "Expected batches (x, y) for Distillation, got a third part of real numbers. Weights of samples would "
                "be ignored: leave them out, or override `training_step`."
            )
        if not self._checked and self.sample_weights is None and any(isinstance(part, Tensor) for part in index):
            rank_zero_warn(
                f"Distillation takes the second of {len(batch)} parts of a batch for the labels, and ignores the rest. "
                "If batches are (x, lengths, y), give the loader a collate function that returns ((x, lengths), y)."
            )
        x, y = self._pairs.split(pair)
        if y is not None and y.ndim > 1 and not y.is_floating_point():
            y = y.float()  # one-hot labels
        return x, y, *index

    def _terms(self, x: Any, y: Tensor, index: Index | None = None) -> KDTerms:
        logits, answers = self(x), self.teacher_logits(x, index)
        if not self._checked:
            self._checked = True
            self._check_teachers(answers)
            self._check_labels(logits, y)
        return kd_terms(logits, answers, y, temperature=self.temperature)

    def _check_teachers(self, answers: Tensor) -> None:
        """Raises UserError if logits (B, L) or (M, B, L) of the teachers are of a single class."""
        for teacher in answers if answers.ndim == 3 else [answers]:
            warn_of_probabilities(teacher)
        if answers.shape[-1] < 2:
            raise UserError(
                "Expected logits (B, L) of L >= 2 classes for Distillation, whose loss is 0 for a single output, got "
                "L=1. Give student and teacher an output for each of two classes; real outputs are distilled by "
                "boosting with task='regression'."
            )

    def _check_labels(self, logits: Tensor, y: Tensor) -> None:
        """Raises UserError if the student has no logits (B, L), or labels are no classes or those of another task."""
        if logits.ndim != 2:
            raise UserError(
                f"Expected logits (B, L) of the student of a Distillation, got {tuple(logits.shape)}. Give each "
                "position of a sequence as a sample: a student that returns its logits flat, with labels to match."
            )
        check_labels(y.cpu(), np.arange(len(y)), "the first batch", "classification", logits.shape[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs accuracy and cross entropy over the labelled samples."""
        x, y, *_ = self._split(batch)
        logits = self(x)
        if batch_idx == 0:
            self._check_labels(logits, y)
        right, entropy, labelled = class_sums(logits, y)
        scores = {"val_accuracy": right / labelled.clamp(min=1), "val_loss": entropy / labelled.clamp(min=1)}
        self.log_dict(scores, batch_size=int(labelled), prog_bar=True, sync_dist=True)

    # ---- hooks

    def on_fit_start(self) -> None:
        """Moves the teachers to the device; with `auto`, checks that a callback sets the weight."""
        for teacher in self.teachers:
            teacher.to(self.device)
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.distillation_weight == "auto" and not any(isinstance(c, WeightSetter) for c in callbacks):
            raise UserError(
                "`distillation_weight: auto` follows the GradientNoise callback, which this Trainer lacks. "
                "Add bdistil.callbacks.GradientNoise(), or give a number."
            )

    def on_train_start(self) -> None:
        """Checks that the options are compatible with the data and the callbacks.

        Raises:
            UserError: they are not.
        """
        if self.sample_weights is not None and (self.unbiased or self.distillation_weight == "auto"):
            raise UserError(
                "Expected `unbiased` and `distillation_weight: auto` to be off beside LossMixing, whose weights "
                f"replace that of the distillation, got {self.unbiased} and {self.distillation_weight!r}."
            )
        if self.unbiased:
            check_precision(str(self.trainer.precision))
            self._check_whole_epochs()
            self._check_sampler(single_loader(self.trainer.train_dataloader))

    def _check_whole_epochs(self) -> None:
        """Raises UserError for an option of the Trainer that leaves out batches of an epoch."""
        for name, whole in (("overfit_batches", 0.0), ("limit_train_batches", 1.0)):
            value = getattr(self.trainer, name)
            if value != whole and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise UserError(
                    "Expected all batches of the training part in an epoch, as `unbiased` adds a mean over them, got "
                    f"Trainer({name}={value}). Leave it out, or leave out `unbiased`."
                )

    def _check_sampler(self, loader: Any) -> None:
        """Raises UserError for a training loader that does not draw each sample of the dataset once per epoch."""
        check_dataset(paired(loader, self.labels), LOADERS[0])
        if not (reads_all(loader) or isinstance(loader.sampler, DistributedSampler)):
            raise UserError(
                f"Expected the sampler of `{LOADERS[0]}()` to read each sample once an epoch, as `unbiased` adds a "
                f"mean over all of them, got {type(own_batches(loader) or loader.sampler).__name__}. Give a "
                "torch.utils.data.Subset, or leave out `unbiased`."
            )

    def on_train_epoch_start(self) -> None:
        """Sets the weight and the mean control variate of this epoch."""
        if not isinstance(self.distillation_weight, str):
            self.weight = scheduled_weight(self.distillation_weight, self.weight_factor, self.current_epoch)
        if self.unbiased:
            self._control = self.control_variate()

    def control_variate(self) -> list[Tensor]:
        """Mean of grad CE - grad KL over the training part, one tensor per trainable parameter of the student.

        Computed in training mode and on shuffled batches, as batch norm has different gradients in eval mode.
        """
        given: Any = single_loader(self.trainer.train_dataloader)
        loader: DataLoader[Any] = DataLoader(
            given.dataset, batch_size=given.batch_size or 1, collate_fn=given.collate_fn, drop_last=given.drop_last,
            shuffle=True, generator=torch.Generator().manual_seed(self.current_epoch),
        )  # fmt: skip
        parameters, samples = self._trained(), 0
        total = [torch.zeros_like(p) for p in parameters]
        with isolate_rng(), kept_buffers(self.student):
            for batch in loader:
                x, y, *_ = self._split(self.trainer.strategy.batch_to_device(batch, self.device))
                terms = self._terms(x, y)
                loss = (terms.ce - _mean_kl(terms)).sum()
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
                total, samples = [t + g for t, g in zip(total, gradients, strict=True)], samples + len(y)
        return [part / samples for part in total]

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the current weight, which `auto` changes."""
        checkpoint["distillation_weight"] = self.weight

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the weight.

        Raises:
            UserError: the fit goes on with our cosine, which would end before it and rise again.
        """
        self.weight = float(checkpoint["distillation_weight"])
        ours = getattr(self.configure_optimizers, "__func__", None) is Distillation.configure_optimizers
        if not ours or not is_attached(self) or not self.trainer.training:
            return
        if lengths := other_length(checkpoint, self.trainer):
            raise UserError(
                f"The fit of the checkpoint was started with a cosine over {lengths[0]} epochs or steps, now the "
                f"Trainer ends after {lengths[1]}. Give the former `max_epochs` or `max_steps`. To train longer, begin "
                "a new fit with the weights of the checkpoint, or override `configure_optimizers`."
            )

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule over the fit."""
        length = schedule_length(self.trainer)
        return adamw_cosine(self.student.parameters(), self.lr, *length, weight_decay=self.weight_decay)


def _mean_kl(terms: KDTerms) -> Tensor:
    """Per-sample KL (B,), averaged over the teachers."""
    return terms.kl if terms.kl.ndim == 1 else terms.kl.mean(0)


def generations(
    make_student: Callable[[], nn.Module], teacher: nn.Module, times: int, **options: Any
) -> Iterator[Distillation]:
    """Repeated self-distillation: each student is the teacher of the next one.

    Args:
        make_student: returns a new student.
        teacher: teacher of the first student.
        times: number of students.
        options: keyword arguments of `Distillation`.

    Yields:
        One module per student; fit it before requesting the next one.
    """
    for _ in range(times):
        student = make_student()
        yield Distillation(student, teacher, **options)
        teacher = student
