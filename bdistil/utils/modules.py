"""Eval mode of a module, and the optimizer of a student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode; afterwards each of its submodules has the mode it had before.

    >>> network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with eval_mode(network):
    ...     [part.training for part in network]
    [False, False]
    >>> [part.training for part in network]
    [True, False]
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode  # not train(mode): it sets the submodules as well


def adamw_cosine(
    parameters: Iterable[nn.Parameter], lr: float, steps: int, **options: Any
) -> tuple[list[Optimizer], list[LRScheduler]]:
    """AdamW with a rate that falls to 0 on a cosine, as `configure_optimizers` of Lightning returns them.

    Args:
        parameters: parameters to train.
        lr: first learning rate.
        steps: steps of the schedule; 0 or less for a constant rate.
        options: further arguments of AdamW.

    >>> (optimizer,), (schedule,) = adamw_cosine(nn.Linear(1, 1).parameters(), 0.4, steps=2)
    >>> optimizer.step(), schedule.step(), schedule.get_last_lr()
    (None, None, [0.2])
    """
    optimizer = AdamW(parameters, lr, **options)
    return [optimizer], [CosineAnnealingLR(optimizer, steps)] if steps > 0 else []
