"""How a data set becomes a training, a validation and a test part: with the same share of each class, or by subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdistil.errors import UserError


def stratified_split(labels: Tensor, sizes: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of three parts with the same share of every class: the rest, and two of the given sizes.

    Args:
        labels: (N,).
        sizes: of the second and third part, multiples of the number of classes for equal shares.
        seed: of the shuffle.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    classes = labels.unique()
    second, third = (size // len(classes) for size in sizes)
    for label in classes:
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        pieces = rows[second + third :], rows[:second], rows[second : second + third]
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    train, val, test = (torch.cat(part).sort().values for part in parts)
    return train, val, test


def check_subjects(parts: dict[str, list[int]], known: Sequence[int]) -> None:
    """Every part has a subject, and no subject is in two parts.

    Args:
        parts: subjects by part.
        known: all that there are.

    Raises:
        UserError: otherwise.
    """
    every = [subject for chosen in parts.values() for subject in chosen]
    if not all(parts.values()) or len(every) != len(set(every)) or not set(every) <= set(known):
        raise UserError(
            "Expected `train`, `validation` and `test` to be lists of different subjects of "
            f"{', '.join(map(str, known))}, got {', '.join(f'{part}: {chosen}' for part, chosen in parts.items())}."
        )
