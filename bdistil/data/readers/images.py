"""Datasets of images, from an array in memory or from files, and their transforms."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from bdistil.errors import RunError

Transform = Callable[[Any], Tensor]


def normalised(first: Sequence[v2.Transform], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Transforms of a uint8 image, then float32 less `mean` by `std`, which are given for each channel, in 0 … 1."""
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([*mean], [*std])]
    composed: Transform = v2.Compose([v2.ToImage(), *first, *scaled, v2.ToPureTensor()])
    return composed


def pad_crop_flip(size: int, padding: int) -> list[v2.Transform]:
    """The augmentation of CIFAR: pad with zeros, crop to the old size at random, mirror half of the images."""
    return [v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip()]


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Images uint8 (N, C, H, W) and labels (N,) int64 in memory, read as x (C, H, W) float32 and y."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images in files, decoded to RGB as they are read as x (3, H, W) float32 and y."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], transform: Transform) -> None:
        # Arrays: the workers of a loader would copy a list of a million strings, reference count by reference count.
        self.paths, self.labels = np.array([os.fsencode(path) for path in paths]), np.asarray(labels, np.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = os.fsdecode(bytes(self.paths[index]))
        try:
            with Image.open(path) as image:
                decoded = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise RunError(f"{path} is no whole image ({error}). Get it again, or remove it.") from error
        return self.transform(decoded), int(self.labels[index])
