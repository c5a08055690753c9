"""The last linear layer of a module in training: checks of the interface, and capture of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bdistil.boosting.checks.batches import check_hooks
from bdistil.boosting.checks.trainer import check_precision
from bdistil.data.loaders import LOADERS, Index, check_dataset, paired, single_loader
from bdistil.data.loaders.fingerprints import changed, spread, stable_digests
from bdistil.data.loaders.order import SEEDED
from bdistil.errors import UserError
from bdistil.models.student import Student


class Distilling(Protocol):
    """Interface of a LightningModule for `LossMixing` and `GradientNoise`; its ``forward(x)`` returns logits (B, L).

    Attributes:
        temperature: tau, the temperature of the teacher loss.
        last_layer: the linear layer whose output is the logits.
    """

    temperature: float
    last_layer: nn.Linear

    def __call__(self, x: Any) -> Tensor:
        """Logits (B, L)."""

    def teacher_logits(self, x: Any, index: Index) -> Tensor:
        """Logits of the teacher (B, L), or of M teachers (M, B, L), for the samples `index`."""


def check_distilling(module: pl.LightningModule, callback: str) -> None:
    """Checks that a module implements `Distilling`.

    Raises:
        UserError: an attribute or method is missing or invalid; names the callback.
    """
    layer = getattr(module, "last_layer", None)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{callback} expected `{type(module).__name__}.last_layer` to be the nn.Linear that outputs the logits, "
            f"got {type(layer).__name__}. Set it in `__init__`, or define a property."
        )
    if not callable(getattr(module, "teacher_logits", None)):
        raise UserError(
            f"{callback} expected `{type(module).__name__}` to define `teacher_logits(x, index)`, which returns "
            "the teacher's logits (B, L), or (M, B, L) for M teachers."
        )
    temperature = getattr(module, "temperature", None)
    if not isinstance(temperature, int | float) or temperature <= 0:
        raise UserError(f"{callback} expected `{type(module).__name__}.temperature` to be > 0, got {temperature!r}.")


def label_key(module: pl.LightningModule) -> str:
    """Key of y in batches that are mappings: the attribute `labels` of a module, such as `Distillation`'s."""
    key = getattr(module, "labels", None)
    return key if isinstance(key, str) else "labels"


def distilling_loaders(
    trainer: pl.Trainer, module: pl.LightningModule, callback: str, *, indexed: bool = False
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation loader, yielding (x, y), of the data module with which a `Distilling` module is fitted.

    `indexed` states that the module trains on batches (x, y, index), which its hooks must then accept.

    Raises:
        UserError: the module is not `Distilling`; the data module or one of its loaders is missing; or the samples read
            are not those that the module is trained on.
    """
    check_distilling(module, callback)
    check_precision(str(trainer.precision))
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        raise UserError(
            f"{callback} reads the training part in its own order, so it expects a data module, got loaders. "
            "Fit with trainer.fit(module, datamodule=...)."
        )
    for name in LOADERS:
        if not is_overridden(name, datamodule, pl.LightningDataModule):
            raise UserError(f"{callback} expected `{type(datamodule).__name__}` to define `{name}()`.")
    with isolate_rng():
        names, key = (LOADERS[0], *LOADERS), label_key(module)
        again, train, val = (single_loader(getattr(datamodule, name)()) for name in names)
        pairs = paired(train, key)
        check_dataset(pairs, LOADERS[0])
        _check_same(again, train)
        for owner in (datamodule, module):
            check_hooks(owner, pairs if indexed else train, indexed=indexed)
    return pairs, paired(val, key, name=LOADERS[1])


def _check_same(first: DataLoader[Any], second: DataLoader[Any]) -> None:
    """Raises UserError if two training loaders of one data module return different samples for the same index."""
    samples: Any = first.dataset, second.dataset
    rows = spread(len(samples[1]))
    if len(samples[0]) == len(samples[1]):
        before, now = (stable_digests(dataset, rows) for dataset in samples)
        if not any(changed(before[row], now[row]) for row in rows):
            return
    raise UserError(
        f"Expected `{LOADERS[0]}()` to give the same samples at each call, got others, so the Trainer's are not those "
        f"that are measured. Where it splits or selects at random, seed it: random_split(dataset, lengths, {SEEDED})."
    )


def last_layers(student: nn.Module) -> list[nn.Linear]:
    """The linear layers of a student whose outputs sum to its logits.

    Raises:
        UserError: the student does not end with a linear layer.
    """
    if isinstance(student, Student):
        joined = student.join.project if student.join is not None and student.join.kind != "residual" else None
        ends = [student.head, joined[-1] if isinstance(joined, nn.Sequential) else joined]
        layers: Sequence[nn.Module] = [layer for layer in ends if layer is not None]
    else:
        layers = [layer for layer in student.modules() if isinstance(layer, nn.Linear)][-1:]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linear or len(linear) != len(layers):
        raise UserError(
            f"Expected the student to end with a linear layer, got {type(student).__name__}. Give it a head that is "
            "nn.Linear: its inputs are read."
        )
    return linear


def capture_last_layer(layers: Sequence[nn.Linear], run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Runs a student; returns the inputs (B, D) of its last layers, and its logits (B, L), both float32.

    The inputs of several layers are concatenated, with a column of ones for each bias.

    Raises:
        UserError: the outputs of the layers do not sum to the logits.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        ones = [args[0].new_ones(len(args[0]), 1)] if getattr(layer, "bias", None) is not None else []
        inputs.append(torch.cat([args[0], *ones], 1))
        outputs.append(output)

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        logits = run()
    finally:
        for hook in hooks:
            hook.remove()
    alike = len(outputs) == len(layers) and all(output.shape == logits.shape for output in outputs)
    if not alike or not torch.allclose(sum(outputs, torch.zeros(())), logits, rtol=1e-3, atol=1e-3):
        raise UserError(
            "Expected the output of the last linear layer to be the student's logits, got something else. "
            "Nothing may come after it, and it must run once."
        )
    return torch.cat(inputs, 1).float(), logits.float()
