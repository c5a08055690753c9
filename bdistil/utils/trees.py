"""Row operations on nested batches: tensors and packed sequences in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence

from bdistil.errors import UserError

LEAVES = (Tensor, PackedSequence)
PLAIN = (str, bytes, int, float, bool, type(None))


def leaves_of(x: Any) -> list[Any]:
    """The tensors and packed sequences of a batch, in the order of its structure."""
    found: list[Any] = []
    apply_to_collection(x, LEAVES, found.append)
    return found


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """The parts of a dataclass, or of an object with `to_dict` such as a graph of PyG; None for anything else."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.to_dict() if callable(getattr(value, "to_dict", None)) else None


def device_of(x: Any) -> torch.device:
    """Device of a batch; the CPU where it holds no tensor."""
    leaves = leaves_of(x) if not isinstance(x, Tensor) else [x]
    first = leaves[0] if leaves else torch.empty(0)
    return (first.data if isinstance(first, PackedSequence) else first).device


def row_count(x: Any) -> int:
    """Number of samples B of a batch, the common length of its tensors; 0-d tensors are shared by all samples.

    Raises:
        UserError: the lengths differ or there are none, so the batch cannot be split into samples.

    Example:
        >>> row_count({"ids": torch.zeros(3, 7), "mask": torch.zeros(3, 7)})
        3
    """
    if isinstance(x, Tensor) and x.ndim:
        return len(x)
    counts = [_length(leaf) for leaf in leaves_of(x) if isinstance(leaf, PackedSequence) or leaf.ndim]
    if len(set(counts)) != 1:
        shapes = " and ".join(str(tuple(leaf.data.shape)) for leaf in leaves_of(x)) or "no shape"
        raise UserError(
            f"Expected `x` to hold tensors with one row per sample, got {type(x).__name__} with tensors of {shapes}: "
            "one sample cannot be cut out of it. "
            "Give x as a tensor, a packed sequence, or a tuple or mapping of tensors (B, ...)."
        )
    return counts[0]


def _length(leaf: Tensor | PackedSequence) -> int:
    return int(leaf.batch_sizes[0]) if isinstance(leaf, PackedSequence) else len(leaf)


def take_rows(x: Any, rows: Tensor | slice) -> Any:
    """Selects samples of a batch and keeps its structure; lists of B plain values are indexed likewise.

    Args:
        x: a batch (B, ...).
        rows: sample numbers (n,) int64 on the device of x, or a slice.

    Raises:
        UserError: see `row_count`.

    Example:
        >>> take_rows((torch.arange(4), ["a", "b", "c", "d"]), slice(1, 3))
        (tensor([1, 2]), ['b', 'c'])
    """
    if isinstance(x, Tensor):
        return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    count = row_count(x)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, list):
            if len(leaf) == count and all(isinstance(value, PLAIN) for value in leaf):
                return [leaf[row] for row in torch.arange(count)[rows if isinstance(rows, slice) else rows.cpu()]]
            return [apply_to_collection(value, (*LEAVES, list), take) for value in leaf]
        if isinstance(leaf, PackedSequence):
            return _packed_rows(leaf, rows)
        return take_rows(leaf, rows) if leaf.ndim else leaf

    return apply_to_collection(x, (*LEAVES, list), take)


def _packed_rows(packed: PackedSequence, rows: Tensor | slice) -> PackedSequence:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    lengths = lengths[rows if isinstance(rows, slice) else rows.to(lengths.device)]
    if not len(lengths):  # torch packs no empty batch
        return PackedSequence(packed.data[:0], packed.batch_sizes[:0])
    return pack_padded_sequence(padded[rows], lengths, batch_first=True, enforce_sorted=False)


def map_tensors(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to each tensor of a batch and keeps the structure."""
    return function(x) if isinstance(x, Tensor) else apply_to_collection(x, Tensor, function)


def python_numbers(value: Any) -> Any:
    """A value with the NumPy numbers in dictionaries, lists and tuples as Python's; other objects stay as they are.

    >>> python_numbers({"lr": [np.float64(0.5)], "names": ("a",)})
    {'lr': [0.5], 'names': ('a',)}
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: python_numbers(item) for key, item in value.items()}
    return type(value)(map(python_numbers, value)) if type(value) in (list, tuple) else value


def joined_rows(batches: Sequence[Any]) -> Any:
    """Concatenates batches of the same structure, with zero-padding if the lengths of their samples differ.

    Example:
        >>> joined_rows([{"ids": torch.ones(1, 2)}, {"ids": torch.ones(1, 3)}])["ids"].tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    columns = [leaves_of(batch) for batch in batches]
    joined = iter([_joined(parts) for parts in zip(*columns, strict=True)])
    return apply_to_collection(batches[0], LEAVES, lambda _: next(joined))


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], PackedSequence):
        rows = [row for part in parts for row in _unpacked(part)]
        lengths = torch.tensor([len(row) for row in rows])
        return pack_padded_sequence(pad_sequence(rows, True), lengths, batch_first=True, enforce_sorted=False)
    if parts[0].ndim == 0 or all(part.shape[1:] == parts[0].shape[1:] for part in parts):
        return parts[0] if parts[0].ndim == 0 else torch.cat(list(parts))
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *shape)
    low = 0
    for part in parts:
        room = (slice(low, low + len(part)), *map(slice, part.shape[1:]))
        whole[room] = part
        low += len(part)
    return whole


def _unpacked(packed: PackedSequence) -> list[Tensor]:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]
