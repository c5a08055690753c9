"""An API that fails: a real server on loopback misbehaves, and is asked again or refused."""

import http.client
import math
import socket
import time
import traceback
import urllib.error
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from helpers.api_toys import FEATURES, OUTPUTS, SECRET, WEIGHTS, inputs, logits_of

from bdistil import HttpEndpoint, RunError, UserError
from bdistil.teachers import ApiUnavailableError


@pytest.mark.parametrize("fault", [408, 500, 429, 503, 507, 520, 529, "slow", "hang up"])
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
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=waits.append)
    monkeypatch.setattr("bdistil.teachers.api.time", clock)  # other threads sleep, too
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
    with pytest.raises(
        RunError, match=r"spent: 4 more would make 8, allowed are 7\. They were sent before.*: ReadTimeout"
    ):
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
        (501, r"refused with HTTP status 501\."),
        (505, r"refused with HTTP status 505\."),
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


def test_no_label_is_kept_of_classes_that_are_numbered_from_one(make):
    """Labels 1 … 3 look valid, but are those of other classes; they must not be mixed with those of a mended API."""
    x = inputs(4)
    x[:, 0] = torch.arange(4)
    with pytest.raises(
        RunError, match=r"1 of 4 answers are invalid\. None of this request was kept.*from 1.*another `cache`"
    ):
        make(lambda batch: batch[:, 0] + 1, answers="labels")(x)
    assert make(lambda batch: batch[:, 0], answers="labels")(x).argmax(1).tolist() == [0, 1, 2, 3]


def test_what_was_never_sent_is_no_query(make):
    with socket.socket() as free:  # nobody listens once it is closed
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    teacher = make(HttpEndpoint(url), name="nobody", budget=4)
    for _ in range(2):
        with pytest.raises(RunError, match=r"no answer in \d attempts; last: ConnectionError") as error:
            teacher(inputs(4))
        assert url not in "".join(traceback.format_exception(error.value))
    assert teacher.queries == 0


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


def status_of(kind, code):
    """An error with an HTTP status, as clients raise it."""
    if kind == "requests":
        response = requests.Response()
        response.status_code = code
        response.headers["Retry-After"] = "0.002"
        return requests.HTTPError(f"{code} for url: {SECRET}", response=response)
    if kind == "urllib":
        return urllib.error.HTTPError(SECRET, code, "message", {}, None)
    error = Exception(SECRET)  # as of clients built on httpx
    error.status_code = code
    return error


TEMPORARY_ERRORS = {
    "requests": requests.ConnectionError(SECRET), "timeout": requests.Timeout(SECRET),
    "urllib": urllib.error.URLError(SECRET), "torn": http.client.IncompleteRead(b""), "socket": OSError(SECRET),
    "own": ApiUnavailableError("overloaded"), "503 of requests": status_of("requests", 503),
    "529 of urllib": status_of("urllib", 529), "429 of another": status_of("another", 429),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPORARY_ERRORS)
def test_errors_of_a_connection_in_a_users_function_are_asked_again(make, name):
    left = [TEMPORARY_ERRORS[name]] * 2

    def ask(batch):
        if left:
            raise left.pop()
        return logits_of(batch)

    teacher = make(ask)
    assert np.allclose(teacher(inputs(4)), logits_of(inputs(4)), atol=1e-5)
    assert teacher.queries == (4 if "of" in name else 12)  # an API that answered with a status has billed nothing

    def never(batch):
        raise TEMPORARY_ERRORS[name]

    with pytest.raises(RunError, match="gave no answer in 2 attempts") as error:
        make(never, retries=1)(inputs(2, seed=1))
    assert SECRET not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("kind", ["requests", "urllib", "another"])
def test_a_status_of_refusal_in_a_users_function_ends_the_run_without_the_address(make, kind):
    def ask(batch):
        raise status_of(kind, 403)

    with pytest.raises(RunError, match=r"refused with HTTP status 403\.") as error:
        make(ask)(inputs(2))
    assert SECRET not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("error", [FileNotFoundError("key.txt"), requests.exceptions.MissingSchema("x"), KeyError("x")])
def test_a_mistake_in_a_users_function_is_its_own(make, error):
    calls = []

    def ask(batch):
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        make(ask)(inputs(2))
    assert calls == [1]


class Client:
    """A callable without a name of its own."""

    def __call__(self, batch):
        return logits_of(batch)


@pytest.mark.parametrize("ask", [lambda batch: batch, partial(logits_of), Client(), Client().__call__])
def test_a_callable_that_is_not_unique_needs_a_name(make, ask):
    with pytest.raises(UserError, match=r"Expected `name` for an ApiTeacher that asks"):
        make(ask, name=None)
    make(ask, name="mine")
    with pytest.raises(UserError, match="are of another API: 'mine, logits of 4 classes' there, 'other,"):
        make(ask, name="other")
    make(logits_of, name=None, cache=make(ask, name="mine").cache.path.with_name("b"))  # a function of a module has one


@pytest.mark.parametrize(
    "options",
    [{"outputs": 1}, {"batch_size": 0}, {"budget": 0}, {"rate": 0}, {"retries": -1}, {"backoff": -1}, {"answers": "x"}],
    ids=str,
)
def test_arguments_that_cannot_be(make, options):
    with pytest.raises(UserError, match="Expected"):
        make(logits_of, **options)
