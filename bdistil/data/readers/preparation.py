"""Splits into training, validation and test part; standardisation and windows of time series."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdistil.errors import UserError


def stratified_split(labels: Tensor, sizes: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of three parts of labels (N,): the rest, and two of given sizes with equally many samples per class.

    Sizes are rounded down to a multiple of the number of classes. A class of few samples keeps a fifth of them, rounded
    up, in the first part; the other parts are then smaller.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 0, 1])
        >>> [labels[part].sort().values.tolist() for part in stratified_split(labels, (2, 2), seed=0)]
        [[0, 1], [0, 1], [0, 1]]
    """
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique()
    second, third = (size // len(classes) for size in sizes)
    pieces = []
    for label in classes:
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        most = min(second + third, 4 * len(rows) // 5)
        own = most * second // max(1, second + third)  # `second` itself where the class has enough samples
        pieces.append((rows[most:], rows[:own], rows[own:most]))
    train, val, test = (torch.cat(part).sort().values for part in zip(*pieces, strict=True))
    return train, val, test


def share_split(labels: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Indices of the rest of labels (N,), and of parts with the given shares of every class, rounded.

    Every class keeps a sample in the rest.

    Example:
        >>> labels = torch.tensor([0] * 10 + [1] * 4 + [2])
        >>> [labels[part].tolist() for part in share_split(labels, (0.2, 0.3), seed=0)]
        [[0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 1], [0, 0, 0, 1]]
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        ends = [min(round(sum(shares[: part + 1]) * len(rows)), len(rows) - 1) for part in range(len(shares))]
        *parts, rest = rows.tensor_split(ends)
        pieces.append((rest, *parts))
    return [torch.cat(part).sort().values for part in zip(*pieces, strict=True)]


def validation_split(labels: Tensor, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation part of labels (N,); the latter has equally many of every class.

    Raises:
        UserError: fewer than one sample for each class, or more than half of all.
    """
    least, most = len(labels.unique()), len(labels) // 2
    if not least <= validation <= most:
        raise UserError(
            f"Expected `validation` to be from {least}, one for each class, to {most}, half of the samples, got "
            f"{validation}."
        )
    train, val, _ = stratified_split(labels, (validation, 0), seed)
    return train, val


def check_subjects(known: Sequence[int], **parts: Sequence[int]) -> None:
    """Checks that every part has a subject, and no subject is in two parts.

    Raises:
        UserError: otherwise; the arguments are named.
    """
    every = [subject for chosen in parts.values() for subject in chosen]
    if not all(parts.values()) or len(every) != len(set(every)) or not set(every) <= set(known):
        got = ", ".join(f"`{part}`: {list(chosen)}" for part, chosen in parts.items())
        raise UserError(
            f"Expected different subjects of {', '.join(map(str, known))}, one or more in each part, got {got}."
        )


def moments(series: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all steps of some series (steps, C), both (C,).

    The deviation of a constant channel is replaced by 1, so that dividing by it is safe.
    """
    steps = torch.cat(tuple(series)).double()
    spread = steps.std(0, correction=0)
    return steps.mean(0).float(), torch.where(spread < 1e-6, 1.0, spread).float()


def windows(values: Tensor, length: int, hop: int) -> Tensor:
    """Windows (W, length, C) of a series (steps, C), one every `hop` steps; none where the series is shorter.

    Example:
        >>> windows(torch.arange(5).view(5, 1), length=3, hop=2).squeeze(-1).tolist()
        [[0, 1, 2], [2, 3, 4]]
    """
    if len(values) < length:
        return values.new_zeros(0, length, values.shape[1])
    return values.unfold(0, length, hop).transpose(1, 2)
