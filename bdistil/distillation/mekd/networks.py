"""Generators and discriminators of MEKD, for images (C, H, W) and for sequences (steps, channels)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.errors import UserError

SLOPE, DROPOUT = 0.2, 0.25


def _kinds(shape: Sequence[int], smallest: int) -> tuple[int, tuple[int, ...], Any, Any, bool]:
    """(channels, sides, convolution, batch norm, are channels last?) of samples of a shape.

    Raises:
        UserError: the shape is of neither an image nor a sequence, or a side is shorter than `smallest`.
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
    """Maps z (B, L), as long as an answer of the teacher, to samples: the emulated inverse of the teacher.

    Linear to width x (side/4), then twice: up by 2, convolution of 3; batch norm and leaky ReLU after all but the last
    convolution, which tanh follows, scaled to the range of the data. Sequences get convolutions in one dimension. A
    side that 4 does not divide is made longer and cut.

    Args:
        outputs: L.
        shape: of a sample: (C, H, W) of an image, (steps, channels) of a sequence.
        width: channels after the linear layer; half of it before the last convolution.

    Raises:
        UserError: a shape of neither kind, or `width` < 2.
    """

    low: Tensor
    high: Tensor

    def __init__(self, outputs: int, shape: Sequence[int], width: int = 128) -> None:
        super().__init__()
        channels, sides, conv, norm, self.last = _kinds(shape, 4)
        if width < 2 or outputs < 2:
            raise UserError(f"Expected `width` and `outputs` of a generator to be >= 2, got {width} and {outputs}.")
        self.outputs, self.shape, self.sides = outputs, tuple(shape), sides
        self.start = (width, *(-(-side // 4) for side in sides))
        self.linear = nn.Linear(outputs, int(torch.tensor(self.start).prod()))
        self.layers = nn.Sequential(
            norm(width), nn.Upsample(scale_factor=2),
            conv(width, width, 3, padding=1), norm(width), nn.LeakyReLU(SLOPE), nn.Upsample(scale_factor=2),
            conv(width, width // 2, 3, padding=1), norm(width // 2), nn.LeakyReLU(SLOPE),
            conv(width // 2, channels, 3, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.register_buffer("low", -torch.ones(channels, *[1] * len(sides)))
        self.register_buffer("high", torch.ones(channels, *[1] * len(sides)))

    def fit_range(self, samples: Tensor) -> None:
        """Takes the smallest and the largest value of each channel of samples (N, ...) for the ends of tanh."""
        first = samples.movedim(-1, 1) if self.last else samples
        flat = first.float().transpose(0, 1).flatten(1)
        self.low.copy_(flat.amin(1).view_as(self.low))
        self.high.copy_(flat.amax(1).view_as(self.high))

    def forward(self, z: Tensor) -> Tensor:
        """Samples (B, *shape) of z (B, L)."""
        made = self.layers(self.linear(z).unflatten(1, self.start))
        for axis, side in enumerate(self.sides, 2):
            made = made.narrow(axis, 0, side)
        made = self.low + (self.high - self.low) * (made + 1) / 2
        samples: Tensor = made.movedim(1, -1) if self.last else made
        return samples


def shifted(x: Tensor, limit: int) -> Tensor:
    """Each sample moved along each of its sides by a whole number in -limit … limit, drawn alike; edges are repeated.

    Args:
        x: (B, C, H, W) or (B, C, steps).
        limit: smaller than each side.
    """
    sides = x.shape[2:]
    moved = F.pad(x, [limit] * 2 * len(sides), mode="replicate")
    for axis, side in enumerate(sides, 2):
        start = torch.randint(2 * limit + 1, (len(x), 1), device=x.device)
        places = (start + torch.arange(side, device=x.device)).view(
            len(x), *[1] * (axis - 1), side, *[1] * (x.ndim - 1 - axis)
        )
        shape = [*moved.shape]
        shape[axis] = side
        moved = moved.gather(axis, places.expand(shape))
    return moved


class Discriminator(nn.Module):
    """Tells local samples from generated ones: four convolutions of stride 2, then one logit.

    Leaky ReLU and dropout after each, batch norm from the second on, but not before the logit of a sequence, or of an
    image of at most 16 x 16. Local and generated samples come in batches of their own, and a norm gives both the same
    mean. Where one place is left, or all places say the same, as of sequences that begin anywhere, both then have the
    same mean logit, and the loss cannot fall under 2 log 2, whatever the samples.

    In training, local and generated samples are shifted at random, so that a few local ones are not known by heart
    ("Differentiable Augmentation for Data-Efficient GAN Training", arXiv 2006.10738, of which this is the translation).

    Args:
        shape: of a sample, as of `Generator`.
        width: channels of the first convolution; each of the others has twice as many.
        low: smallest value of the data; inputs are scaled to -1 … 1.
        high: largest value of the data.
        shift: by so many pixels or steps at most; 0 for none.

    Raises:
        UserError: a shape of neither kind, `width` < 1, or a shift that is as long as a side.
    """

    def __init__(
        self, shape: Sequence[int], width: int = 16, low: float = -1.0, high: float = 1.0, shift: int = 0
    ) -> None:
        super().__init__()
        channels, sides, conv, norm, self.last = _kinds(shape, 4)
        if width < 1 or high <= low:
            raise UserError(f"Expected of a discriminator `width` >= 1 and `high` > `low`, got {width}, {high}, {low}.")
        if not 0 <= shift < min(sides):
            raise UserError(f"Expected `shift` of a discriminator to be in 0 … {min(sides) - 1}, got {shift}.")
        self.shape, self.low, self.high, self.shift = tuple(shape), low, high, shift
        left = int(torch.tensor([-(-side // 16) for side in sides]).prod())
        normed = (1, 2) if self.last or left == 1 else (1, 2, 3)
        layers: list[nn.Module] = []
        for number, inside in enumerate((channels, width, 2 * width, 4 * width)):
            outside = width * 2**number
            layers += [conv(inside, outside, 3, stride=2, padding=1), nn.LeakyReLU(SLOPE), nn.Dropout(DROPOUT)]
            layers += [norm(outside)] if number in normed else []
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width * left, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B,) of samples (B, *shape): large where they look local."""
        x = 2 * (x - self.low) / (self.high - self.low) - 1
        x = x.movedim(-1, 1) if self.last else x
        logits: Tensor = self.layers(shifted(x, self.shift) if self.training and self.shift else x)
        return logits[:, 0]
