"""The callback that measures how noisy the gradient is, and says what distillation weight would help."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from bdistil.errors import UserError
from bdistil.noise_report import draw_noise, noise_figures
from bdistil.observing import view_of
from bdistil.probing import check_distilling, looking, prepared_loaders
from bdistil.rounds import BoostingRound
from bdistil.variance import (
    GradientMoments,
    Suggestion,
    control_cosine,
    gradient_moments,
    last_layer_moments,
    sample_gradients,
    suggest,
)


class GradientNoise(pl.Callback):
    """Measures the noise of the gradient now and then, from the last linear layer and without a backward pass.

    In distillation (`bdistil.probing.Distilling`) it compares label and teacher gradient, and suggests a distillation
    weight, which a `Distillation` of ``distillation_weight="auto"`` follows. In a boosting run it says how noisy the
    gradient of each round is, without the game (lambda = 0 of the curve) and with it (lambda = 1). A look changes no
    weight, buffer or random state.

    Args:
        every: epochs between two looks; there is one more at the end of a fit.
        samples: training samples of a look, spread evenly.
        full: looks at all parameters, by per-sample gradients, where the default looks at the last layer.
        cosine: also measures how far the teacher's loss is the control variate of the theory; needs a teacher of the
            student's architecture.
        lowest, highest: what a followed weight is clipped to.
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
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if every < 1 or samples < 2 or not 0 <= lowest <= highest <= 1:
            raise UserError(
                "Expected `every` >= 1, `samples` >= 2 and 0 <= `lowest` <= `highest` <= 1 of GradientNoise, "
                f"got {every}, {samples}, {lowest} and {highest}."
            )
        self.every, self.samples, self.full, self.cosine = every, samples, full, cosine
        self.lowest, self.highest, self.folder = lowest, highest, folder
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
            self._log(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A last look; leaves figures and picture."""
        moments, _ = self._log(trainer, pl_module, trainer.current_epoch)
        folder, title = Path(self.folder or Path(trainer.default_root_dir) / "noise"), "label gradient and teacher"
        name = "noise"
        if isinstance(pl_module, BoostingRound):
            folder, title = pl_module.ledger.folder.parents[1] / "noise", "without and with the game"
            name = f"noise.{pl_module.number:03d}"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(self.history, indent=1))
            draw_noise(folder / f"{name}.png", moments, title)

    def _log(self, trainer: pl.Trainer, module: Any, epoch: int) -> tuple[GradientMoments, Suggestion | None]:
        moments, entropy = self.look(module)
        boosting = isinstance(module, BoostingRound)
        figures: dict[str, Any] = noise_figures(moments, game=boosting) | {"label_loss": entropy}
        advice = None
        if not boosting:
            advice = suggest(moments, label_loss=entropy, highest=self.highest)
            figures["suggested_weight"] = self._follow(module, advice)
        if self.cosine:
            figures["cosine"] = self._cosine(module)
        for logger in trainer.loggers:
            logger.log_metrics({f"noise/{key}": value for key, value in figures.items()}, step=trainer.global_step)
        self.history.append({"epoch": epoch, **figures} | ({"reason": advice.reason} if advice else {}))
        return moments, advice

    def _follow(self, module: Any, advice: Suggestion) -> float:
        weight = max(advice.weight, self.lowest)
        follows = getattr(module, "distillation_weight", None) == "auto"
        if follows:
            module.weight = weight
        verb = "follows" if follows else "suggests"
        rank_zero_info(f"GradientNoise {verb} distillation weight {weight:.2f}: {advice.reason}.")
        return weight

    # ---- what it does

    def _batches(self) -> Any:
        """The same samples at every look, on every process."""
        count = min(self.samples, self.view.samples)
        rows = [i * self.view.samples // count for i in range(count)]
        return self.view.batches([rows[low : low + 512] for low in range(0, count, 512)])

    def look(self, module: pl.LightningModule) -> tuple[GradientMoments, float]:
        """Moments of the gradients as the module is, and the mean cross entropy of the labels.

        Args:
            module: in training.
        """
        with looking(module):
            seen = [self.view.noise(batch) for batch in self._batches()]
            entropy = sum(s.entropy * len(s.logits) for s in seen) / sum(len(s.logits) for s in seen)
            if self.full:
                return self._full(module), entropy
        activations, residuals = torch.cat([s.activations for s in seen]), torch.cat([s.residuals for s in seen], 1)
        return last_layer_moments(activations, residuals[0], residuals[1], self.view.samples), entropy

    def _full(self, module: Any) -> GradientMoments:
        found = []
        for x, y, index in self._batches():
            teacher = module.teacher_logits(x, index)
            teacher = teacher if teacher.ndim == 3 else teacher[None]
            pairs = [sample_gradients(module, x, y, z, temperature=module.temperature) for z in teacher]
            found.append((pairs[0][0], torch.stack([k for _, k in pairs]).mean(0)))
        labels, teachers = (torch.cat(part) for part in zip(*found, strict=True))
        return gradient_moments(labels, teachers, self.view.samples)

    def _cosine(self, module: Any) -> float:
        with looking(module):
            x, y, _ = next(iter(self._batches()))
            return control_cosine(module.student, module.teachers[0].module, x, y, temperature=module.temperature)
