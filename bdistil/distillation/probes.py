"""Last-layer activations, logits and residuals of a student in training, in distillation or in a boosting round."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.round import BoostingRound
from bdistil.data.loaders import LOADERS, Index, Views, check_dataset, largest_batch, rows_loader
from bdistil.data.loaders.order import given_rows
from bdistil.distillation.last_layer import capture_last_layer, last_layers
from bdistil.errors import UserError
from bdistil.functional.boosting import prefix_error
from bdistil.functional.distillation import kd_terms
from bdistil.functional.loss_mixing import OuterLoss, label_target, residuals_of, round_residuals
from bdistil.metrics.cost import as_written

Batch = tuple[Any, Tensor, Index]  # x, y, index


class LastLayerBatch(NamedTuple):
    """A forward pass through the last linear layer.

    Attributes:
        activations: inputs of the layer (B, D), with a column of ones if it has a bias.
        logits: (B, L).
        residuals: gradients of K losses with respect to its outputs, (K, B, L).
        entropy: mean cross entropy of the labelled samples; NaN if there are none or the labels are not classes.
        labelled: number of labelled samples.
    """

    activations: Tensor
    logits: Tensor
    residuals: Tensor
    entropy: float
    labelled: int


class Probe(ABC):
    """Forward passes of a student in training; call it in eval mode and without gradients.

    Args:
        module: module in training.
        samples: N, number of samples of the training part.
        train: the user's training loader, yields (x, y).
        val: the user's validation loader.

    Attributes:
        gain: change of the logits per unit of the last layer's output.
        rows: indices of the training samples that the student is trained on.
        views: cached views of the two datasets if these are augmented at random; otherwise None.
    """

    gain = 1.0
    views: tuple[Views | None, Views | None] = (None, None)

    def __init__(self, module: Any, samples: int, train: DataLoader[Any], val: DataLoader[Any]) -> None:
        self.module, self.samples, self.train, self.val = module, samples, train, val
        self.rows: Sequence[int] = range(samples)

    def batches(self, groups: Sequence[Sequence[int]], *, validation: bool = False) -> Iterator[Batch]:
        """Yields groups of training or validation samples as batches (x, y, index), on the device of the module."""
        loader, views = (self.val, self.views[1]) if validation else (self.train, self.views[0])
        for x, y, index in rows_loader(loader, groups, views=views):
            yield *move_data_to_device((x, y), self.module.device), index

    @abstractmethod
    def mixing(self, batch: Batch) -> LastLayerBatch:
        """Runs a training batch; returns residuals of the K losses that LossMixing weights, the label loss first."""

    @abstractmethod
    def noise(self, batch: Batch) -> LastLayerBatch:
        """Runs a training batch; returns the two residuals that GradientNoise compares."""

    def validation(self) -> OuterLoss:
        """Cross entropy of the validation part as a function of the last layer."""
        samples, size = len(self.val.dataset), min(largest_batch(self.val), BLOCK)  # type: ignore[arg-type]
        blocks = [range(low, min(low + size, samples)) for low in range(0, samples, size)]
        rows = [(*self._last_layer(batch), batch[1]) for batch in self.batches(blocks, validation=True)]
        activations, logits, target = map(torch.cat, zip(*rows, strict=True))
        return self.outer(activations, logits, target)

    def outer(self, activations: Tensor, logits: Tensor, target: Tensor) -> OuterLoss:
        """Mean cross entropy of samples as a function of the last layer, from activations (n, D) and logits (n, L)."""
        share = torch.full((len(target),), 1.0 / len(target), device=target.device)
        return OuterLoss(activations, logits, target, share, self.gain)

    @abstractmethod
    def _last_layer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Activations of the last layer and logits of a batch, by default of the validation part."""


