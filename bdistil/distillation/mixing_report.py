"""What mixing has learned, in figures and in a picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


def weight_figures(weights: Tensor, flipped: Tensor | None = None) -> dict[str, float]:
    """Mean weights of labels and teachers; where it is known which labels are wrong, how well the weights tell.

    Args:
        weights: (N, K), the labels' first.
        flipped: (N,) bool.

    Returns:
        `label_weight` and `teacher_weight`; with `flipped`, the label weight of `clean` and of `flipped` samples, and
        `auc`, the area under the ROC curve with which a low label weight finds the flipped ones.
    """
    figures = {"label_weight": float(weights[:, 0].mean()), "teacher_weight": float(weights[:, 1:].mean())}
    if flipped is None or not bool(flipped.any()):
        return figures
    trust = weights[:, 0]
    return figures | {
        "clean": float(trust[~flipped].mean()),
        "flipped": float(trust[flipped].mean()),
        "auc": float(binary_auroc(1.0 - trust / trust.max().clamp_min(1e-12), flipped.long())),
    }


def log_weights(loggers: Iterable[Any], weights: Tensor, figures: Mapping[str, float], step: int) -> None:
    """Gives figures to all loggers, and the label weights of all samples to those that have histograms.

    Args:
        loggers: of a Trainer; W&B and TensorBoard have histograms.
        weights: (N, K), the labels' first.
        figures: of `weight_figures`.
        step: of the row.
    """
    trust = weights[:, 0].numpy()
    for logger in loggers:
        shown: dict[str, Any] = {f"mixing/{key}": value for key, value in figures.items()}
        if "wandb" in sys.modules and isinstance(logger, WandbLogger):
            shown["mixing/histogram"] = sys.modules["wandb"].Histogram(np_histogram=np.histogram(trust, 20))
        elif hasattr(getattr(logger, "experiment", None), "add_histogram"):
            logger.experiment.add_histogram("mixing/histogram", trust, step)
        logger.log_metrics(shown, step=step)


def draw_weights(path: str | os.PathLike[str], weights: Tensor, flipped: Tensor | None = None) -> None:
    """Draws how the label weight is distributed, over clean and flipped samples where it is known.

    Args:
        path: of the PNG.
        weights: (N, K), the labels' first.
        flipped: (N,) bool.
    """
    from matplotlib.figure import Figure

    trust = weights[:, 0]
    groups = {"all samples": trust}
    if flipped is not None and bool(flipped.any()):
        groups = {"clean labels": trust[~flipped], "flipped labels": trust[flipped]}
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.17, top=0.96)  # to find them takes as long as to draw
    for name, values in groups.items():
        axes.hist(
            values.numpy(),
            bins=np.linspace(0, float(trust.max()), 31).tolist(),
            alpha=0.6,
            label=f"{name} ({len(values):,})",
        )
    axes.set(xlabel="weight of the label in the loss of a sample", ylabel="samples")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)
