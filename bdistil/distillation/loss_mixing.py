"""Updates, targets and reports of per-sample loss mixing; the formulas are in `bdistil.functional.loss_mixing`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import Index
from bdistil.distillation.probes import Probe
from bdistil.errors import UserError
from bdistil.functional.boosting import log_normaliser
from bdistil.functional.loss_mixing import MixingSettings, label_target, learn_mix, mixed_target, outer_loss
from bdistil.storage.files import atomic
from bdistil.utils import distributed
from bdistil.utils.drawing import default_style
from bdistil.utils.seeding import seed_of

# ---- updates


def update_mix(probe: Probe, mix: Tensor, settings: MixingSettings, *, lr: float, key: tuple[int, ...]) -> Tensor:
    """Updates the mixing parameters (N, C) of all samples; returns them on the CPU, the same on every process.

    The samples are shuffled into groups of 512, so that every group mixes the classes. The groups, and therefore the
    learned weights, do not depend on the number of processes.

    Args:
        probe: probe of a module in eval mode.
        mix: current mixing parameters, (N, C) on the CPU.
        settings: settings of the update.
        lr: learning rate of the student.
        key: seed of the shuffling.
    """
    rows = torch.tensor(probe.rows)
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed_of(*key)))].tolist()
    groups = [order[low:high] for low, high in distributed.my_blocks(len(rows), BLOCK)]
    validation, learned = probe.validation(), torch.zeros_like(mix)
    for batch in probe.batches(groups):
        seen, target, index = probe.mixing(batch), batch[1], torch.as_tensor(batch[2])
        outer = outer_loss(validation, probe.outer(seen.activations, seen.logits, target), settings.share)
        before = mix[index].to(seen.logits.device)
        learned[index] = learn_mix(before, seen.residuals, seen.activations, outer, settings, lr).float().cpu()
    learned = distributed.all_sum(learned)  # every process has updated different samples
    return mix.index_copy(0, rows, learned[rows])


# ---- files


def save_mix(path: Path, mix: Tensor) -> None:
    """Writes the mixing parameters (N, C) of all samples as little-endian float32, on process 0."""
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            mix.numpy().astype("<f4").tofile(temporary)


def read_mix(path: Path) -> Tensor | None:
    """Reads the latest mixing parameters of a round before that of `path`, flat; None if there are none."""
    earlier = [file for file in sorted(path.parent.glob("mixing.*.f32")) if file.name < path.name]
    return torch.from_numpy(np.fromfile(earlier[-1], "<f4")) if earlier else None


# ---- the target of a boosting round


def check_boosting(boosting: BoostingSettings, settings: MixingSettings) -> None:
    """Checks that the target of a boosting run can be a mix of label and teacher.

    Raises:
        UserError: the weights do not sum to 1, the task is not classification, or the students are independent.
    """
    if settings.mode != "convex":
        raise UserError(
            "Expected `mode` of the mixing settings to be 'convex' in a boosting run, whose target is a mix of "
            f"label and teacher, got {settings.mode!r}."
        )
    if boosting.task != "classification":
        raise UserError(f"Expected a classification beside LossMixing, got a boosting run with task={boosting.task!r}.")
    if boosting.independent:
        raise UserError(
            "Expected boosting beside LossMixing, which mixes labels into the error that a round corrects, got "
            "independent=True."
        )
    if boosting.labels is None:
        raise UserError("Expected labels beside LossMixing, which mixes them in, got a run with labels=None.")


def mix_round(module: BoostingRound, mix: Tensor, all_labels: Tensor) -> None:
    """Mixes the labels into target and running error of a round; recomputes log Z in one pass over its open ledger.

    `mix` is the teacher's share of each sample, (N, 1), and `all_labels` are (N,), both on the CPU.
    """

    def mixed(target: Tensor, error: Tensor, labels: Tensor, index: Index) -> tuple[Tensor, Tensor]:
        share = mix[torch.as_tensor(index), 0].to(target.device)
        return mixed_target(target, error, label_target(labels, target.shape[1]), share, module.number)

    ledger, total = module.ledger, torch.full((module.ledger.outputs,), -torch.inf, dtype=torch.float64)
    for low in range(0, ledger.samples, 8 * BLOCK):
        index = np.arange(low, min(low + 8 * BLOCK, ledger.samples))
        _, error = mixed(*ledger.rows(index), all_labels[index], index)
        total = torch.logaddexp(total, log_normaliser(error.double(), module.settings.eta))
    module.start(replace(module.game, log_z=total.float().to(module.device)))
    module.mix = mixed


# ---- reports


def weight_figures(weights: Tensor, flipped: Tensor | None = None) -> dict[str, float]:
    """Mean `label_weight` and `teacher_weight` of weights (N, K), whose first column is that of the labels.

    With `flipped`, (N,) bool, also the mean label weight of `clean` and `flipped` samples, and `auc`, the area under
    the ROC curve for detecting flipped labels by a low label weight.
    """
    from torchmetrics.functional.classification import binary_auroc

    labels = weights[:, 0]
    figures = {"label_weight": float(labels.mean()), "teacher_weight": float(weights[:, 1:].mean())}
    if flipped is not None and flipped.any():
        figures["clean"], figures["flipped"] = float(labels[~flipped].mean()), float(labels[flipped].mean())
        figures["auc"] = float(binary_auroc(1.0 - labels / labels.max().clamp_min(1e-12), flipped.long()))
    return figures


def log_weights(loggers: Iterable[Any], weights: Tensor, figures: Mapping[str, float], step: int) -> None:
    """Logs `weight_figures`, and a histogram of the label weights if the logger supports it (W&B, TensorBoard)."""
    labels = weights[:, 0].numpy()
    for logger in loggers:
        row: dict[str, Any] = {f"mixing/{key}": value for key, value in figures.items()}
        if "wandb" in sys.modules and isinstance(logger, WandbLogger):
            row["mixing/histogram"] = sys.modules["wandb"].Histogram(np_histogram=np.histogram(labels, 20))
        elif hasattr(getattr(logger, "experiment", None), "add_histogram"):
            logger.experiment.add_histogram("mixing/histogram", labels, step)
        logger.log_metrics(row, step=step)


@default_style()
def draw_weights(path: str | os.PathLike[str], weights: Tensor, flipped: Tensor | None = None) -> None:
    """Draws a histogram of the label weights; with `flipped`, one each for clean and flipped samples."""
    from matplotlib.figure import Figure

    labels = weights[:, 0]
    groups = {"all samples": labels}
    if flipped is not None and flipped.any():
        groups = {"clean labels": labels[~flipped], "flipped labels": labels[flipped]}
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.17, top=0.96)  # an automatic layout draws the figure twice
    bins = np.linspace(0, float(labels.max()), 31).tolist()
    for name, values in groups.items():
        axes.hist(values.numpy(), bins=bins, alpha=0.6, label=f"{name} ({len(values):,})")
    axes.set(xlabel="weight of the label in the loss of a sample", ylabel="samples")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)