def training_rows(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices of the samples that a training loader draws; all indices if the selection changes between epochs."""
    samples: int = len(loader.dataset)  # type: ignore[arg-type]
    try:
        return given_rows(loader, LOADERS[0]) or range(samples)
    except UserError:
        return range(samples)


class DistillationProbe(Probe):
    """Probe of a `Distilling` module."""

    def __init__(self, module: pl.LightningModule, train: DataLoader[Any], val: DataLoader[Any]) -> None:
        super().__init__(module, check_dataset(train, LOADERS[0]), train, val)
        self.rows = training_rows(train)

    def mixing(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the labels and of each teacher."""
        x, y, index = batch
        activations, logits = self._last_layer(batch)
        teachers = self.module.teacher_logits(x, index).float()
        terms = kd_terms(logits, teachers, y, temperature=self.module.temperature)
        labelled = len(y) if y.ndim > 1 else int((y >= 0).sum())  # cross entropy is 0 for the others
        entropy = float(terms.ce.sum()) / labelled if labelled else math.nan
        return LastLayerBatch(activations, logits, residuals_of(terms), entropy, labelled)

    def noise(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the labels and of the teachers' mean loss."""
        seen = self.mixing(batch)
        return seen._replace(residuals=torch.stack((seen.residuals[0], seen.residuals[1:].mean(0))))

    def _last_layer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with as_written(self.module):  # a compiled network does not see a hook that is new
            return capture_last_layer([self.module.last_layer], lambda: self.module(batch[0]))


class RoundProbe(Probe):
    """Probe of a boosting round with an open ledger; logits and cross entropy are those of the resulting prefix."""

    def __init__(self, module: BoostingRound) -> None:
        super().__init__(module, module.ledger.samples, module.train_part.loader, module.val_part.loader)
        self.views = module.train_part.dataset_view, module.val_part.dataset_view
        self.layers, self.number = last_layers(module.student), module.number
        self.units, scale = module.ledger.units, module.ledger.units.scale
        settings = module.settings
        self.labelled = settings.task == "classification" and settings.labels is not None
        self.gain = 1.0 if isinstance(scale, tuple) else scale / (module.number + 1)

    def mixing(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the round's loss with the labels as its target, and with the teacher as its target."""
        activations, answer, target, error = self._state(batch, self.module.train_part)
        labels = label_target(batch[1], answer.shape[1])
        kappa = self.module.game.kappa
        residuals = round_residuals(answer, target, error, labels, kappa=kappa, rounds=self.number)
        return self._captured(activations, self._prefix(answer, target, error), residuals, batch[1])

    def noise(self, batch: Batch) -> LastLayerBatch:
        """Residuals of the squared error alone, and of the round's loss."""
        activations, answer, target, error = self._state(batch, self.module.train_part)
        logits = self._prefix(answer, target, error)
        if self.module.settings.independent:
            error = torch.zeros_like(error)
        if self.module.mix is not None:
            target, error = self.module.mix(target, error, batch[1], batch[2])
        deviation = (answer - target).requires_grad_()
        with torch.enable_grad():
            loss = self.module.loss(deviation, error, target)
        (slope,) = torch.autograd.grad(loss, deviation)
        residuals = torch.stack((2.0 / answer.shape[1] * deviation.detach(), len(answer) * slope))
        return self._captured(activations, logits, residuals, batch[1])

    def _captured(self, activations: Tensor, logits: Tensor, residuals: Tensor, target: Tensor) -> LastLayerBatch:
        soft = self.labelled and target.ndim > 1
        target = target.to(logits.dtype) if soft else target
        labelled = (len(target) if soft else int((target >= 0).sum())) if self.labelled else 0
        entropy = float(F.cross_entropy(logits, target)) if labelled else math.nan
        return LastLayerBatch(activations, logits, residuals, entropy, labelled)

    def _last_layer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        activations, answer, target, error = self._state(batch, self.module.val_part)
        return activations, self._prefix(answer, target, error)

    def _state(self, batch: Batch, part: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Activations, the student's output f, target g and running error S for a batch of a part."""
        x, _, index = batch
        with as_written(self.module):
            activations, answer = capture_last_layer(self.layers, lambda: self.module.answer(x, index, part))
        target, error = (rows.to(self.module.device) for rows in part.ledger.rows(index))
        return activations, answer, target, error

    def _prefix(self, answer: Tensor, target: Tensor, error: Tensor) -> Tensor:
        logits: Tensor = self.units.outward(target + prefix_error(answer, target, error, self.number))
        return logits


def probe_of(module: pl.LightningModule, loaders: tuple[DataLoader[Any], DataLoader[Any]]) -> Probe:
    """Returns the probe of a boosting round, or of a `Distilling` module with its training and validation loader."""
    return RoundProbe(module) if isinstance(module, BoostingRound) else DistillationProbe(module, *loaders)
