"""Datasets of images, from an array in memory or from files, and their transforms."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from bdistil.errors import RunError, UserError

Transform = Callable[[Any], Tensor]

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
LARGEST_16_BIT = 65535
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange height and width


def normalised(first: Sequence[v2.Transform], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Transforms of a uint8 image, then conversion to float32 and normalisation by per-channel `mean` and `std`."""
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([*mean], [*std])]
    # On plain tensors: torchvision's subclass of images, v2.ToImage, takes half as long again.
    composed: Transform = v2.Compose([v2.PILToTensor(), *first, *scaled])
    return composed


def pad_crop_flip(size: int | Sequence[int], padding: int) -> list[v2.Transform]:
    """The CIFAR augmentation: zero-padding, a random crop to the original size, mirroring half of the images."""
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
    """Images in files, with encoded paths as a byte array (N,); decoded on access, see `read_image`."""

    channels = 3

    def read(self, index: int) -> Any:
        """One image."""
        return read_image(os.fsdecode(bytes(self.images[index])), self.channels)


class GreyFiles(ImageFiles):
    """`ImageFiles` with one channel."""

    channels = 1


def encoded(paths: Iterable[str | Path]) -> Any:
    """Paths as a byte array: the workers of a loader would copy a list of a million strings one by one."""
    return np.array([os.fsencode(path) for path in paths])


def read_image(path: str, channels: int = 3) -> Any:
    """Decodes an image and rotates it by its EXIF orientation.

    Args:
        path: image file.
        channels: 3 for RGB, 1 for grey. Transparency is dropped.

    Returns:
        A PIL image with 8 bits per channel; a 16-bit image as a tensor (channels, H, W) float32 in 0 … 1.

    Raises:
        RunError: the image is incomplete, or its value range is unknown, see `check_mode`.
    """
    try:
        with Image.open(path) as image:
            check_mode(image, path)
            upright = ImageOps.exif_transpose(image)
            if _has_16_bits(image):
                values = np.asarray(upright, dtype=np.float32) / LARGEST_16_BIT
                return torch.from_numpy(values).expand(channels, -1, -1).contiguous()
            return upright.convert("RGB" if channels == 3 else "L")
    except UserError as error:
        raise RunError(str(error)) from error
    except UNREADABLE as error:
        raise RunError(f"{path} is not a complete image ({error}). Get it again, or remove it.") from error


def _has_16_bits(image: Image.Image) -> bool:
    """Whether an image is grey with 16 bits; older versions of PIL open such a PNG as 32 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def check_mode(image: Image.Image, path: str | Path) -> None:
    """Raises UserError for an image of real numbers or 32-bit integers, whose value of white is unknown."""
    if image.mode in ("F", "I") and not _has_16_bits(image):
        kind = "real numbers" if image.mode == "F" else "32-bit integers"
        raise UserError(
            f"{path} has pixels that are {kind}, whose range is not known. Save images of 8 or 16 bits, or give their "
            "numbers as an array in a .npz file (bdistil.data.Arrays)."
        )


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image after rotation by its EXIF orientation, from its header; a TIFF file is decoded.

    Raises:
        UserError: it is not an image, or one that `check_mode` refuses.
    """
    try:
        with Image.open(path) as image:
            check_mode(image, path)
            if image.format == "TIFF":  # versions of Pillow differ in whether the size in its header is turned already
                width, height = ImageOps.exif_transpose(image).size
                return height, width
            width, height = image.size
            return (width, height) if image.getexif().get(ORIENTATION) in SIDEWAYS else (height, width)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path} is no image that can be read ({error}). Get it again, or remove it.") from error
