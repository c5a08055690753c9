"""The loaders of the data modules of published data sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batches = DataLoader[tuple[Tensor, ...]]


def batches(part: Dataset[Any], batch_size: int, num_workers: int = 0, *, shuffle: bool = False) -> Batches:
    """A loader of a part; its batches go to a GPU without a detour where there is one."""
    pinned = torch.cuda.is_available()
    return DataLoader(part, batch_size, shuffle=shuffle, num_workers=num_workers, pin_memory=pinned)
