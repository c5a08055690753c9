"""Gradient noise in figures and in a picture."""

from __future__ import annotations

import os

from bdistil.functional.gradient_noise import (
    STEPS,
    GradientMoments,
    best_weight,
    explained_share,
    least_variance_weight,
    noise_to_signal,
    variance_at,
)
from bdistil.noise_look import Look

POINTS = [i / 50 for i in range(51)]


def noise_figures(seen: Look) -> dict[str, float]:
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
