"""Fingerprints differ where samples do, and only there: not by rounding, padding with zeros, process or device."""

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pack_sequence

from bdistil.data.loaders.fingerprints import (
    changed,
    digests,
    leaves,
    row_sketches,
    same_sketch,
    spread,
    stable_digests,
)

X = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))


@dataclass
class Record:
    signal: torch.Tensor
    speaker: str


def image(value):
    return Image.fromarray(np.full((4, 4, 3), value, np.uint8))


ITEMS = {
    "tensor": ((X[0], 1), (X[1], 1)),
    "one number": ((X[0], 1), (X[0] + torch.eye(5, 3) * 0.1, 1)),
    "scaled": ((X[0], 1), (X[0] * 2, 1)),
    "shape": ((X[0], 1), (X[0].flatten(), 1)),
    "type": ((torch.tensor([1]), 1), (torch.tensor([1.0]), 1)),
    "token": ((torch.arange(9), 1), (torch.tensor([0, 1, 2, 3, 5, 4, 6, 7, 8]), 1)),
    "array": ((X[0].numpy(), 1), (X[1].numpy(), 1)),
    "array of texts": ((np.array(["a"]), 1), (np.array(["b"]), 1)),
    "image": ((image(3), 1), (image(4), 1)),
    "text": (("a", 1), ("b", 1)),
    "number": ((1.5, 1), (1.6, 1)),
    "nested": (({"a": [X[0], (2, "b")]}, 1), ({"a": [X[0], (3, "b")]}, 1)),
    "set": (({"a", "b"}, 1), ({"a", "c"}, 1)),
    "dataclass": ((Record(X[0], "a"), 1), (Record(X[0], "b"), 1)),
}


@pytest.mark.parametrize("name", ITEMS)
def test_items_that_differ(name):
    first, second = ITEMS[name]
    assert changed(digests(first), digests(second)) == ["x"]
    assert changed(digests(first), digests(copy.deepcopy(first))) == []


def test_the_elements_of_an_item_have_names():
    assert changed(digests((X[0], 1)), digests((X[0], 2))) == ["y"]
    assert changed(digests((X[0], 1, "a")), digests((X[0], 1, "b"))) == ["value 2"]
    assert changed(digests({"ids": X[0], "labels": 1}), digests({"ids": X[0], "labels": 2})) == ["labels"]
    assert changed(digests({"ids": X[0]}), digests({"ids": X[0], "mask": 1})) == ["mask"]
    assert changed(digests(X[0]), digests(X[1])) == ["x"]


def test_rounding_on_another_processor_is_no_change():
    other = X * (1 + 3e-7 * torch.randn(X.shape))
    assert not torch.equal(other, X)
    assert changed(digests((X[0], 0)), digests((other[0], 0))) == []
    assert same_sketch(row_sketches(X, 6), row_sketches(other, 6)).all()


def test_random_elements_are_not_compared():
    found = stable_digests([(X[n], n) for n in range(6)], [0, 3])
    assert None not in found[0].values()

    class Noisy:
        def __getitem__(self, number):
            return X[number] + (random.random() if number == 3 else 0), number

    noisy = stable_digests(Noisy(), [0, 3])
    assert noisy[0]["x"] is noisy[3]["x"] is None
    assert changed(noisy[0], digests((X[5], 0))) == []
    assert changed(noisy[0], digests((X[0], 7))) == ["y"]


@pytest.mark.parametrize("samples", [1, 2, 15, 16, 17, 250, 10_000, 1_281_167])
def test_samples_that_are_compared_are_spread(samples):
    numbers = spread(samples)
    assert len(numbers) == len(set(numbers)) == min(samples, max(16, min(64, samples // 100)))
    assert (numbers[0], numbers[-1]) == (0, samples - 1)


BATCHES = {
    "tensor": X,
    "half": X.half(),
    "double": X.double(),
    "complex": torch.view_as_complex(X[..., :2].contiguous()),
    "tokens": torch.arange(24).view(6, 4),
    "bytes": (X > 0).to(torch.uint8),
    "flags": X > 0,
    "column": torch.arange(6.0) + 1,
    "array": X.numpy(),
    "mapping": {"a": X, "b": [torch.arange(6), "text"], "shared": torch.ones(2)},
}


@pytest.mark.parametrize("name", BATCHES)
def test_each_row_has_a_sketch_of_its_own(name):
    found = row_sketches(BATCHES[name], 6)
    assert found.shape == (6,)
    apart = ~same_sketch(found[:, None], found[None])
    assert torch.equal(apart, ~torch.eye(6, dtype=torch.bool)), found


def test_rows_in_another_batch_have_the_same_sketches():
    order = torch.tensor([4, 1, 5])
    assert same_sketch(row_sketches(X[order], 3), row_sketches(X, 6)[order]).all()


def test_zeros_at_the_end_do_not_count():
    sequences = [X[0], X[1, :2], X[2, :4]]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    alone = torch.cat([row_sketches(row[None], 1) for row in sequences])
    assert same_sketch(row_sketches(padded, 3), alone).all()
    packed = pack_sequence(sequences, enforce_sorted=False)
    rows = [pack_sequence([row]) for row in sequences]
    assert same_sketch(row_sketches(packed, 3), torch.cat([row_sketches(row, 1) for row in rows])).all()


def test_long_rows_are_sketched_at_equal_distances():
    long = torch.randn(2, 200_000)
    assert not same_sketch(*row_sketches(long, 2))
    assert not same_sketch(row_sketches(long, 2), row_sketches(long + 0.01, 2)).any()


def test_not_a_number_is_equal_to_itself():
    x = X.clone()
    x[2, 0, 0] = torch.nan
    assert same_sketch(row_sketches(x, 6), row_sketches(x, 6)).all()
    assert same_sketch(row_sketches(x, 6), row_sketches(X, 6)).tolist() == [True, True, False, True, True, True]


def test_what_is_no_tensor_is_left_out():
    assert [*leaves(["a", None, object()])] == []
    assert row_sketches(None, 3).tolist() == [0, 0, 0]
