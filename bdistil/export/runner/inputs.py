"""Is x a batch that the graphs can read?"""

from __future__ import annotations

import math

import numpy as np

from .budget import Array
from .files import ExportError


def check_input(x: Array, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    """Is x (B, ...) a batch as in training, without NaN or infinity?

    Args:
        x: a batch.
        shape: of a sample.
        dtype: of x.

    Raises:
        ExportError: names what is wrong with x, and what was expected.
    """
    if not isinstance(x, np.ndarray) or x.ndim == 0 or x.shape[1:] != shape or not len(x):
        wanted = ", ".join(map(str, ("B", *shape)))
        got = x.shape if isinstance(x, np.ndarray) else type(x).__name__
        raise ExportError(f"Expected `x` to be an array of shape ({wanted}) with B >= 1, got {got}.")
    if x.dtype != dtype:
        raise ExportError(f"Expected `x` of dtype {dtype}, got {x.dtype}. Convert it: x.astype('{dtype}').")
    # The dot product with itself is the cheapest pass that NaN and infinity do not survive; what finite numbers
    # overflow is looked at again.
    flat = x.reshape(-1)
    if dtype.kind == "f" and not math.isfinite(flat.dot(flat)):
        wrong = ~np.isfinite(x).reshape(len(x), -1).all(1)
        if wrong.any():
            raise ExportError(
                f"Expected `x` without NaN or infinity, got {wrong.sum()} such samples of {len(x)}, the first at "
                f"index {wrong.argmax()}."
            )
