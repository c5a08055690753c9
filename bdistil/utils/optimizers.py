"""Optimizers of Lightning modules: AdamW with a cosine schedule, schedule length, fused steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

Interval = Literal["epoch", "step"]


def adamw_cosine(
    parameters: Iterable[nn.Parameter], lr: float, length: int, interval: Interval = "epoch", **options: Any
) -> tuple[list[Optimizer], list[Any]]:
    """AdamW with a cosine schedule down to 0, in the form that Lightning's `configure_optimizers` returns.

    Args:
        parameters: parameters to train.
        lr: initial learning rate.
        length: number of intervals until the rate is 0; 0 or less for a constant rate.
        interval: unit of `length`.
        options: further arguments of AdamW.

    >>> (optimizer,), (schedule,) = adamw_cosine(nn.Linear(1, 1).parameters(), 0.4, 2)
    >>> optimizer.step(), schedule["scheduler"].step(), schedule["scheduler"].get_last_lr()
    (None, None, [0.2])
    """
    optimizer = AdamW(parameters, lr, **options)
    schedule = [{"scheduler": CosineAnnealingLR(optimizer, length), "interval": interval}] if length > 0 else []
    return [optimizer], schedule


def schedule_length(trainer: pl.Trainer) -> tuple[int, Interval]:
    """Length of a fit in epochs, or in steps where `max_steps` ends it; 0, with a warning, where neither does."""
    epochs, steps = trainer.max_epochs or 0, trainer.max_steps
    if steps > 0 and (epochs < 1 or trainer.estimated_stepping_batches == steps):
        return steps, "step"
    if epochs < 1:
        rank_zero_warn(
            "The learning rate stays constant: a cosine needs an end, and this Trainer has none. Give it `max_epochs` "
            "or `max_steps`."
        )
    return max(epochs, 0), "epoch"


def other_length(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> tuple[int, int] | None:
    """Lengths of the cosine in a checkpoint and of a fit that goes on with it, if they differ; not of a fast_dev_run.

    The schedule of the checkpoint is restored: past its end, its rate would rise again.
    """
    there = [int(state["T_max"]) for state in checkpoint.get("lr_schedulers", ()) if "T_max" in state]
    if not there or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    now, _ = schedule_length(trainer)
    return None if there[0] == now else (there[0], now)


def may_fuse(trainer: pl.Trainer, module: nn.Module) -> bool:
    """Whether a fused optimizer of a module's parameters may be used: they are real numbers.

    A gradient scaler (16-mixed) unscales outside the optimizer, which a fused step does not allow; Lightning does not
    clip gradients for a fused step in any mixed precision.
    """
    precision = str(trainer.precision)
    clipped = precision.endswith("-mixed") and trainer.gradient_clip_val
    return precision != "16-mixed" and not clipped and all(p.is_floating_point() for p in module.parameters())
