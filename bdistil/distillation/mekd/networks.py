"""Generator and discriminator of MEKD, for images (C, H, W) and for sequences (steps, channels)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.errors import UserError

SLOPE, DROPOUT = 0.2, 0.25


def _layout(shape: Sequence[int], smallest: int = 4) -> tuple[int, tuple[int, ...], Any, Any, bool]:
    """Returns (channels, sides, convolution, batch norm, whether channels are last) for samples of a shape.

    Raises:
        UserError: the shape is neither that of an image nor of a sequence, or a side is shorter than `smallest`.
    """
    if len(shape) not in (2, 3) or min(shape) < 1 or min(shape[1:] if len(shape) == 3 else shape[:1]) < smallest:
        raise UserError(
            f"Expected `shape` of an image (C, H, W) or a sequence (steps, channels), sides and steps >= {smallest}, "
            f"got {tuple(shape)}."
        )
    if len(shape) == 3:
        return shape[0], tuple(shape[1:]), nn.Conv2d, nn.BatchNorm2d, False
    return shape[1], (shape[0],), nn.Conv1d, nn.BatchNorm1d, True


class Generator(nn.Module):
    """Maps latents of the length of the teacher's answers to samples: the emulated inverse of the teacher.

    A linear layer to width x (side/4), then two blocks of upsampling by 2 and a convolution of size 3 with batch norm
    and leaky ReLU; a last convolution with tanh, scaled to the range of the data. Sequences use 1-d convolutions. A
    side that is not a multiple of 4 is generated longer and cropped.

    Args:
        outputs: L.
        shape: shape of a sample, (C, H, W) or (steps, channels).
        width: channels after the linear layer; half as many before the last convolution.

    Raises:
        UserError: the shape is neither of an image nor of a sequence, or `width` or `outputs` < 2.
    """

    low: Tensor
    high: Tensor

    def __init__(self, outputs: int, shape: Sequence[int], width: int = 128) -> None:
        super().__init__()
        channels, sides, conv, norm, self.last = _layout(shape)
        if width < 2 or outputs < 2:
            raise UserError(f"Expected `width` and `outputs` of a generator to be >= 2, got {width} and {outputs}.")
        self.outputs, self.shape, self.sides = outputs, tuple(shape), sides
        self.start = (width, *(-(-side // 4) for side in sides))
        self.linear = nn.Linear(outputs, math.prod(self.start))
        self.layers = nn.Sequential(
            norm(width), nn.Upsample(scale_factor=2),
            conv(width, width, 3, padding=1), norm(width), nn.LeakyReLU(SLOPE), nn.Upsample(scale_factor=2),
            conv(width, width // 2, 3, padding=1), norm(width // 2), nn.LeakyReLU(SLOPE),
            conv(width // 2, channels, 3, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.register_buffer("low", -torch.ones(channels, *[1] * len(sides)))
        self.register_buffer("high", torch.ones(channels, *[1] * len(sides)))

    def fit_range(self, samples: Tensor) -> None:
        """Sets the range of each channel to its smallest and largest value in samples (N, ...)."""
        first = samples.movedim(-1, 1) if self.last else samples
        flat = first.float().transpose(0, 1).flatten(1)
        self.low.copy_(flat.amin(1).view_as(self.low))
        self.high.copy_(flat.amax(1).view_as(self.high))

    def forward(self, z: Tensor) -> Tensor:
        """Generates samples (B, *shape) from z (B, L)."""
        made = self.layers(self.linear(z).unflatten(1, self.start))
        for axis, side in enumerate(self.sides, 2):
            made = made.narrow(axis, 0, side)
        made = self.low + (self.high - self.low) * (made + 1) / 2
        samples: Tensor = made.movedim(1, -1) if self.last else made
        return samples


def shifted(x: Tensor, limit: int) -> Tensor:
    """Shifts samples (B, C, H, W) or (B, C, steps) by up to `limit` along each side; edges are replicated."""
    shifted_x = F.pad(x, [limit] * 2 * (x.ndim - 2), mode="replicate")
    for axis, side in enumerate(x.shape[2:], 2):
        first = torch.randint(2 * limit + 1, (len(x), 1), device=x.device)
        index = first + torch.arange(side, device=x.device)  # (B, side)
        index = index.view(len(x), *[1] * (axis - 1), side, *[1] * (x.ndim - 1 - axis))
        shifted_x = shifted_x.take_along_dim(index, axis)
    return shifted_x


class Discriminator(nn.Module):
    """Distinguishes local from generated samples: four convolutions of stride 2, then one logit.

    Each convolution has leaky ReLU and dropout, and from the second on batch norm, except before the logit of a
    sequence or of an image of at most 16 x 16. Local and generated samples come in separate batches, and batch norm
    gives both the same mean. With a single position left, or with equivalent positions as in sequences that begin
    anywhere, both would then have the same mean logit, and the loss could not fall below 2 log 2.

    In training, samples are shifted at random, so that few local samples are not memorised (the translation of
    "Differentiable Augmentation for Data-Efficient GAN Training", arXiv 2006.10738).

    Args:
        shape: shape of a sample, as for `Generator`.
        width: channels of the first convolution, doubled by each of the others.
        low: smallest value of the data; inputs are scaled to -1 … 1.
        high: largest value of the data.
        shift: largest shift, in pixels or steps; 0 for none.

    Raises:
        UserError: the shape is neither of an image nor of a sequence, `width` < 1, `high` <= `low`, or the shift is not
            shorter than a side.
    """

    def __init__(
        self, shape: Sequence[int], width: int = 16, low: float = -1.0, high: float = 1.0, shift: int = 0
    ) -> None:
        super().__init__()
        channels, sides, conv, norm, self.last = _layout(shape)
        if width < 1 or high <= low:
            raise UserError(f"Expected of a discriminator `width` >= 1 and `high` > `low`, got {width}, {high}, {low}.")
        if not 0 <= shift < min(sides):
            raise UserError(f"Expected `shift` of a discriminator to be in 0 … {min(sides) - 1}, got {shift}.")
        self.low, self.high, self.shift = low, high, shift
        left = math.prod(-(-side // 16) for side in sides)  # positions before the logit
        normed = (1, 2) if self.last or left == 1 else (1, 2, 3)
        layers: list[nn.Module] = []
        for number, inside in enumerate((channels, width, 2 * width, 4 * width)):
            outside = width * 2**number
            layers += [conv(inside, outside, 3, stride=2, padding=1), nn.LeakyReLU(SLOPE), nn.Dropout(DROPOUT)]
            layers += [norm(outside)] if number in normed else []
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width * left, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B,) of samples (B, *shape), large for local ones."""
        x = 2 * (x - self.low) / (self.high - self.low) - 1
        x = x.movedim(-1, 1) if self.last else x
        logits: Tensor = self.layers(shifted(x, self.shift) if self.training and self.shift else x)
        return logits[:, 0]
