"""What an ensemble was trained on, and the check that x is of that kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.errors import UserError


@dataclass(frozen=True)
class InputSpec:
    """One sample of x. None stands for what is not known.

    Attributes:
        shape: of one sample.
        dtype: by its name in torch, for example ``float32``.
    """

    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> InputSpec:
        """From the record of a committed round."""
        shape = record.get("input_shape")
        return cls(None if shape is None else tuple(shape), record.get("input_dtype"))

    def check(self, x: Any) -> None:
        """Is x a batch of such samples, without NaN or infinity? What is no tensor is not looked at.

        Raises:
            UserError: names what is wrong with x, and what was expected.
        """
        if not isinstance(x, Tensor):
            return
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise UserError(
                f"Expected `x` of shape (B, {', '.join(map(str, self.shape))}), as in training, got {tuple(x.shape)}."
                + (" One sample is x[None]." if tuple(x.shape) == self.shape else "")
            )
        if self.dtype is not None and str(x.dtype) != f"torch.{self.dtype}":
            raise UserError(f"Expected `x` of dtype {self.dtype}, as in training, got {x.dtype}. Convert it before.")
        # A sum is the cheapest pass over x that NaN and infinity do not survive; what finite numbers overflow is looked
        # at again.
        if x.is_floating_point() and not math.isfinite(x.sum().item()):
            _refuse_nan(x)


def _refuse_nan(x: Tensor) -> None:
    wrong = ~torch.isfinite(x.detach()).flatten(1).all(1) if x.ndim > 1 else ~torch.isfinite(x.detach())
    if count := int(wrong.sum()):
        raise UserError(
            f"Expected `x` without NaN or infinity, got {count} such samples of {len(x)}, the first at index "
            f"{int(wrong.nonzero()[0])}. Mend or leave out these samples."
        )


@dataclass(frozen=True)
class Expectation:
    """The images that a network was trained on: their mean and sd a channel, of pixels in 0 … 1, and (H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]


def expectation_of(network: nn.Module) -> Expectation | None:
    """What a network says, by its attribute `expects`, of the images that it was trained on."""
    found = getattr(network, "expects", None)
    return found if isinstance(found, Expectation) else None
