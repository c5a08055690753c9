"""Measurement of the gradient noise of a module in training, as numbers and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from bdistil.distillation.probes import Batch, Probe, RoundProbe
from bdistil.errors import UserError
from bdistil.functional.gradient_noise import (
    REPORTED_STEPS,
    GradientMoments,
    best_weight,
    explained_share,
    gradient_moments,
    last_layer_moments,
    least_variance_weight,
    noise_to_signal,
    pull_curvature,
    variance_at,
)
from bdistil.functional.sample_gradients import control_cosine, sample_gradients
from bdistil.utils.drawing import default_style
from bdistil.utils.modules import eval_mode

CHUNK = 512  # samples per forward pass


class NoiseEstimate(NamedTuple):
    """One measurement of the gradient noise.

    Attributes:
        moments: moments of label and teacher gradient; in a boosting round, of the squared error and the round's loss.
        entropy: mean cross entropy to the labels.
        curvature: mu of the last layer in the direction of the teacher's pull; None in a boosting round.
    """

    moments: GradientMoments
    entropy: float
    curvature: float | None


def spread_batches(probe: Probe, samples: int) -> Iterator[Batch]:
    """Batches of up to `samples` evenly spaced training samples, the same at every call and on every process."""
    count = min(samples, len(probe.rows))
    rows = [probe.rows[i * len(probe.rows) // count] for i in range(count)]
    return probe.batches([rows[low : low + CHUNK] for low in range(0, count, CHUNK)])


def estimate_noise(probe: Probe, module: Any, samples: int, *, full: bool = False) -> NoiseEstimate:
    """Measures the gradient noise; changes no weight, buffer, mode or random state of the module.

    Args:
        probe: probe of the module.
        module: module in training.
        samples: maximum number of training samples to measure on.
        full: use per-sample gradients of all parameters; otherwise of the last layer, without a backward pass.
    """
    population = len(probe.rows)
    with eval_mode(module), torch.no_grad(), isolate_rng():
        seen = [probe.noise(batch) for batch in spread_batches(probe, samples)]
        # On the CPU, as the moments are in float64, which not all devices support.
        activations, logits = torch.cat([s.activations for s in seen]).cpu(), torch.cat([s.logits for s in seen]).cpu()
        g, k = torch.cat([s.residuals for s in seen], 1).cpu()
        labelled = sum(s.labelled for s in seen)
        entropy = sum(s.entropy * s.labelled for s in seen if s.labelled) / labelled if labelled else math.nan
        curvature = None if isinstance(probe, RoundProbe) else pull_curvature(activations, logits, g, k)
        if not full:
            return NoiseEstimate(last_layer_moments(activations, g, k, population), entropy, curvature)
        gradients = []
        for x, y, index in spread_batches(probe, samples):
            teachers = module.teacher_logits(x, index)
            teachers = teachers if teachers.ndim == 3 else teachers[None]
            pairs = [sample_gradients(module, x, y, z, temperature=module.temperature) for z in teachers]
            gradients.append((pairs[0][0], torch.stack([k for _, k in pairs]).mean(0)))
        labels, pulls = (torch.cat(part).cpu() for part in zip(*gradients, strict=True))
        return NoiseEstimate(gradient_moments(labels, pulls, population), entropy, curvature)


def teacher_cosine(probe: Probe, module: pl.LightningModule, samples: int) -> float:
    """`control_cosine` of a `Distillation` and its first teacher, on the first batch of a measurement."""
    owner: Any = module
    with eval_mode(module), torch.no_grad(), isolate_rng():
        x, y, _ = next(spread_batches(probe, samples))
        return control_cosine(owner.student, owner.teachers[0].module, x, y, temperature=owner.temperature)


def check_full(probe: Probe, module: pl.LightningModule) -> None:
    """Tries per-sample gradients of all parameters on two samples.

    Raises:
        UserError: torch cannot compute them.
    """
    with eval_mode(module), torch.no_grad():
        x, y, _ = next(spread_batches(probe, 2))
        try:
            sample_gradients(module, x, y, torch.zeros_like(module(x)), temperature=1.0)
        except Exception as error:
            raise UserError(
                "Expected `full` and `cosine` of GradientNoise to be off where torch.func.vmap gives no gradient of a "
                f"sample (nn.GRU, nn.RNN), got {type(error).__name__}: {error}. Leave them out: the last layer is "
                "measured."
            ) from error


def noise_figures(estimate: NoiseEstimate) -> dict[str, float]:
    """Scalars of a measurement by name, for logging; in a boosting round, of the squared error and the round's loss."""
    moments, figures = estimate.moments, {"label_loss": estimate.entropy}
    if estimate.curvature is None:
        for name, weight in (("plain", 0.0), ("game", 1.0)):
            figures[f"variance_{name}"] = variance_at(moments, weight)
            figures[f"nsr_{name}"] = noise_to_signal(moments, weight)
        return figures
    return figures | {
        **dict(zip(("v_gg", "v_kk", "v_gk"), moments.variance, strict=True)),
        "nsr_labels": noise_to_signal(moments, 0.0),
        "nsr_teacher": noise_to_signal(moments, 1.0),
        "least_variance_weight": least_variance_weight(moments),
        "explained": explained_share(moments),
        "pull_curvature": estimate.curvature,
        **{f"best_weight_{step:g}": best_weight(moments, step) for step in REPORTED_STEPS},
    }


@default_style()
def draw_noise(path: str | os.PathLike[str], moments: GradientMoments, title: str, mixed: str) -> None:
    """Draws the noise-to-signal ratio and the variance over lambda; infinite ratios leave a gap in the line.

    Args:
        path: the PNG.
        moments: moments of the two gradients.
        title: title of the picture.
        mixed: what lambda = 0 and lambda = 1 are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8))
    left, right = figure.subplots(1, 2)
    # An automatic layout would draw the figure twice.
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.18, top=0.89, wspace=0.32)
    weights = np.linspace(0, 1, 51).tolist()
    left.plot(weights, [noise_to_signal(moments, weight) for weight in weights])
    left.set(xlabel=f"λ ({mixed})", ylabel="noise to signal of one sample", title=title)
    right.plot(weights, [variance_at(moments, weight) for weight in weights])
    right.axvline(least_variance_weight(moments), linestyle=":", color="grey", label="least variance")
    right.legend(frameon=False)
    right.set(xlabel=f"λ ({mixed})", ylabel="variance", title=f"R² = {explained_share(moments):.2f}")
    figure.savefig(path, dpi=90)
