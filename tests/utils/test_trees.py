"""Rows of batches of any structure: what is taken, joined and refused."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from bdistil.errors import UserError
from bdistil.utils.trees import device_of, joined_rows, leaves_of, map_tensors, row_count, take_rows

A, B = torch.arange(12.0).view(4, 3), torch.arange(4)
Point = namedtuple("Point", "a b")


@dataclass
class Record:
    a: torch.Tensor
    name: str


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (A, A[1:3]),
        ((A, B), (A[1:3], B[1:3])),
        ([A, [B, "shared"]], [A[1:3], [B[1:3], "shared"]]),
        ({"a": A, "n": ["k", "l", "m", "n"]}, {"a": A[1:3], "n": ["l", "m"]}),
        ({"a": A, "scale": torch.tensor(2.0), "none": None}, {"a": A[1:3], "scale": torch.tensor(2.0), "none": None}),
        (UserDict(a=A), UserDict(a=A[1:3])),
        (Point(A, B), Point(A[1:3], B[1:3])),
        (Record(A, "x"), Record(A[1:3], "x")),
    ],
    ids=["tensor", "tuple", "list", "plain values", "shared", "UserDict", "namedtuple", "dataclass"],
)
@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([1, 2])], ids=["slice", "numbers"])
def test_rows_are_taken_in_the_structure_of_x(x, expected, rows):
    found = take_rows(x, rows)
    assert type(found) is type(x)
    torch.testing.assert_close(leaves_of(found), leaves_of(expected))
    assert str(found) == str(expected)


def test_nothing_is_taken_in_place():
    x = {"a": A.clone(), "n": [1, 2, 3, 4]}
    take_rows(x, slice(1))
    assert torch.equal(x["a"], A)
    assert len(x["n"]) == 4


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((A, B[:3]), r"got tuple with tensors of \(4, 3\) and \(3,\): one sample cannot be cut out"),
        (object(), "got object with tensors of no shape"),
        ({"n": [1, 2]}, "got dict with tensors of no shape"),
        ([], "one sample cannot be cut out"),
    ],
)
def test_a_batch_without_a_number_of_samples_is_named(x, message):
    with pytest.raises(UserError, match=message):
        row_count(x)
    with pytest.raises(UserError, match=message):
        take_rows(x, slice(1))


def rows_of(packed):
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return [row[:length].tolist() for row, length in zip(padded, lengths, strict=True)]


def test_packed_sequences():
    rows = [[1.0], [2.0, 3.0, 4.0], [5.0, 6.0]]
    packed = pack_sequence([torch.tensor(row) for row in rows], enforce_sorted=False)
    assert row_count(packed) == row_count((packed, torch.zeros(3))) == 3
    assert device_of({"x": packed}) == torch.device("cpu")
    assert rows_of(take_rows(packed, slice(1, None))) == rows[1:]
    assert rows_of(take_rows((packed, B[:3]), torch.tensor([2, 0]))[0]) == [rows[2], rows[0]]
    assert rows_of(joined_rows([packed, take_rows(packed, slice(1))])) == [*rows, rows[0]]
    assert isinstance(take_rows(packed, slice(0)), PackedSequence)
    doubled = map_tensors(packed, lambda tensor: 2 * tensor if tensor.is_floating_point() else tensor)
    assert rows_of(doubled)[0] == [2.0]


def test_batches_of_other_lengths_are_joined_with_zeros():
    first, second = {"a": torch.ones(2, 2, 1), "b": torch.ones(2)}, {"a": torch.ones(1, 3, 1), "b": torch.zeros(1)}
    joined = joined_rows([first, second])
    assert joined["a"].shape == (3, 3, 1)
    assert joined["a"].squeeze(-1).tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert joined["b"].tolist() == [1, 1, 0]
