"""Shape, dtype and normalisation of the inputs of a model, and the check of x against them."""

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
    """Shape and dtype of one sample of x; None where unknown.

    Attributes:
        shape: of one sample, without the batch.
        dtype: name of the dtype in torch, for example ``float32``.

    Example:
        >>> InputSpec((3,), "float32").check(torch.zeros(2, 4))
        Traceback (most recent call last):
        ...
        bdistil.errors.UserError: Expected `x` of shape (B, 3), as in training, got (2, 4).
    """

    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> InputSpec:
        """From the record of a committed round."""
        shape = record.get("input_shape")
        return cls(None if shape is None else tuple(shape), record.get("input_dtype"))

    def random(self, count: int) -> Tensor:
        """Random samples (count, ...), always the same: standard normal, or zeros and ones for an integer dtype."""
        assert self.shape is not None
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, self.dtype or "float32")
        if dtype.is_floating_point:
            return torch.randn(count, *self.shape, generator=generator).to(dtype)
        return torch.randint(2, (count, *self.shape), generator=generator).to(dtype)

    def check(self, x: Any) -> None:
        """Checks that x is a batch of such samples, without NaN or infinity; what is no tensor is not checked.

        Raises:
            UserError: x differs; the message names the expected and the given value.
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
        # A sum is the cheapest pass over x that NaN and infinity carry through. Finite values may overflow in it, so
        # that the samples are checked one by one then.
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
    """Images that a network was trained on: mean and sd per channel, of pixels in 0 … 1, and size (H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]


def expectation_of(network: nn.Module) -> Expectation | None:
    """The attribute `expects` of a network, if it is an `Expectation`."""
    found = getattr(network, "expects", None)
    return found if isinstance(found, Expectation) else None
