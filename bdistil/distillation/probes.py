"""The trainings that can be looked at from their last layer: distillation in anyone's module, a round of boosting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.round import BoostingRound
from bdistil.data.loaders.checks import check_dataset
from bdistil.data.loaders.indexing import Index, rows_loader
from bdistil.distillation.last_layer import capture_last_layer, last_layers
from bdistil.functional.boosting import prefix_error
from bdistil.functional.boosting_loss import round_loss
from bdistil.functional.distillation import kd_terms
from bdistil.functional.loss_mixing import OuterLoss, label_target, residuals_of, round_residuals


class LastLayerBatch(NamedTuple):
    """A batch, as the last layer sees it.

    Attributes:
        activations: what goes in, (B, D), with a column of ones where the layer has a bias.
        logits: what comes out, (B, L).
        residuals: gradients of the losses with respect to the logits, (K, B, L).
        entropy: mean cross entropy of the labels.
    """

    activations: Tensor
    logits: Tensor
    residuals: Tensor
    entropy: float


Batch = tuple[Any, Tensor, Index]
Groups = Sequence[Sequence[int]]


class View(Protocol):
    """The training of one student, whatever module it is in."""

    samples: int

    def batches(self, groups: Groups) -> Iterator[Batch]:
        """(x, y, index) of groups of rows of the training part."""

    def mixing(self, batch: Batch) -> LastLayerBatch:
        """A batch with the residuals that mixing weighs: those of the labels first."""

    def noise(self, batch: Batch) -> LastLayerBatch:
        """A batch with the two residuals whose noise is compared."""

    def outer(self, batch: Batch, seen: LastLayerBatch) -> OuterLoss:
        """Cross entropy of a training batch, as part of the outer loss."""

    def validation(self) -> OuterLoss:
        """Cross entropy of the validation part."""


def _read(loader: DataLoader[Any], groups: Groups, device: torch.device) -> Iterator[Batch]:
    for x, y, index in rows_loader(loader, groups):
        yield move_data_to_device(x, device), y.to(device), index


def _in_order(samples: int) -> Groups:
    return [range(low, min(low + BLOCK, samples)) for low in range(0, samples, BLOCK)]


def _even(count: int, device: torch.device) -> Tensor:
    return torch.full((count,), 1.0 / count, device=device)


def _joined(parts: list[OuterLoss]) -> OuterLoss:
    """The mean cross entropy over several batches."""
    activations, logits, target = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
    return OuterLoss(activations, logits, target, _even(len(target), target.device), parts[0].gain)


class PlainView:
    """Distillation in anyone's LightningModule (`Distilling`).

    Args:
        module: is distilled.
        train: the user's training loader, yields (x, y).
        val: the user's validation loader, if it is needed.
    """

    def __init__(self, module: pl.LightningModule, train: DataLoader[Any], val: DataLoader[Any] | None = None) -> None:
        self.module: Any = module
        self.train, self.val = train, val
        self.samples = check_dataset(train, "train_dataloader")

    def batches(self, groups: Groups) -> Iterator[Batch]:
        """(x, y, index) of groups of rows of the training part."""
        return _read(self.train, groups, self.module.device)

    def mixing(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the labels and of each teacher."""
        x, y, index = batch
        activations, logits = capture_last_layer([self.module.last_layer], lambda: self.module(x))
        teachers = self.module.teacher_logits(x, index).float()
        terms = kd_terms(logits, teachers, y, temperature=self.module.temperature)
        return LastLayerBatch(activations, logits, residuals_of(terms), float(terms.ce.mean()))

    def noise(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the labels and of the teachers' mean loss."""
        seen = self.mixing(batch)
        return seen._replace(residuals=torch.stack((seen.residuals[0], seen.residuals[1:].mean(0))))

    def outer(self, batch: Batch, seen: LastLayerBatch) -> OuterLoss:
        """Cross entropy of a training batch."""
        return OuterLoss(seen.activations, seen.logits, batch[1], _even(len(batch[1]), batch[1].device))

    def validation(self) -> OuterLoss:
        """Cross entropy of the validation part."""
        assert self.val is not None
        parts = []
        for x, y, _ in _read(self.val, _in_order(check_dataset(self.val, "val_dataloader")), self.module.device):
            activations, logits = capture_last_layer([self.module.last_layer], lambda x=x: self.module(x))  # type: ignore[misc]
            parts.append(OuterLoss(activations, logits, y, _even(len(y), y.device)))
        return _joined(parts)


class RoundView:
    """A round of boosting. Its outer loss is that of the prefix that ends with the student.

    Args:
        module: the round, once its ledger is open.
    """

    def __init__(self, module: BoostingRound) -> None:
        self.module, self.layers = module, last_layers(module.student)
        self.samples = module.ledger.samples
        scale = module.ledger.units.scale
        self.classes = not isinstance(scale, tuple)  # only classes have a cross entropy and are mixed
        self.gain = scale / (module.number + 1) if not isinstance(scale, tuple) else 1.0
        gamma = module.game["gamma"]
        self.kappa = module.settings.eta / (4.0 * module.ledger.bound * gamma)

    def batches(self, groups: Groups) -> Iterator[Batch]:
        """(x, y, index) of groups of rows of the training part."""
        return _read(self.module.train_part.loader, groups, self.module.device)

    def _state(self, batch: Batch, part: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Activations, answer f, g and S of a batch of a part."""
        x, _, index = batch
        activations, answer = capture_last_layer(self.layers, lambda: self.module.answer(x, index, part))
        target, error = (rows.to(self.module.device) for rows in part.ledger.rows(index))
        return activations, answer, target, error

    def _prefix(self, answer: Tensor, target: Tensor, error: Tensor) -> Tensor:
        return self.module.ledger.units.outward(target + prefix_error(answer, target, error, self.module.number))

    def mixing(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the round's loss where its target is the labels, and where it is the teacher."""
        activations, answer, target, error = self._state(batch, self.module.train_part)
        labels = label_target(batch[1], answer.shape[1])
        found = round_residuals(answer, target, error, labels, kappa=self.kappa, rounds=self.module.number)
        return self._seen(batch, activations, answer, target, error, found)

    def noise(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the squared error alone, and with the game."""
        activations, answer, target, error = self._state(batch, self.module.train_part)
        if self.module.mix is not None:
            target, error = self.module.mix(target, error, batch[1], batch[2])
        deviation = (answer - target).requires_grad_()
        with torch.enable_grad():
            loss = round_loss(deviation, error, self.module.log_z, **self.module.game)
        (game,) = torch.autograd.grad(loss, deviation)
        residuals = torch.stack((2.0 / answer.shape[1] * deviation.detach(), len(answer) * game))
        return self._seen(batch, activations, answer, target, error, residuals)

    def _seen(
        self, batch: Batch, activations: Tensor, answer: Tensor, target: Tensor, error: Tensor, residuals: Tensor
    ) -> LastLayerBatch:
        logits = self._prefix(answer, target, error)
        entropy = float(nn.functional.cross_entropy(logits, batch[1])) if self.classes else float("nan")
        return LastLayerBatch(activations, logits, residuals, entropy)

    def outer(self, batch: Batch, seen: LastLayerBatch) -> OuterLoss:
        """Cross entropy of the prefix on a training batch."""
        return OuterLoss(seen.activations, seen.logits, batch[1], _even(len(batch[1]), batch[1].device), self.gain)

    def validation(self) -> OuterLoss:
        """Cross entropy of the prefix on the validation part."""
        part, parts = self.module.val_part, []
        for batch in _read(part.loader, _in_order(part.samples), self.module.device):
            activations, answer, target, error = self._state(batch, part)
            logits = self._prefix(answer, target, error)
            parts.append(OuterLoss(activations, logits, batch[1], _even(len(batch[1]), batch[1].device), self.gain))
        return _joined(parts)


def view_of(module: pl.LightningModule, loaders: tuple[Any, Any]) -> View:
    """The view of a module: a round of boosting, or distillation of anyone's."""
    return RoundView(module) if isinstance(module, BoostingRound) else PlainView(module, *loaders)
