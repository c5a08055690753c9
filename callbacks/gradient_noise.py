"""The callback that measures how noisy the gradient is, and says what distillation weight would help."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from bdistil.boosting.round import BoostingRound
from bdistil.distillation.gradient_noise import NoiseEstimate, cosine_of, draw_noise, look, noise_figures
from bdistil.distillation.last_layer import check_distilling, prepared_loaders
from bdistil.distillation.probes import view_of
from bdistil.errors import UserError
from bdistil.functional.gradient_noise import USUAL_STEP, GradientMoments, Suggestion, suggest
from bdistil.reporting.curve_tracker import shown_step


class GradientNoise(pl.Callback):
    """Measures the noise of the gradient now and then, from the last linear layer and without a backward pass.

    In distillation (`distillation.last_layer.Distilling`) it compares label and teacher gradient, and suggests a
    distillation weight, which a `Distillation` of ``distillation_weight="auto"`` follows. In a boosting run it reports
    the gradient noise of each round, without the game (lambda = 0 of the curve) and with it (lambda = 1). Measuring
    changes no weight, buffer or random state.

    Args:
        every: epochs between two looks; there is one more at the end of a fit.
        samples: training samples of a look, spread evenly.
        full: looks at all parameters, by per-sample gradients, where the default looks at the last layer.
        cosine: also measures how far the teacher's loss is the control variate of the theory; needs a teacher of the
            student's architecture.
        lowest, highest: what a followed weight is clipped to.
        step: of the theory, for SGD the learning rate times ``pull_curvature`` over the batch size; the suggestion is
            made for it.
        folder: of ``noise.json`` and ``noise.png``; ``noise`` in the Trainer's default_root_dir by default. A boosting
            run has its own.
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

    @property
    def state_key(self) -> str:
        """Two instances may look at the last layer and at all parameters."""
        return f"GradientNoise[every={self.every},full={self.full}]"

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them."""
        self.history = list(state_dict["history"])

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Proves that module and data offer what is needed."""
        if stage != "fit":
            return
        if not isinstance(pl_module, BoostingRound):
            check_distilling(pl_module, "GradientNoise")
            self._loaders = prepared_loaders(trainer, "GradientNoise")
        elif self.full or self.cosine:
            raise UserError(
                "Expected `full` and `cosine` of GradientNoise to be off in a boosting run, got one of them on."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the view."""
        self.view = view_of(pl_module, getattr(self, "_loaders", (None, None)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks, where it is time."""
        if trainer.current_epoch % self.every == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A last look; leaves figures and picture."""
        moments = self._look(trainer, pl_module)
        folder, name = Path(self.folder or Path(trainer.default_root_dir) / "noise"), "noise"
        title = "label gradient and teacher"
        if isinstance(pl_module, BoostingRound):
            folder, name = pl_module.run_dir / "noise", f"noise.{pl_module.number:03d}"
            title = "without and with the game"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(self.history, indent=1))
            draw_noise(folder / f"{name}.png", moments, title)

    # ---- what it does

    def _look(self, trainer: pl.Trainer, module: Any) -> GradientMoments:
        """Looks, logs the figures, and says what weight would help."""
        seen = self.look(module)
        figures: dict[str, Any] = noise_figures(seen)
        if seen.curvature is not None:
            advice = suggest(seen.moments, label_loss=seen.entropy, step=self.step, highest=self.highest)
            figures |= {"suggested_weight": self._follow(module, advice), "reason": advice.reason}
        if self.cosine:
            figures["cosine"] = cosine_of(self.view, module, self.samples)
        shown = {f"noise/{key}": value for key, value in figures.items() if key != "reason"}
        for logger in trainer.loggers:
            logger.log_metrics(shown, step=shown_step(trainer))
        self.history.append({"epoch": trainer.current_epoch, **figures})
        return seen.moments

    def look(self, module: pl.LightningModule) -> NoiseEstimate:
        """What is seen of a module in training."""
        return look(self.view, module, self.samples, full=self.full)

    def _follow(self, module: Any, advice: Suggestion) -> float:
        weight = max(advice.weight, self.lowest)
        follows = getattr(module, "distillation_weight", None) == "auto"
        if follows:
            module.weight = weight
        verb = "follows" if follows else "suggests"
        rank_zero_info(f"GradientNoise {verb} distillation weight {weight:.2f}: {advice.reason}.")
        return weight
