"""What is known of x: of a batch, in a record, of several parts; and the call of a module with a mapping."""

import json
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from bdistil.errors import UserError
from bdistil.models.inputs import InputSpec, call_on

NESTED = {"ids": torch.zeros(2, 5, dtype=torch.int64), "more": (torch.zeros(2, 3), torch.zeros(2))}


def test_of_a_batch_and_back_from_a_record():
    spec = InputSpec.of_batch(NESTED)
    assert spec.parts["ids"] == InputSpec((5,), "int64")
    assert spec.parts["more"] == InputSpec(parts=(InputSpec((3,), "float32"), InputSpec((), "float32")))
    longer = spec.joined(InputSpec.of_batch({**NESTED, "ids": torch.zeros(2, 9, dtype=torch.int64)}))
    assert longer.parts["ids"].shape == ((5, 9),)
    for given in (spec, longer, InputSpec((3,), "float32"), InputSpec()):
        assert InputSpec.of(json.loads(json.dumps(given.to_record()))) == given
    assert longer.varies
    assert not spec.varies


def test_a_record_of_an_earlier_version():
    assert InputSpec.of({"input_shape": [1, 8, 8], "input_dtype": "float32"}) == InputSpec((1, 8, 8), "float32")
    assert InputSpec.of({"input_shape": None, "input_dtype": None}) == InputSpec() == InputSpec.of({})


def test_what_differs_is_unknown():
    spec = InputSpec((5,), "float32")
    assert spec.joined(InputSpec((5,), "int64")) == InputSpec((5,), None)
    assert spec.joined(InputSpec((5, 1), "float32")) == InputSpec()
    assert spec.joined(InputSpec.of_batch(NESTED)) == InputSpec()
    assert InputSpec.of_batch({"a": torch.zeros(1)}).joined(InputSpec.of_batch({"b": torch.zeros(1)})) == InputSpec()
    assert InputSpec.of_batch(pack_sequence([torch.zeros(3)])) == InputSpec.of_batch(object()) == InputSpec()
    assert not InputSpec().known
    assert InputSpec.of_batch({"a": torch.zeros(1, 2), "file": ["x.png"]}).parts["file"] == InputSpec()
    assert InputSpec.of_batch(NESTED).known
    assert not InputSpec.of_batch({"a": torch.zeros(1), "b": object()}).known


def test_tensors_by_name():
    spec = InputSpec.of_batch(NESTED)
    names = ["x_ids", "x_more_0", "x_more_1"]
    assert list(spec.tensors()) == names
    assert spec.paths() == [["ids"], ["more", 0], ["more", 1]]
    assert list(spec.take_apart(NESTED)) == names
    assert spec.take_apart(NESTED)["x_more_1"] is NESTED["more"][1]
    again = spec.put_together(spec.take_apart(NESTED))
    assert list(again) == list(NESTED)
    assert again["more"][0] is NESTED["more"][0]
    assert InputSpec((3,), "float32").take_apart("anything") == {"x": "anything"}
    assert InputSpec((3,), "float32").put_together({"x": 1}) == 1
    assert InputSpec().paths() == [[]]


