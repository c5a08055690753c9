"""Fingerprints of samples: of dataset items, and of the rows of a batch on any device.

Integers and text are compared exactly, real numbers up to rounding: a run may resume on a processor where a transform
rounds differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from bdistil.utils.trees import fields_of

# Bounds on the number of samples compared at the start of a run, which is one in a hundred.
FEWEST, MOST = 16, 64
# Maximum number of values per row in a sketch; longer rows are subsampled at equal distances.
LONGEST = 1 << 16
# Largest difference of two sketches that counts as rounding. A change of all real numbers by 0.1 % is about 1e-3.
ROUNDING = 2e-4
# An odd multiplier that scatters integers over 64 bits (2^64 over the golden ratio).
SCATTER = -7046029254386353131

Digest = tuple[str, float]  # hash of the exact content, and the sketch of the real numbers
Digests = dict[str, Digest | None]


class Items(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """One sample."""


# ---- digests of items


def spread(samples: int, count: int | None = None) -> list[int]:
    """Numbers of samples evenly spread over a dataset, including its first and last.

    >>> spread(5), spread(1000, 3)
    ([0, 1, 2, 3, 4], [0, 500, 999])
    """
    count = min(samples, count or max(FEWEST, min(MOST, samples // 100)))
    return sorted({round(place) for place in np.linspace(0, samples - 1, count).tolist()})


def digests(item: Any) -> Digests:
    """Digest of each element of an item: of x and y of a pair, of each value of a mapping.

    >>> digests((torch.zeros(2), 3)) == digests((torch.zeros(2), 3))
    True
    >>> [key for key, value in digests({"image": 1, "label": 2}).items()]
    ['image', 'label']
    """
    return {name: _digest(value) for name, value in _elements(item).items()}


def _elements(item: Any) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {str(key): value for key, value in item.items()}
    if isinstance(item, tuple | list):
        names = ["x", "y", *(f"value {number}" for number in range(2, len(item)))]
        return dict(zip(names, item, strict=False))
    return {"x": item}


def _digest(value: Any) -> Digest:
    found, reals = hashlib.blake2b(digest_size=8), []
    for piece in _pieces(value):
        if isinstance(piece, Tensor):
            reals.append(piece)
        else:
            found.update(len(piece).to_bytes(8, "little"))
            found.update(piece)
    return found.hexdigest(), float(row_sketches([real[None] for real in reals], 1)[0])


def _pieces(value: Any) -> Iterator[bytes | Tensor]:
    """The content of a value: real numbers as tensors, the rest as bytes; of an unknown type, only its name."""
    if isinstance(value, Tensor | np.ndarray | np.generic | float):
        yield from _number_pieces(value)
    elif value is None or isinstance(value, str | bytes | bool | int | complex):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, Sequence | Set):
        yield str(len(value)).encode()
        for entry in sorted(value, key=str) if isinstance(value, Set) else value:
            yield from _pieces(entry)
    elif hasattr(value, "__array_interface__"):  # an image of PIL
        yield from _pieces(np.asarray(value))
    elif (fields := fields_of(value)) is not None:
        yield from _pieces(fields)
    else:
        yield type(value).__qualname__.encode()


def _number_pieces(value: Tensor | np.ndarray[Any, Any] | np.generic | float) -> Iterator[bytes | Tensor]:
    """The content of numeric values: dtype and shape, then real numbers as a tensor, integers as bytes."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biufc":
        yield repr(value.tolist()).encode()
        return
    numbers = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    yield f"{numbers.dtype} {tuple(numbers.shape)}".encode()
    if numbers.layout is not torch.strided or numbers.is_quantized:
        return
    real = numbers.is_floating_point() or numbers.is_complex()
    yield numbers if real else numbers.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_digests(dataset: Items, numbers: Sequence[int]) -> dict[int, Digests]:
    """Digests of the samples with the given numbers."""
    return {number: digests(dataset[number]) for number in numbers}


