"""An API that fails: a real server on loopback misbehaves, and is asked again or refused."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.api_toys import FEATURES, OUTPUTS, WEIGHTS, inputs, logits_of

from bdistil import RunError, UserError


@pytest.mark.parametrize("fault", [500, 429, 503, "slow", "hang up"])
def test_what_passes_is_asked_again(api, make, fault):
    api.faults = [None, fault, fault]
    teacher = make(api)
    assert np.allclose(teacher(inputs(8)), inputs(8).numpy() @ WEIGHTS, atol=1e-5)
    assert len(api.requests) == 4
    assert len(set(api.answered)) == len(api.answered) == 8
    # A refusal is no query; of a silence nobody knows, so it counts.
    assert teacher.queries == (8 if isinstance(fault, int) else 16)


def test_waits_double_and_heed_what_the_api_asks_for(api, make, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    api.faults = [500, 500, 429, 500]
    make(api, backoff=0.002)(inputs(1))
    assert waits == [0.002, 0.004, 0.01, 0.016]


def test_what_does_not_pass_stops_with_everything_kept(api, make):
    api.faults = [None, *[500] * 3]
    with pytest.raises(RunError, match=r"no answer in 3 attempts; last: HTTP status 500\. Every answer so far is kept"):
        make(api, retries=2)(inputs(8))
    assert api.requests == [4, 4, 4, 4]
    again = make(api)
    again(inputs(8))
    assert len(set(api.answered)) == len(api.answered) == again.queries == 8


def test_asking_again_is_in_the_budget(api, make):
    api.faults = ["slow"]
    teacher = make(api, budget=7)
    with pytest.raises(RunError, match=r"budget of the API is spent: 4 more would make 8, allowed are 7"):
        teacher(inputs(4))
    assert api.requests == [4]
    assert teacher.queries == 4  # it may have been answered


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half", r"Expected logits of shape \(4, 4\) of the API, got shape \(2, 4\)\."),
        ("one class less", r"Expected logits of shape \(4, 4\) of the API, got shape \(4, 3\)\."),
        ("words", r"Expected logits of shape \(4, 4\) of the API, got no array of numbers\."),
        ("no json", r"JSON that has the field 'predictions' .*got 16 bytes"),
        (307, r"refused with HTTP status 307\."),  # the key is for this address
        (401, r"refused with HTTP status 401\."),
        (404, r"refused with HTTP status 404\."),
    ],
)
def test_what_is_wrong_is_refused_at_once(api, make, fault, message):
    api.faults = [None, fault]
    teacher = make(api)
    with pytest.raises(RunError, match=message):
        teacher(inputs(8))
    assert len(api.requests) == 2
    assert teacher.queries == (4 if isinstance(fault, int) else 8)  # what was answered wrongly may have been billed
    teacher(inputs(8))  # the answers before it were kept, and none of the wrong ones
    assert np.allclose(teacher(inputs(8)), inputs(8).numpy() @ WEIGHTS, atol=1e-5)
    assert api.requests == [4, 4, 4]


def test_one_nan_costs_one_answer(api, make):
    api.faults = ["nan"]
    with pytest.raises(RunError, match="Expected finite logits of the API, but 1 of 4 answers are invalid"):
        make(api)(inputs(4))
    make(api)(inputs(4))
    assert api.requests == [4, 1]


@pytest.mark.parametrize(
    ("answers", "given"),
    [
        ("probabilities", [[0.5, 0.5, 0.5, 0.5]]),
        ("probabilities", [[1.5, -0.5, 0, 0]]),
        ("labels", [4]),
        ("labels", [-1]),
        ("labels", [1.5]),
        ("labels", [float("nan")]),
        ("logits", [[1, 2, float("inf"), 0]]),
    ],
)
def test_answers_that_cannot_be(make, answers, given):
    with pytest.raises(RunError, match="of the API, but 1 of 1 answers are invalid"):
        make(lambda batch: given, answers=answers)(inputs(1))


def test_bad_inputs_are_not_sent(api, make):
    for x, message in (
        (torch.full((2, 3), math.nan), "finite, got NaN"),
        ([1, 2], r"one tensor \(B, \.\.\.\), got list"),
    ):
        with pytest.raises(UserError, match=message):
            make(api)(x)
    assert api.requests == []
    assert make(api)(torch.empty(0, FEATURES)).shape == (0, OUTPUTS)


def test_the_rate_is_kept(make, monkeypatch):
    clock, waits = [0.0], []

    def sleep(seconds):
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("bdistil.teachers.api.time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    teacher = make(logits_of, rate=100, batch_size=5)
    teacher(inputs(18))
    assert waits == pytest.approx([0, 0.05, 0.05, 0.05])
    clock[0] += 1  # time in which nothing was asked is not saved up
    teacher(inputs(10, seed=1))
    assert waits[4:] == pytest.approx([0, 0.05])


def test_a_function_that_fails_is_asked_again_where_that_can_help(make):
    calls = []

    def flaky(batch):
        calls.append(len(batch))
        if len(calls) == 1:
            raise ConnectionResetError
        if len(calls) == 3:
            raise KeyError("a bug of the user's")
        return logits_of(batch)

    teacher = make(flaky)
    teacher(inputs(4))
    with pytest.raises(KeyError, match="a bug of the user's"):
        teacher(inputs(4, seed=1))
    teacher(inputs(4))
    assert calls == [4, 4, 4]


@pytest.mark.parametrize(
    "options",
    [{"outputs": 1}, {"batch_size": 0}, {"budget": 0}, {"rate": 0}, {"retries": -1}, {"backoff": -1}, {"answers": "x"}],
    ids=str,
)
def test_arguments_that_cannot_be(make, options):
    with pytest.raises(UserError, match="Expected"):
        make(logits_of, **options)
