"""The user's own arrays, in a .npz file."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import PARTS, TensorParts
from bdistil.data.folders import check_shares
from bdistil.data.readers import share_split
from bdistil.data.readers.files import Array
from bdistil.errors import UserError, listed
from bdistil.utils.paths import user_path


class Arrays(TensorParts):
    """Samples x (N, ...) and y (N,) or (N, L) from a .npz file, for recipes that need no Python code.

    The file has `x` and `y`, or `x_train`, `y_train` and the same with `_val` and `_test`. A missing part is split
    off the training samples by seed: class labels are stratified, and every class keeps training samples; real numbers
    are split at random. Integers with gaps, some of them too rare to stratify, are treated as a quantity and split at
    random, too. Labels may be integers or names; real numbers are for `task: regression`.

    Real numbers become float32, integers int64, for example token ids. Integer images need `standardise`.

    Args:
        file: the .npz file, as `numpy.savez` writes it.
        standardise: convert x to float32 with mean 0 and sd 1 over the training part, for each index of `axis`.
        axis: axis of the channels or features in a batch.
        channels_last: move the last axis of x to `axis` 1, for images (N, H, W, C).
        shape: shape of one sample, to which x is reshaped first: [1, 28, 28] for images (N, 28, 28), for example.
        validation: share of the training samples for a missing validation part.
        test: share of the training samples for a missing test part.
        split_seed: seed of the split, independent of the seed of a run.
        options: as for `PartsModule`.

    Attributes:
        labels: names of the classes, after `setup`, if y holds names.
        normalisation: mean and standard deviation, after `setup` with `standardise`.

    Raises:
        UserError: a value outside of its range. In `setup`: the file is missing, or arrays have mismatched shapes, an
            unsupported type, or NaN; the array is named.
    """

    def __init__(
        self,
        file: str,
        *,
        standardise: bool = False,
        axis: int = 1,
        channels_last: bool = False,
        shape: list[int] | None = None,
        validation: float = 0.15,
        test: float = 0.15,
        split_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_shares(validation, test)
        self.file, self.standardise, self.axis = user_path(file, "data.file"), standardise, axis
        self.channels_last, self.shape = channels_last, shape
        self.shares, self.split_seed = {"val": validation, "test": test}, split_seed
        self.labels: list[str] | None = None
        self.normalisation: tuple[Tensor, Tensor] | None = None

    def make_parts(self) -> dict[str, Any]:
        """The three parts, in memory."""
        found = read_arrays(self.file)
        labels = {part: y for part, (_, y) in found.items()}
        if labels["train"].dtype.kind in "US":
            labels = self._number(labels)
        parts = {part: (self._samples(x, part), _labels(labels[part], part)) for part, (x, _) in found.items()}
        parts |= self._split(*parts["train"], {part: s for part, s in self.shares.items() if part not in parts})
        if self.standardise:
            mean, spread = self._moments(parts["train"][0])
            self.normalisation = mean.float(), spread.float()
            parts = {part: (((x - mean) / spread).float(), y) for part, (x, y) in parts.items()}
        return {part: TensorDataset(*parts[part]) for part in PARTS}

    def _number(self, labels: dict[str, Array]) -> dict[str, Array]:
        """Class numbers in place of names; the classes are those of the training part."""
        labels = {
            part: np.char.decode(y, "utf-8", "replace") if y.dtype.kind == "S" else y for part, y in labels.items()
        }
        names = np.unique(labels["train"])
        for part, y in labels.items():
            if len(unknown := np.setdiff1d(y, names)):
                raise UserError(f"Expected classes of the training part as y of {part}, got also {str(unknown[0])!r}.")
        self.labels = [str(name) for name in names]
        return {part: np.searchsorted(names, y) for part, y in labels.items()}

    def _samples(self, x: Array, part: str) -> Tensor:
        where = f"x of {part} in {self.file}"
        if x.dtype.kind not in "biuf":
            raise UserError(f"Expected {where} to be numbers, got {x.dtype}.")
        if self.shape is not None:
            if np.prod(self.shape) * len(x) != x.size:
                raise UserError(f"Expected {where} to have samples of `shape` {self.shape}, got {x.shape[1:]}.")
            x = x.reshape(len(x), *self.shape)
        x = np.moveaxis(x, -1, 1) if self.channels_last else x
        if x.dtype.kind in "iu" and x.ndim > 2 and not self.standardise:
            raise UserError(
                f"Expected {where} to be real numbers, got {x.dtype} of shape {x.shape}. Give `standardise` "
                "(--data.standardise true) for pixels, or save them as float32."
            )
        if self.standardise or x.dtype.kind in "bf":  # the mean is taken off before numbers are rounded
            x = x.astype(np.float64 if self.standardise and not np.can_cast(x.dtype, np.float32) else np.float32)
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            wrong = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))[0])
            raise UserError(f"Expected {where} without NaN or infinity, got some in sample {wrong}.")
        return torch.from_numpy(np.ascontiguousarray(x if x.dtype.kind == "f" else x.astype(np.int64)))

    def _split(self, x: Tensor, y: Tensor, missing: dict[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
        shares = [*missing.values()]
        rows = share_split(torch.zeros(len(y)) if _is_quantity(y, shares) else y, shares, self.split_seed)
        if empty := [part for part, chosen in zip(("train", *missing), rows, strict=True) if not len(chosen)]:
            raise UserError(
                f"Expected samples in every part of {self.file}, got none in {', '.join(empty)}: {len(x)} training "
                f"samples are too few to split off the shares {missing}."
            )
        return {part: (x[chosen], y[chosen]) for part, chosen in zip(("train", *missing), rows, strict=True)}

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x (N, ...), of a shape that broadcasts over it; 1 where nothing varies."""
        if not -x.ndim <= self.axis < x.ndim or self.axis % x.ndim == 0:
            raise UserError(
                f"Expected `axis` to be one of the axes after the first of x {tuple(x.shape)}, got {self.axis}."
            )
        others = [axis for axis in range(x.ndim) if axis != self.axis % x.ndim]
        mean, spread = x.double().mean(others, keepdim=True), x.double().std(others, correction=0, keepdim=True)
        rounding = 8 * torch.finfo(x.dtype).eps * x.abs().amax(others, keepdim=True)
        return mean[0].to(x.dtype), torch.where(spread <= rounding, 1.0, spread)[0].to(x.dtype)


