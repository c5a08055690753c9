"""Fingerprints of samples: digests of items as a dataset gives them, and hashes of the rows of a batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

# Samples that are compared at the start of a fit: one in a hundred, but at least and at most as many.
FEWEST, MOST = 16, 64
# Numbers of a row that are hashed; of a longer one, numbers at equal distances.
LONGEST = 1 << 16

Digests = dict[str, str | None]


class Items(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """One sample."""


# ---- digests of items


def spread(samples: int, count: int | None = None) -> list[int]:
    """Numbers of some samples that are evenly spread over a dataset, its first and its last among them.

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


def _digest(value: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for piece in _pieces(value):
        found.update(len(piece).to_bytes(8, "little"))
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    """The content of a value as bytes. Of an object of an unknown type, only the type counts."""
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, Sequence | Set):
        yield str(len(value)).encode()
        for entry in sorted(value, key=str) if isinstance(value, Set) else value:
            yield from _pieces(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _pieces({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif hasattr(value, "__array_interface__"):  # an image of PIL
        yield from _pieces(np.asarray(value))
    else:
        yield type(value).__qualname__.encode()


def read_digests(dataset: Items, numbers: Sequence[int]) -> dict[int, Digests]:
    """Digests of some samples."""
    return {number: digests(dataset[number]) for number in numbers}


def stable_digests(dataset: Items, numbers: Sequence[int]) -> dict[int, Digests]:
    """Digests of some samples; None for elements that differ between two readings of one of them."""
    first, second = read_digests(dataset, numbers), read_digests(dataset, numbers)
    random = {name for number in numbers for name in changed(first[number], second[number])}
    return {
        number: {name: None if name in random else value for name, value in found.items()}
        for number, found in first.items()
    }


def changed(before: Digests, now: Digests) -> list[str]:
    """Names of the elements that differ, or are missing in one of both; elements without a digest do not count."""
    names = [*before, *(name for name in now if name not in before)]
    known = [name for name in names if not (before.get(name, "") is None or now.get(name, "") is None)]
    return [name for name in known if before.get(name) != now.get(name)]


# ---- hashes of the rows of a batch


def row_hashes(tree: Any, count: int, rows: slice = slice(None)) -> Tensor:
    """Hash of rows of a batch: shape (R,) int64, on the device of the batch.

    A sum of the row's numbers with random odd weights, modulo 2^64: the same on every device, and zeros at the end of a
    row do not count.

    Args:
        tree: tensors (B, ...) in lists, tuples and mappings; anything else is left out.
        count: B.
        rows: R of the B rows; all of them by default.
    """
    total: Tensor | None = None
    for number, leaf in enumerate(leaves(tree)):
        if leaf.ndim and len(leaf) == count and leaf.numel():
            numbers = integers(leaf[rows]).flatten(1) if leaf.ndim > 1 else integers(leaf[rows]).unsqueeze(1)
            numbers = numbers[:, :: -(-numbers.shape[1] // LONGEST)]
            part = (numbers * _weights(numbers.shape[1], number, leaf.device)).sum(1)
            total = part if total is None else total + part.to(total.device)
    return torch.zeros(len(range(count)[rows]), dtype=torch.int64) if total is None else total


def row_size(tree: Any, count: int) -> int:
    """Number of numbers in a row of a batch."""
    return sum(leaf.numel() // count for leaf in leaves(tree) if leaf.ndim and len(leaf) == count)


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and mappings; packed sequences are padded by zeros."""
    if isinstance(tree, Tensor):
        yield tree.detach()
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


def integers(leaf: Tensor) -> Tensor:
    """Numbers of a tensor as integers: real numbers by their bits."""
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    if not leaf.is_floating_point():
        return leaf
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return leaf.contiguous().view(kinds[leaf.element_size()])


@lru_cache(maxsize=16)
def _weights(count: int, salt: int, device: torch.device) -> Tensor:
    """Random odd numbers (count,) int64."""
    drawn = np.random.default_rng([salt, 0x5EED]).integers(-(1 << 63), 1 << 63, count, dtype=np.int64)
    return torch.from_numpy(drawn | 1).to(device)
