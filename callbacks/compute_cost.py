"""Compute cost of any LightningModule: measured before the first step, accumulated in training and logged."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from bdistil.boosting.round import BoostingRound
from bdistil.callbacks.fit_state import FitState
from bdistil.errors import UserError
from bdistil.metrics.cost import Cost, latency_ms, measure_cost, training_macs
from bdistil.models.student import Student
from bdistil.reporting.round_tracker import logger_step
from bdistil.utils.trees import leaves_of, map_tensors


class ComputeCost(FitState):
    """Logs the cost of a forward pass of one sample before the first step, and the cost of training at its end.

    Keys: ``cost/macs``, ``params``, ``weight_bytes``, ``activation_bytes``, ``latency_ms``, as in
    `bdistil.metrics.cost`; then ``cost/train_macs`` and ``cost/seconds``, which include the time before a restart. They
    are also in ``trainer.callback_metrics``. Several callbacks in one Trainer log as ``cost/ATTRIBUTE/macs`` and so on,
    except for one without `attribute`.

    ``cost/train_macs`` counts three forward passes of the measured module per sample, the usual estimate of a step.
    Other networks that a step runs, such as the teacher of a `Distillation`, are not counted; samples that a
    distributed sampler repeats are, those of further training loaders are not.

    Args:
        inputs: positional arguments of the pass, used unchanged. Default: the first row of the module's
            ``example_input_array``, else of the first training batch, which is x or begins with x.
        attribute: dotted name of the submodule to measure, such as "student"; by default the whole module.
        uncounted: "error" raises for operators that cannot be counted, "record" omits them.
        latency: also time the pass.

    Raises:
        UserError: before the first step, for an uncountable operator, an unknown attribute, or missing inputs.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> cost = ComputeCost(latency=False)
        >>> Trainer(max_steps=2, barebones=True, accelerator="cpu", callbacks=[cost]).fit(BoringModel())
        >>> cost.cost.macs, cost.cost.params, cost.samples_seen  # a linear layer from 32 to 2, two batches of one
        (64, 66, 2)
    """

    def __init__(
        self,
        inputs: tuple[Any, ...] | Tensor | None = None,
        *,
        attribute: str | None = None,
        uncounted: Literal["error", "record"] = "error",
        latency: bool = True,
    ) -> None:
        self.inputs, self.attribute, self.uncounted, self.latency = inputs, attribute, uncounted, latency
        self.cost: Cost | None = None
        # Samples of all ranks; until the end of training an estimate from this rank.
        self.samples_seen, self.seconds = 0, 0.0
        self._rows, self._start = 1, 0.0  # samples in the measured pass; perf_counter() at `seconds` = 0

    @property
    def state_key(self) -> str:
        """Distinguishes instances that measure different submodules."""
        return f"ComputeCost[{self.attribute}]"

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"samples_seen": self.samples_seen, "seconds": self.seconds}

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts of a checkpoint."""
        self.samples_seen, self.seconds = state_dict["samples_seen"], state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses the linked student of a boosting round; says what the cost of the whole round includes."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or not (isinstance(pl_module, BoostingRound) and isinstance(pl_module.student, Student)):
            return
        there = "The RoundController logs the cost of each student, and writes it to curve.csv."
        if self.attribute == "student":
            raise UserError(
                "Expected `attribute` of ComputeCost beside RoundController to be a module that reads x alone, got "
                f"'student', which also reads earlier students. Leave the callback out. {there}"
            )
        if self.attribute is None:
            rank_zero_info(
                "ComputeCost beside RoundController also counts the parts of earlier students that a student reads, "
                f"which training takes from a cache. {there}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the counts unless the fit is resumed, as the instance may have been used in another fit."""
        if trainer.global_step == 0:
            self.samples_seen, self.seconds = 0, 0.0
        self.cost = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measures before the first step; not in `on_fit_start`, as the sanity check clears metrics logged there."""
        if self.cost is not None:
            return
        part = dict(pl_module.named_modules()).get(self.attribute or "")
        if part is None or type(part).forward is LightningModule.forward:
            there = [name for name, _ in pl_module.named_children()]
            raise UserError(f"ComputeCost(attribute={self.attribute!r}) names no module with a `forward` of {there}.")
        inputs = trainer.precision_plugin.convert_input(self._given(pl_module, batch))
        self._rows, self.cost = _rows(inputs), measure_cost(part, inputs, uncounted=self.uncounted)
        figures = {key: getattr(self.cost, key) for key in ("macs", "params", "weight_bytes", "activation_bytes")}
        if self.latency:
            with trainer.precision_plugin.forward_context():
                figures["latency_ms"] = latency_ms(part, inputs)
        self._log(trainer, figures)
        self._start = time.perf_counter() - self.seconds
        loaders = trainer.train_dataloader
        if isinstance(loaders, (dict, list, tuple)) and len(loaders) > 1:
            rank_zero_warn(
                f"ComputeCost counts the samples of the first of {len(loaders)} training loaders: `cost/train_macs` "
                "lacks those of the others."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the samples."""
        self.samples_seen += _rows(batch) * trainer.world_size
        self.seconds = time.perf_counter() - self._start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the cost of training, with the exact number of samples of all ranks."""
        total = trainer.strategy.reduce(torch.tensor(self.samples_seen, device=pl_module.device), reduce_op="sum")
        self.samples_seen = int(total) // trainer.world_size  # each rank multiplies its own count by the world size
        if self.cost is not None:
            self.seconds = time.perf_counter() - self._start
            macs = training_macs(student=self.cost.macs, samples_seen=self.samples_seen) // self._rows
            self._log(trainer, {"train_macs": macs, "seconds": self.seconds})

    def _log(self, trainer: Trainer, figures: dict[str, Any]) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        several = sum(isinstance(callback, ComputeCost) for callback in callbacks) > 1
        prefix = f"cost/{self.attribute}" if self.attribute and several else "cost"
        named = {f"{prefix}/{name}": value for name, value in figures.items()}
        metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}
        trainer.callback_metrics.update(metrics)
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.log_metrics(named, step=logger_step(trainer))

    def _given(self, pl_module: LightningModule, batch: Any) -> Any:
        x = pl_module.example_input_array if self.inputs is None else self.inputs
        if x is None:
            x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, (Tensor, tuple)):
            raise UserError(
                "ComputeCost has no input to measure with, as the batches do not begin with a tensor. Give one sample: "
                "ComputeCost(inputs=...), or the module's `example_input_array`."
            )
        if self.inputs is None:
            x = map_tensors(x, lambda leaf: leaf[:1] if leaf.dim() else leaf)
        return move_data_to_device(x if isinstance(x, tuple) else (x,), pl_module.device)


def _rows(batch: Any) -> int:
    """Number of samples in a batch: the rows of its first tensor."""
    rows = next((len(leaf) for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if rows is None:
        raise UserError(
            f"ComputeCost counts samples by the first tensor of a batch (B, ...), got a {type(batch).__name__} without "
            "one. Give batches as tensors in a tuple, a list or a dictionary."
        )
    return rows