def read_arrays(file: Path) -> dict[str, tuple[Array, Array]]:
    """x and y of each part in a .npz file; `x` and `y` without a suffix are the training part.

    Raises:
        UserError: the file or an array is missing, a part has another name, or x and y differ in length.
    """
    if not file.is_file():
        raise UserError(f"Expected `file` of Arrays to be a .npz file, got {str(file)!r}, which is not there.")
    if not zipfile.is_zipfile(file):
        raise UserError(f"Expected {file} to be a .npz file of arrays of numbers, got another file (see numpy.savez).")
    try:
        with np.load(file, allow_pickle=False) as loaded:
            lowered = [name.lower() for name in loaded.files]
            if twice := [name for name in loaded.files if lowered.count(name.lower()) > 1]:
                raise UserError(f"Expected arrays of different names in {file}, got {listed(twice)}. Rename one.")
            arrays = {name.lower(): _read(loaded, name) for name in loaded.files}
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"Expected {file} to be a .npz file of arrays of numbers, got: {error}") from error
    divided = "x_train" in arrays
    names = {part: (f"x_{part}", f"y_{part}") for part in PARTS if f"x_{part}" in arrays} if divided else {}
    names = names or {"train": ("x", "y")}
    if lacking := [name for pair in names.values() for name in pair if name not in arrays]:
        raise UserError(
            f"Expected arrays x and y, or x_train, y_train …, in {file}, got {list(arrays)} without {lacking[0]}."
        )
    used = [x for x, _ in names.values()]
    if unused := [name for name in arrays if name[:1] == "x" and f"y{name[1:]}" in arrays and name not in used]:
        raise UserError(
            f"Expected the parts in {file} to be named x_train, x_val and x_test, or x alone, got also "
            f"{listed(unused)} beside {listed(used)}, which would be left out. Rename the arrays, or remove them."
        )
    found = {part: (arrays[x], arrays[y]) for part, (x, y) in names.items()}
    for part, (x, y) in found.items():
        if x.ndim < 2 or not y.ndim or not len(x) or len(x) != len(y):
            raise UserError(f"Expected N samples x (N, ...) and y of {part} in {file}, got {x.shape} and {y.shape}.")
    return found


def _read(loaded: Any, name: str) -> Any:
    """An array of a .npz file; None for another than x, y and their parts, which may hold anything."""
    if not re.fullmatch("[xy](_.*)?", name, re.IGNORECASE):
        return None
    try:
        return loaded[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise UserError(
            f"Expected arrays of numbers or names, got {name} of Python objects, as pandas keeps texts and mixed "
            f"columns ({error}). Save {name}.astype(str) for names, {name}.astype(numpy.float32) for numbers."
        ) from error


def _labels(y: Array, part: str) -> Tensor:
    """Class numbers (N,) int64, or real numbers (N,) or (N, L) float32."""
    if y.dtype.kind not in "biuf":
        raise UserError(f"Expected y of {part} to be numbers or names, got {y.dtype}.")
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 and y.dtype.kind in "biu" else y
    whole = y.dtype.kind in "biu" and y.ndim == 1
    return torch.from_numpy(np.ascontiguousarray(y.astype(np.int64 if whole else np.float32)))


def _is_quantity(y: Tensor, shares: Sequence[float]) -> bool:
    """Whether y is a quantity, not a class: stratified, its rare, often extreme values would all go to training."""
    if y.ndim != 1 or y.is_floating_point():
        return True
    values, counts = y.unique(return_counts=True)
    rare = int(counts.min()) * min(shares, default=1.0) < 1
    return rare and int(values[-1]) - int(values[0]) >= len(values)
