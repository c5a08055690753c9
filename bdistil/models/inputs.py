"""Structure, shape, dtype and normalisation of the inputs of a model, and the check of x against them."""

from __future__ import annotations

import cmath
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bdistil.errors import UserError
from bdistil.utils.trees import leaves_of

# A size of one sample, or the smallest and the largest one that was seen in training.
Size = int | tuple[int, int]


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one sample of x, None where unknown; for a mapping or a tuple, those of its parts.

    Attributes:
        shape: shape of one sample, without the batch dimension; a pair (smallest, largest) is a size that may vary,
            such as the number of steps of a sequence.
        dtype: name of the torch dtype, for example ``float32``.
        parts: specs by key of a mapping, or in the order of a tuple; None for a single tensor.

    Example:
        >>> InputSpec((3,), "float32").check(torch.zeros(2, 4))
        Traceback (most recent call last):
        ...
        bdistil.errors.UserError: Expected `x` of shape (B, 3), as in training, got (2, 4).
    """

    shape: tuple[Size, ...] | None = None
    dtype: str | None = None
    parts: Mapping[str, InputSpec] | tuple[InputSpec, ...] | None = None

    # ---- made from a batch, or read from a record

    @classmethod
    def of_batch(cls, x: Any) -> InputSpec:
        """Spec of a batch (B, ...). The shape of a packed sequence, or any other object, is unknown.

        Raises:
            UserError: a key of a mapping is not a string.
        """
        if isinstance(x, Tensor):
            return cls(tuple(x.shape[1:]), str(x.dtype).removeprefix("torch."))
        if isinstance(x, Mapping):
            if others := [key for key in x if not isinstance(key, str)]:
                raise UserError(f"Expected the keys of `x`, a mapping, to be strings, got {others[0]!r}. Rename it.")
            return cls(parts={key: cls.of_batch(value) for key, value in x.items()})
        if type(x) in (tuple, list) and leaves_of(x):
            return cls(parts=tuple(map(cls.of_batch, x)))
        return cls()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> InputSpec:
        """Spec from the record of a committed round, see `to_record`."""
        shape, parts = record.get("input_shape"), record.get("input_parts")
        if isinstance(parts, Mapping):
            return cls(parts={key: cls.of(part) for key, part in parts.items()})
        if parts is not None:
            return cls(parts=tuple(map(cls.of, parts)))
        sizes = None if shape is None else tuple(tuple(s) if isinstance(s, list) else s for s in shape)
        return cls(sizes, record.get("input_dtype"))

    def to_record(self) -> dict[str, Any]:
        """The spec as plain values."""
        if isinstance(self.parts, Mapping):
            return {"input_parts": {key: part.to_record() for key, part in self.parts.items()}}
        if self.parts is not None:
            return {"input_parts": [part.to_record() for part in self.parts]}
        sizes = None if self.shape is None else [list(s) if isinstance(s, tuple) else s for s in self.shape]
        return {"input_shape": sizes, "input_dtype": self.dtype}

    def joined(self, other: InputSpec) -> InputSpec:
        """Merges two specs: sizes that differ may vary, other values that differ become unknown.

        Example:
            >>> InputSpec((5, 3), "float32").joined(InputSpec((7, 3), "float32")).shape
            ((5, 7), 3)
        """
        if isinstance(self.parts, Mapping) and isinstance(other.parts, Mapping):
            if self.parts.keys() == other.parts.keys():
                return InputSpec(parts={key: part.joined(other.parts[key]) for key, part in self.parts.items()})
        elif isinstance(self.parts, tuple) and isinstance(other.parts, tuple):
            if len(self.parts) == len(other.parts):
                return InputSpec(parts=tuple(a.joined(b) for a, b in zip(self.parts, other.parts, strict=True)))
        elif self.shape is not None and other.shape is not None and len(self.shape) == len(other.shape):
            sizes = tuple(_joined_size(a, b) for a, b in zip(self.shape, other.shape, strict=True))
            return InputSpec(sizes, self.dtype if self.dtype == other.dtype else None)
        return InputSpec()

    # ---- use

    @property
    def known(self) -> bool:
        """Whether all shapes are known."""
        return self.shape is not None if self.parts is None else all(part.known for _, part in self._items())

    def _items(self) -> Iterable[tuple[Any, InputSpec]]:
        """The parts by key or place."""
        return self.parts.items() if isinstance(self.parts, Mapping) else enumerate(self.parts or ())

    def _arranged(self, values: Iterable[Any]) -> Any:
        """Values of the parts, in their order, as a dictionary or a tuple."""
        return dict(zip(self.parts, values, strict=True)) if isinstance(self.parts, Mapping) else tuple(values)

    def tensors(self, name: str = "x") -> dict[str, InputSpec]:
        """Spec of each tensor in x by name: ``x`` alone, ``x_ids`` of the key ids, ``x_0`` of the first in a tuple."""
        if self.parts is None:
            return {name: self}
        return {key: spec for place, part in self._items() for key, spec in part.tensors(f"{name}_{place}").items()}

    def paths(self) -> list[list[str | int]]:
        """Path (keys and indices) of each tensor in x, in the order of `tensors`."""
        if self.parts is None:
            return [[]]
        return [[place, *rest] for place, part in self._items() for rest in part.paths()]

    def take_apart(self, x: Any, name: str = "x") -> dict[str, Any]:
        """The tensors of a batch x, by the names of `tensors`."""
        if self.parts is None:
            return {name: x}
        parts = (part.take_apart(x[place], f"{name}_{place}") for place, part in self._items())
        return {key: tensor for found in parts for key, tensor in found.items()}

    def put_together(self, tensors: Mapping[str, Any], name: str = "x") -> Any:
        """Inverse of `take_apart`: a tensor, a dictionary or a tuple."""
        if self.parts is None:
            return tensors[name]
        return self._arranged(part.put_together(tensors, f"{name}_{place}") for place, part in self._items())

    def in_type(self, dtype: torch.dtype) -> InputSpec:
        """The same spec with another dtype for real numbers."""
        if self.parts is not None:
            return InputSpec(parts=self._arranged(part.in_type(dtype) for _, part in self._items()))
        real = self.dtype is not None and getattr(torch, self.dtype).is_floating_point
        return InputSpec(self.shape, str(dtype).removeprefix("torch.") if real else self.dtype)

    @property
    def varies(self) -> bool:
        """Whether a size may vary."""
        return any(isinstance(size, tuple) for spec in self.tensors().values() for size in spec.shape or ())

    def select(self, x: Any) -> Any:
        """A batch without the keys that were absent in training, such as that of the labels.

        Example:
            >>> InputSpec(parts={"ids": InputSpec((2,), "int64")}).select({"ids": 1, "labels": 2})
            {'ids': 1}
        """
        if not isinstance(self.parts, Mapping) or not isinstance(x, Mapping) or self.parts.keys() >= set(x):
            return x
        return {key: x[key] for key in self.parts if key in x}

    def random(self, count: int, *, smallest: bool = False) -> Any:
        """Reproducible random samples (count, ...): standard normal, or zeros and ones for an integer dtype.

        A size that may vary takes its largest value, or its smallest. The first column of integers is 1, so that no
        mask is empty.
        """
        return self._random(count, torch.Generator().manual_seed(0), 0 if smallest else 1)

    def _random(self, count: int, generator: torch.Generator, end: int) -> Any:
        if self.parts is not None:
            return self._arranged(part._random(count, generator, end) for _, part in self._items())
        assert self.shape is not None
        dtype = getattr(torch, self.dtype or "float32")
        sizes = [size[end] if isinstance(size, tuple) else size for size in self.shape]
        if dtype.is_floating_point:
            return torch.randn(count, *sizes, generator=generator).to(dtype)
        numbers = torch.randint(2, (count, *sizes), generator=generator).to(dtype)
        numbers.view(count, -1)[:, :1] = 1
        return numbers

    def check(self, x: Any, name: str = "x") -> None:
        """Checks that x is a batch of such samples, without NaN or infinity; anything but tensors is not checked.

        Raises:
            UserError: x differs; the message names the expected and the given value.
        """
        if self.parts is not None:
            self._check_parts(x, name)
        elif isinstance(x, Tensor):
            self._check_tensor(x, name)
        elif self.shape is not None and isinstance(getattr(x, "shape", None), tuple) and not hasattr(x, "__array__"):
            self._check_shape(tuple(x.shape), name)  # read when it is sliced
        elif self.shape is not None:
            raise UserError(
                f"Expected `{name}` to be a torch tensor, as in training, got {type(x).__name__}. Convert an array by "
                "torch.from_numpy(x)."
            )

    def _check_parts(self, x: Any, name: str) -> None:
        if isinstance(self.parts, Mapping):
            missing = [] if not isinstance(x, Mapping) else [key for key in self.parts if key not in x]
            if missing or not isinstance(x, Mapping):
                got = ", ".join(map(repr, x)) if isinstance(x, Mapping) else type(x).__name__
                keys = ", ".join(map(repr, self.parts))
                raise UserError(f"Expected `{name}` to be a mapping with {keys}, as in training, got {got}.")
            for key, part in self.parts.items():
                part.check(x[key], f"{name}[{key!r}]")
            return
        assert self.parts is not None
        if not isinstance(x, Sequence) or len(x) != len(self.parts):
            got = f"{len(x)}" if isinstance(x, Sequence) else type(x).__name__
            raise UserError(f"Expected `{name}` to be a tuple of {len(self.parts)}, as in training, got {got}.")
        for place, part in enumerate(self.parts):
            part.check(x[place], f"{name}[{place}]")

    def _check_shape(self, shape: tuple[int, ...], name: str) -> None:
        if self.shape is not None and shape[1:] != self.shape and not _fits(shape[1:], self.shape):
            sizes = ", ".join(("B", *map(_size_text, self.shape)))
            raise UserError(
                f"Expected `{name}` of shape ({sizes}), as in training, got {shape}."
                + (f" One sample is {name}[None]." if _fits(shape, self.shape) else "")
            )

    def _check_tensor(self, x: Tensor, name: str) -> None:
        self._check_shape(tuple(x.shape), name)
        if self.dtype is not None and str(x.dtype) != f"torch.{self.dtype}":
            raise UserError(
                f"Expected `{name}` of dtype {self.dtype}, as in training, got {x.dtype}. Convert it before."
            )
        # A sum is the cheapest pass over x that propagates NaN and infinity. Finite values may overflow in it; the
        # samples are then checked one by one.
        if (x.is_floating_point() or x.is_complex()) and not cmath.isfinite(x.sum().item()):
            _refuse_nan(x, name)


def _joined_size(a: Size, b: Size) -> Size:
    (low, high), (least, most) = (size if isinstance(size, tuple) else (size, size) for size in (a, b))
    low, high = min(low, least), max(high, most)
    return low if low == high else (low, high)


def _fits(sizes: Sequence[int], allowed: tuple[Size, ...]) -> bool:
    """Whether sizes are allowed; one that varies may be of any length."""
    return len(sizes) == len(allowed) and all(
        isinstance(b, tuple) or a == b for a, b in zip(sizes, allowed, strict=True)
    )


def _size_text(size: Size) -> str:
    return "any" if isinstance(size, tuple) else str(size)


def _refuse_nan(x: Tensor, name: str) -> None:
    wrong = ~torch.isfinite(x.detach()).flatten(1).all(1) if x.ndim > 1 else ~torch.isfinite(x.detach())
    if count := int(wrong.sum()):
        raise UserError(
            f"Expected `{name}` without NaN or infinity, got {count} such samples of {len(x)}, the first at index "
            f"{int(wrong.nonzero()[0])}. Fix or leave out these samples."
        )


def call_on(module: nn.Module, x: Any) -> Any:
    """Calls a module on x, which may be unpacked into several arguments.

    A mapping is passed as keyword arguments if the module's `forward` names its keys, a tuple as positional arguments
    if `forward` requires several.

    Example:
        >>> class Sum(nn.Module):
        ...     def forward(self, a, b):
        ...         return a + b
        >>> call_on(Sum(), {"a": torch.ones(2), "b": torch.ones(2)})
        tensor([2., 2.])
    """
    if not takes_parts(module, x):
        return module(x)
    return module(**x) if isinstance(x, Mapping) else module(*x)


def takes_parts(module: nn.Module, x: Any) -> bool:
    """Whether a module's `forward` takes x unpacked: its parameters are named as the keys, or it requires several."""
    if not isinstance(x, Mapping | tuple | list) or isinstance(x, PackedSequence):
        return False
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # of a scripted module, for example
        return False
    return _names(parameters, x) if isinstance(x, Mapping) else _requires_several(parameters)


def _requires_several(parameters: Mapping[str, inspect.Parameter]) -> bool:
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in by_place and p.default is p.empty for p in parameters.values()) > 1


def _names(parameters: Mapping[str, inspect.Parameter], keys: Iterable[str]) -> bool:
    """Whether the parameters include these names, or one of them and `**kwargs` for the others."""
    rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    return named.issuperset(keys) or (rest and (not named or bool(named.intersection(keys))))


@dataclass(frozen=True)
class Expectation:
    """Images that a network was trained on: per-channel mean and sd of pixels in 0 … 1, and size (H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]


def expectation_of(network: nn.Module) -> Expectation | None:
    """The attribute `expects` of a network, if it is an `Expectation`."""
    found = getattr(network, "expects", None)
    return found if isinstance(found, Expectation) else None