def test_random_samples_have_the_structure():
    spec = InputSpec.of_batch(NESTED).joined(
        InputSpec.of_batch({**NESTED, "ids": torch.zeros(2, 8, dtype=torch.int64)})
    )
    x = spec.random(7)
    assert x["ids"].shape == (7, 8)
    assert spec.random(7, smallest=True)["ids"].shape == (7, 5)
    assert set(x["ids"].unique().tolist()) == {0, 1}
    assert (x["ids"][:, 0] == 1).all()  # no mask is empty
    assert torch.equal(x["more"][0], spec.random(7)["more"][0])
    assert InputSpec((), "int64").random(3).tolist() == [1, 1, 1]
    spec.check(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["ids"], "`x` to be a mapping with 'ids', 'more', as in training, got Tensor"),
        (lambda x: {"ids": x["ids"]}, "`x` to be a mapping with 'ids', 'more', as in training, got 'ids'"),
        (lambda x: {**x, "more": x["more"][:1]}, r"`x\['more'\]` to be a tuple of 2, as in training, got 1"),
        (
            lambda x: {**x, "more": (x["more"][0][:, :2], x["more"][1])},
            r"`x\['more'\]\[0\]` of shape \(B, 3\), .*\(2, 2\)",
        ),
        (lambda x: {**x, "ids": x["ids"].int()}, r"`x\['ids'\]` of dtype int64, as in training, got torch\.int32"),
        (lambda x: {**x, "ids": x["ids"].numpy()}, r"`x\['ids'\]` to be a torch tensor.* got ndarray.*from_numpy"),
        (lambda x: {**x, "more": (x["more"][0] / 0, x["more"][1])}, r"`x\['more'\]\[0\]` without NaN.* index 0"),
    ],
)
def test_an_x_that_differs_is_named(change, message):
    spec = InputSpec.of_batch(NESTED)
    spec.check(NESTED)
    spec.check(UserDict(NESTED))
    with pytest.raises(UserError, match=message):
        spec.check(change(NESTED))


def test_nan_of_complex_numbers_is_refused():
    spec = InputSpec((2,), "complex64")
    spec.check(torch.ones(3, 2, dtype=torch.complex64))
    with pytest.raises(UserError, match="`x` without NaN or infinity, got 1 such samples of 3, the first at index 2"):
        spec.check(torch.tensor([[1, 1], [1, 1], [1, complex(0, float("nan"))]], dtype=torch.complex64))


def test_a_size_that_varies_is_free_and_the_others_are_not():
    spec = InputSpec(((2, 6), 8), "float32")
    spec.check(torch.zeros(3, 9, 8))
    with pytest.raises(UserError, match=r"of shape \(B, any, 8\), as in training, got \(3, 9, 7\)"):
        spec.check(torch.zeros(3, 9, 7))
    with pytest.raises(UserError, match=r"got \(9, 8\)\. One sample is x\[None\]"):
        spec.check(torch.zeros(9, 8))


class Named(nn.Module):
    def forward(self, ids, mask=None):
        return ids if mask is None else ids * mask


class Two(nn.Module):
    def forward(self, a, b, c=1):
        return a * b * c


class First(nn.Module):
    def forward(self, x, scale=1):
        return x[0] * scale


class Open(nn.Module):
    def forward(self, ids, **others):
        return ids + len(others)


class Single(nn.Module):
    def forward(self, x):
        return x["ids"] + 100


@pytest.mark.parametrize(
    ("module", "x", "expected"),
    [
        (Named(), {"ids": 2, "mask": 3}, 6),
        (Named(), {"ids": 2}, 2),
        (Open(), {"ids": 2, "mask": 3, "kinds": 1}, 4),
        (Open(), UserDict(ids=2), 2),
        (Single(), {"ids": 2, "mask": 3}, 102),
        (Single(), {"ids": 2}, 102),
        (Named(), 5, 5),
        (Two(), (2, 3), 6),
        (Two(), [2, 3], 6),
        (First(), (2, 3), 2),
    ],
)
def test_a_module_is_given_x_or_its_parts(module, x, expected):
    assert call_on(module, x) == expected


def test_x_that_is_read_as_it_comes_in():
    class Sensor:
        shape = (1, 50, 6)

        def __getitem__(self, where):
            raise AssertionError("nothing is read by the check")

    InputSpec((50, 6), "float32").check(Sensor())
    with pytest.raises(UserError, match=r"of shape \(B, 40, 6\), as in training, got \(1, 50, 6\)"):
        InputSpec((40, 6), "float32").check(Sensor())
    with pytest.raises(UserError, match=r"torch\.from_numpy"):
        InputSpec((50, 6), "float32").check(np.zeros((1, 50, 6), np.float32))
