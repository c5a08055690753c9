"""One look at how noisy the gradient of a training is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from bdistil.distillation.last_layer import eval_no_grad
from bdistil.distillation.probes import Batch, RoundView, View
from bdistil.functional.gradient_noise import (
    STEPS,
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

CHUNK = 512


class NoiseEstimate(NamedTuple):
    """What is seen.

    Attributes:
        moments: of label and teacher gradient; of a round, of its gradient without the game and with it.
        entropy: mean cross entropy of the labels.
        curvature: mu in the direction of the teacher's pull, of the last layer; None of a round.
    """

    moments: GradientMoments
    entropy: float
    curvature: float | None


def spread_batches(view: View, samples: int) -> Iterator[Batch]:
    """The same training samples at every look and on every process, evenly spread."""
    count = min(samples, view.samples)
    rows = [i * view.samples // count for i in range(count)]
    return view.batches([rows[low : low + CHUNK] for low in range(0, count, CHUNK)])


def look(view: View, module: pl.LightningModule, samples: int, *, full: bool = False) -> NoiseEstimate:
    """Looks at a module in training; changes no weight, buffer or random state of it.

    Args:
        view: of the module.
        module: in training.
        samples: training samples that are looked at, at most.
        full: at all parameters, by per-sample gradients; else at the last layer, without a backward pass.
    """
    with eval_no_grad(module):
        seen = [view.noise(batch) for batch in spread_batches(view, samples)]
        activations, logits = torch.cat([s.activations for s in seen]), torch.cat([s.logits for s in seen])
        g, k = torch.cat([s.residuals for s in seen], 1)
        entropy = sum(s.entropy * len(s.logits) for s in seen) / len(logits)
        curvature = None if isinstance(view, RoundView) else pull_curvature(activations, logits, g, k)
        moments = _full(view, module, samples) if full else last_layer_moments(activations, g, k, view.samples)
    return NoiseEstimate(moments, entropy, curvature)


def _full(view: View, module: Any, samples: int) -> GradientMoments:
    found = []
    for x, y, index in spread_batches(view, samples):
        teacher = module.teacher_logits(x, index)
        teacher = teacher if teacher.ndim == 3 else teacher[None]
        pairs = [sample_gradients(module, x, y, z, temperature=module.temperature) for z in teacher]
        found.append((pairs[0][0], torch.stack([k for _, k in pairs]).mean(0)))
    labels, teachers = (torch.cat(part) for part in zip(*found, strict=True))
    return gradient_moments(labels, teachers, view.samples)


def cosine_of(view: View, module: Any, samples: int) -> float:
    """`control_cosine` of a `Distillation` and its first teacher, on the first of the samples that are looked at."""
    with eval_no_grad(module):
        x, y, _ = next(spread_batches(view, samples))
        return control_cosine(module.student, module.teachers[0].module, x, y, temperature=module.temperature)


POINTS = [i / 50 for i in range(51)]


def noise_figures(seen: NoiseEstimate) -> dict[str, float]:
    """What is logged of a look; of a round, the noise without the game and with it."""
    moments, figures = seen.moments, {"label_loss": seen.entropy}
    if seen.curvature is None:
        for name, weight in (("plain", 0.0), ("game", 1.0)):
            figures[f"variance_{name}"] = variance_at(moments, weight)
            figures[f"nsr_{name}"] = noise_to_signal(moments, weight)
        return figures
    return figures | {
        **moments.plain(),
        "nsr_labels": noise_to_signal(moments, 0.0),
        "nsr_teacher": noise_to_signal(moments, 1.0),
        "least_variance_weight": least_variance_weight(moments),
        "explained": explained_share(moments),
        "pull_curvature": seen.curvature,
        **{f"best_weight_{step:g}": best_weight(moments, step) for step in STEPS},
    }


def draw_noise(path: str | os.PathLike[str], moments: GradientMoments, title: str) -> None:
    """Draws noise to signal, and the variance, over lambda; where the signal is lost there is no line.

    Args:
        path: of the PNG.
        moments: of the two gradients.
        title: says which they are.
    """
    from matplotlib.figure import Figure

    # Margins by hand: to find them, matplotlib draws everything twice.
    figure = Figure(figsize=(7, 2.8))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.18, top=0.89, wspace=0.32)
    left.plot(POINTS, [noise_to_signal(moments, weight) for weight in POINTS])
    left.set(xlabel="λ", ylabel="noise to signal of one sample", title=title)
    right.plot(POINTS, [variance_at(moments, weight) for weight in POINTS])
    right.axvline(least_variance_weight(moments), linestyle=":", color="grey")
    right.set(xlabel="λ", ylabel="variance", title=f"R² = {explained_share(moments):.2f}")
    figure.savefig(path, dpi=90)
