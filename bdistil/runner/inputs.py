"""Checks and unpacks the inputs x of an exported ensemble: an array, or several in a tuple or dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .budget import ExportError
from .confidence import Array

Arrays = dict[str, Array]


class Inputs:
    """The arrays of x, by the names of the graphs' inputs.

    Args:
        entries: `inputs` of the manifest: name, path in x, shape of one sample and dtype of each. A size that may vary
            has a name; its largest value in training is in `largest`, the smallest that the students read in `least`.
            `negative` tells whether the students read negative numbers.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self.entries = [(entry, np.dtype(entry["dtype"])) for entry in entries]
        self.alone = len(entries) == 1 and not entries[0]["path"]

    def read(self, x: Any) -> Arrays:
        """The arrays of x, checked: batches (B, ...) as in training, without NaN or infinity; B may be 0.

        Raises:
            ExportError: they are not.
        """
        arrays = {entry["name"]: self._found(x, entry["path"]) for entry, _ in self.entries}
        for entry, dtype in self.entries:
            _check(arrays[entry["name"]], entry, dtype)
        if not self.alone and len({len(array) for array in arrays.values()}) > 1:
            lengths = ", ".join(f"{len(array)} of {name}" for name, array in arrays.items())
            raise ExportError(f"Expected arrays of x with as many samples, got {lengths}.")
        return arrays

    def _found(self, x: Any, path: Sequence[str | int]) -> Any:
        for key in path:
            try:
                x = x[key]
            except (KeyError, IndexError, TypeError) as error:
                names = ", ".join(_text(entry) for entry, _ in self.entries)
                raise ExportError(f"Expected x to hold {names}, got {type(x).__name__} without {key!r}.") from error
        return x

    def random(self, batch: int) -> Arrays:
        """Arrays for measurements: standard normal, or ones for integers; sizes that vary take their largest value."""
        arrays, generator = {}, np.random.default_rng(0)
        for entry, dtype in self.entries:
            size = (batch, *(entry["largest"].get(size, size) for size in entry["shape"]))
            arrays[entry["name"]] = (generator.standard_normal(size) if dtype.kind == "f" else np.ones(size)).astype(
                dtype
            )
        return arrays


def _text(entry: Mapping[str, Any]) -> str:
    return "x" + "".join(f"[{key!r}]" for key in entry["path"])


def _check(x: Any, entry: Mapping[str, Any], dtype: np.dtype[Any]) -> None:
    name, shape = _text(entry), entry["shape"]
    fits = isinstance(x, np.ndarray) and x.ndim == len(shape) + 1
    if not fits or any(a != b and not isinstance(b, str) for a, b in zip(x.shape[1:], shape)):  # noqa: B905
        expected = ", ".join(("B", *("any" if isinstance(size, str) else str(size) for size in shape)))
        got = x.shape if isinstance(x, np.ndarray) else type(x).__name__
        raise ExportError(f"Expected `{name}` to be an array of shape ({expected}), got {got}.")
    for axis, size in enumerate(shape, 1):
        least = entry["least"].get(size, 1)  # below it, onnxruntime ends the process in a GRU
        if isinstance(size, str) and x.shape[axis] < least:
            raise ExportError(f"Expected `{name}` of at least {least} along axis {axis}, got {x.shape}.")
    if x.dtype != dtype:
        raise ExportError(f"Expected `{name}` of dtype {dtype}, got {x.dtype}. Convert it: {name}.astype('{dtype}').")
    if isinstance(x, np.ma.MaskedArray):
        raise ExportError(f"Expected `{name}` without a mask, which graphs ignore, got a masked array. Use .filled().")
    if dtype.kind == "i" and not entry.get("negative", True) and (x < 0).any():
        raise ExportError(f"Expected `{name}` without negative numbers, as indices of an embedding, got {x.min()}.")
    if dtype.kind == "f" and not np.isfinite(x).all():
        wrong = ~np.isfinite(x).reshape(len(x), -1).all(1)
        raise ExportError(
            f"Expected `{name}` without NaN or infinity, got {wrong.sum()} such samples of {len(x)}, the first at "
            f"index {wrong.argmax()}."
        )
