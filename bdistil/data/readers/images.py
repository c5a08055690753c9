"""Datasets of images, from an array in memory or from files, and their transforms."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

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

    def __init__(self, images: Any, labels: Tensor, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.read(index)), int(self.labels[index])

    def read(self, index: int) -> Any:
        """One image, before the transform."""
        return self.images[index]


class ImageFiles(ArrayImages):
    """Images in files, whose encoded paths are an array of bytes (N,); decoded to RGB as they are read."""

    def read(self, index: int) -> Any:
        """One image of PIL."""
        path = os.fsdecode(bytes(self.images[index]))
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise RunError(f"{path} is no whole image ({error}). Get it again, or remove it.") from error
