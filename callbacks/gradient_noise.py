"""Callback that measures the gradient noise and suggests a distillation weight."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from bdistil.boosting.round import BoostingRound
from bdistil.callbacks.fit_state import FitState
from bdistil.distillation.gradient_noise import (
    NoiseEstimate,
    check_full,
    draw_noise,
    estimate_noise,
    noise_figures,
    teacher_cosine,
)
from bdistil.distillation.last_layer import distilling_loaders
from bdistil.distillation.module import Distillation
from bdistil.distillation.probes import probe_of
from bdistil.errors import UserError
from bdistil.functional.gradient_noise import USUAL_STEP, GradientMoments, Suggestion, suggest
from bdistil.reporting.round_tracker import logger_step
from bdistil.storage.files import write_atomically
from bdistil.utils import distributed


class GradientNoise(FitState):
    """Measures the gradient noise every few epochs, from the last linear layer and without a backward pass.

    In distillation (`bdistil.distillation.Distilling`) it compares label and teacher gradient, and suggests a
    distillation weight, which a `Distillation` with ``distillation_weight="auto"`` uses. In a boosting run it reports
    the gradient noise of each round: of the squared error alone (lambda = 0 of the curve), and of the round's loss, the
    game by default (lambda = 1). A measurement changes no weight, buffer or random state.

    Args:
        every: epochs between two measurements; a last one follows at the end of the fit.
        samples: training samples per measurement, evenly spread.
        full: uses per-sample gradients of all parameters, instead of the last layer only. Beside another callback for
            the last layer, its keys and files begin with ``noise_full``.
        cosine: also measures how well the teacher's loss matches the control variate of the theory; requires a teacher
            with the student's architecture.
        lowest: lower bound of the suggested weight.
        highest: upper bound of the suggested weight.
        step: step size of the theory, for SGD the learning rate times ``pull_curvature`` over the batch size.
        folder: folder of ``noise.json`` and ``noise.png``; ``noise`` in the Trainer's default_root_dir by default. In a
            boosting run it is ``noise`` in the run directory.

    Raises:
        UserError: an argument is out of its range; `full` or `cosine` is set in a boosting run; or the module or its
            data do not meet the requirements.

    Example:
        >>> import lightning, tempfile, torch
        >>> from torch import nn
        >>> from bdistil.distillation import Distillation
        >>> part = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
        >>> class Data(lightning.LightningDataModule):
        ...     def train_dataloader(self):
        ...         return torch.utils.data.DataLoader(part, batch_size=16)
        ...     val_dataloader = train_dataloader
        >>> noise = GradientNoise(every=1, folder=tempfile.mkdtemp())
        >>> options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = lightning.Trainer(max_epochs=2, callbacks=[noise], enable_model_summary=False, **options)
        >>> trainer.fit(Distillation(nn.Linear(4, 3), nn.Linear(4, 3), distillation_weight="auto"), datamodule=Data())
        >>> [row["epoch"] for row in noise.history]
        [0, 1, 2]
        >>> 0 <= noise.history[-1]["suggested_weight"] <= 0.9
        True
    """

    def __init__(
        self,
        every: int = 5,
        samples: int = 512,
        full: bool = False,
        cosine: bool = False,
        lowest: float = 0.0,
        highest: float = 0.9,
        step: float = USUAL_STEP,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if every < 1 or samples < 2 or not 0 <= lowest <= highest <= 1 or step <= 0:
            raise UserError(
                "Expected `every` >= 1, `samples` >= 2, 0 <= `lowest` <= `highest` <= 1 and `step` > 0 of "
                f"GradientNoise, got {every}, {samples}, {lowest}, {highest} and {step}."
            )
        self.every, self.samples, self.full, self.cosine = every, samples, full, cosine
        self.lowest, self.highest, self.step, self.folder = lowest, highest, step, folder
        self.history: list[dict[str, Any]] = []
        self._loaders: Any = None
        self._name = "noise"  # of keys and files
        self._written = False

    @property
    def state_key(self) -> str:
        """Distinguishes two instances in one fit, one for the last layer and one for all parameters."""
        return f"GradientNoise[every={self.every},full={self.full}]"

    def state_dict(self) -> dict[str, Any]:
        """The figures measured so far."""
        return {"history": self.history}

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Restores the figures measured so far."""
        self.history = list(state_dict["history"])

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks module and data."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.history = []  # discards an earlier fit; a checkpoint of this one is loaded later
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        several = sum(isinstance(callback, GradientNoise) for callback in callbacks) > 1
        self._name, self._written = "noise_full" if self.full and several else "noise", False
        if not isinstance(pl_module, BoostingRound):
            self._loaders = distilling_loaders(trainer, pl_module, "GradientNoise")
            if self.cosine and not isinstance(pl_module, Distillation):
                raise UserError(
                    "Expected `cosine` of GradientNoise to be off, or a bdistil.distillation.Distillation, with whose "
                    f"teacher it compares, got a {type(pl_module).__name__}."
                )
        elif self.full or self.cosine:
            raise UserError(
                "Expected `full` and `cosine` of GradientNoise to be off in a boosting run, got one of them on."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the probe; checks that torch can compute the requested gradients."""
        with isolate_rng():
            self.probe = probe_of(pl_module, self._loaders)
            if self.full or self.cosine:
                check_full(self.probe, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures every few epochs, on the samples of this epoch."""
        if trainer.current_epoch % self.every:
            return
        reloads = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if reloads and not isinstance(pl_module, BoostingRound):
            with isolate_rng():
                self._loaders = distilling_loaders(trainer, pl_module, "GradientNoise")
                self.probe = probe_of(pl_module, self._loaders)
        self._measure_and_log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures once more; writes figures and picture."""
        self._write(trainer, pl_module, self._measure_and_log(trainer, pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the figures of a fit that was resumed after its end: `on_train_end` is not called then."""
        if not self._written and self.history:
            self._write(trainer, pl_module, None)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, moments: GradientMoments | None) -> None:
        """Writes the figures, and the picture of the last measurement, if any, to the folder."""
        self._written = True
        folder, name = Path(self.folder or Path(trainer.default_root_dir) / "noise").expanduser(), self._name
        title, mixed = "label gradient and teacher", "0: labels, 1: teacher"
        if isinstance(pl_module, BoostingRound):
            folder, name = pl_module.run_dir / "noise", f"noise.{pl_module.number:03d}"
            title, mixed = "squared error and loss of the round", "0: squared error, 1: loss of the round"
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{key: _plain(value) for key, value in row.items()} for row in self.history]
            write_atomically(folder / f"{name}.json", json.dumps(rows, indent=1, allow_nan=False))
            if moments is not None:
                draw_noise(folder / f"{name}.png", moments, title, mixed)

    # ---- measurements

    def measure(self, module: pl.LightningModule) -> NoiseEstimate:
        """Measures the gradient noise of the module in training."""
        return estimate_noise(self.probe, module, self.samples, full=self.full)

    def set_weight(self, module: Any, suggestion: Suggestion) -> float:
        """Clips the suggested weight, sets it if the module's ``distillation_weight`` is "auto", and returns it."""
        own = max(suggestion.weight, self.lowest)
        weight = float(distributed.from_first(own))  # statistics of batch norm differ between processes
        follows = getattr(module, "distillation_weight", None) == "auto"
        if follows:
            module.weight = weight
        verb = "sets" if follows else "suggests"
        rank_zero_info(f"GradientNoise {verb} distillation weight {weight:.2f}: {suggestion.reason}.")
        return weight

    def _measure_and_log(self, trainer: pl.Trainer, module: pl.LightningModule) -> GradientMoments:
        estimate = self.measure(module)
        figures: dict[str, Any] = noise_figures(estimate)
        if estimate.curvature is not None and math.isnan(estimate.entropy):
            raise UserError(
                "Expected labels, without which no distillation weight can be suggested, got none in the samples that "
                "GradientNoise measures. Give `distillation_weight` as a number, and leave GradientNoise out."
            )
        if estimate.curvature is not None:
            advice = suggest(estimate.moments, label_loss=estimate.entropy, step=self.step, highest=self.highest)
            figures |= {"suggested_weight": self.set_weight(module, advice), "reason": advice.reason}
        if self.cosine:
            figures["cosine"] = teacher_cosine(self.probe, module, self.samples)
        row = {f"{self._name}/{key}": value for key, value in figures.items() if key != "reason"}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=logger_step(trainer))
        self.history.append({"epoch": trainer.current_epoch, **figures})
        return estimate.moments


def _plain(value: Any) -> Any:
    """Replaces NaN and infinity by None, as JSON does not support them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
