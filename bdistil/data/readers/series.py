"""Arithmetic on time series (steps, C) of unequal length: standardise, pad, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moments(series: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all steps of some series, both (C,).

    A channel that does not move has the deviation 1, so that to divide by it is safe.
    """
    steps = torch.cat(tuple(series)).double()
    spread = steps.std(0, correction=0)
    return steps.mean(0).float(), torch.where(spread < 1e-6, 1.0, spread).float()


def left_padded(series: Sequence[Tensor], steps: int) -> Tensor:
    """Series as one tensor (N, steps, C), zeros before the shorter ones: the end of each is at the same place."""
    out = torch.zeros(len(series), steps, series[0].shape[1])
    for row, values in zip(out, series, strict=True):
        row[steps - len(values) :] = values
    return out


def windows(values: Tensor, length: int, hop: int) -> Tensor:
    """Windows (W, length, C) of a series (steps, C) that begin every `hop` steps; none where it is shorter."""
    if len(values) < length:
        return values.new_zeros(0, length, values.shape[1])
    return values.unfold(0, length, hop).transpose(1, 2)