def stable_digests(dataset: Items, numbers: Sequence[int]) -> dict[int, Digests]:
    """Digests of the given samples; None for elements that differ between two reads of any of them."""
    first, second = read_digests(dataset, numbers), read_digests(dataset, numbers)
    random = {name for number in numbers for name in changed(first[number], second[number])}
    return {
        number: {name: None if name in random else value for name, value in found.items()}
        for number, found in first.items()
    }


def changed(before: Digests, now: Digests) -> list[str]:
    """Names of the elements that differ or are missing on one side; elements without a digest are ignored."""
    names = [*before, *(name for name in now if name not in before)]
    return [name for name in names if not _same(before.get(name, MISSING), now.get(name, MISSING))]


MISSING: Digest = ("", 0.0)


def _same(first: Digest | None, second: Digest | None) -> bool:
    if first is None or second is None:
        return True
    return first[0] == second[0] and bool(same_sketch(torch.tensor(first[1]), torch.tensor(second[1])))


# ---- sketches of the rows of a batch


def same_sketch(first: Tensor, second: Tensor) -> Tensor:
    """Whether sketches are equal up to rounding; those of NaN and infinity are equal."""
    return ((first - second).abs() <= ROUNDING) | ~(first.isfinite() | second.isfinite())


def row_sketches(tree: Any, count: int) -> Tensor:
    """One float32 per row of a batch, (B,), that differs if the rows do; on the device of the batch.

    It sums, over the tensors, the projection of the row's direction on random signs and the logarithm of its norm; for
    a single number, its asinh. Zeros at the end of a row have no effect.

    Args:
        tree: tensors (B, ...) in lists, tuples and mappings; anything else is left out.
        count: B.
    """
    total: Tensor | None = None
    for number, leaf in enumerate(leaves(tree)):
        if leaf.ndim and len(leaf) == count and leaf.numel():
            sketch = _sketch(_reals(leaf), number)
            total = sketch if total is None else total + sketch.to(total.device)
    return torch.zeros(count) if total is None else total


def _sketch(numbers: Tensor, salt: int) -> Tensor:
    """Sketch (B,) of rows (B, D), or of single numbers (B,)."""
    if numbers.ndim == 1:
        return torch.asinh(numbers).float()
    projection = (numbers * _signs(numbers.shape[1], salt, numbers.device)).sum(1)
    length = torch.linalg.vector_norm(numbers, dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
    return projection.div_(length).add_(length.log_()).float()


def _reals(leaf: Tensor) -> Tensor:
    """Rows of a tensor as real numbers (B, D), or (B,); integers are scattered, 0 stays 0."""
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    if leaf.ndim > 1:
        leaf = leaf.flatten(1)
        leaf = leaf[:, :: -(-leaf.shape[1] // LONGEST)]  # some of the columns of long rows
    if leaf.is_floating_point():
        return leaf if leaf.dtype in (torch.float32, torch.float64) else leaf.float()
    return (leaf.long() * SCATTER >> 40).float() / (1 << 23)


@lru_cache(maxsize=16)
def _signs(count: int, salt: int, device: torch.device) -> Tensor:
    """Random signs (D,), float32."""
    drawn = np.random.default_rng([salt, 0x5EED]).integers(0, 2, count)
    return torch.from_numpy(drawn * 2 - 1).float().to(device)


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and mappings; packed sequences are padded by zeros.

    Not those of graphs and other objects, whose first dimension is seldom that of the samples.
    """
    if isinstance(tree, Tensor):
        yield tree.detach() if tree.requires_grad else tree
    elif isinstance(tree, PackedSequence):
        yield from pad_packed_sequence(tree, batch_first=True)
    elif isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
        yield torch.as_tensor(tree)
    elif isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from leaves(tree[key])
    elif isinstance(tree, tuple | list):
        for entry in tree:
            yield from leaves(entry)
