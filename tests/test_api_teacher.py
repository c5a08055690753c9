"""A teacher that is only an API: against a real server on loopback that misbehaves when told to."""

import copy
import json
import logging
import math
import os
import pickle
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from api_toys import FEATURES, OUTPUTS, SECRET, WEIGHTS, logits_of, probabilities_of, serving
from toys import Toys, boost, curve, in_child, make_teacher

from bdistil import ApiTeacher, FrozenTeacher, HttpEndpoint, RunError, UserError
from bdistil.run_directory import RunDirectory

KEY = "k3y-t0-the-api"


@pytest.fixture
def api():
    with serving() as server:
        yield server


@pytest.fixture
def make(tmp_path):
    """A teacher behind an endpoint, with waits that no test notices."""

    def build(ask, **options):
        ask = HttpEndpoint(ask.url, timeout=0.3) if hasattr(ask, "url") and not callable(ask) else ask
        given = {"outputs": OUTPUTS, "cache": tmp_path / "answers.sqlite", "batch_size": 4, "backoff": 0.001}
        return ApiTeacher(ask, **{**given, **options})

    return build


def inputs(count, seed=0):
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))


# ---- answers


def test_logits_come_as_the_model_says(api, make):
    x = inputs(10)
    assert np.allclose(make(api)(x), x.numpy() @ WEIGHTS, atol=1e-5)
    assert api.requests == [4, 4, 2]
    # What went out is what came in, to the bit.
    assert api.answered == [row.numpy().tobytes() for row in x]


def test_probabilities_become_centred_logarithms(tmp_path):
    x, zero = inputs(5), np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    answers = make_answers = probabilities_of(x)
    teacher = ApiTeacher(lambda batch: make_answers, OUTPUTS, tmp_path / "a", answers="probabilities", name="p")
    logits = teacher(x).numpy()
    logs = np.log(answers)
    assert np.allclose(logits, logs - logs.mean(1, keepdims=True), atol=1e-5)
    assert np.allclose(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), answers, atol=1e-6)
    sure = ApiTeacher(lambda batch: zero, OUTPUTS, tmp_path / "b", answers="probabilities", name="p")(inputs(1))
    assert sure.isfinite().all()
    assert float(sure[0, 0] - sure[0, 1]) == pytest.approx(math.log(1e7), rel=1e-4)


def test_labels_become_one_hots_of_the_length_of_a_normal_vector(make):
    teacher = make(lambda batch: logits_of(batch).argmax(1).tolist(), answers="labels")
    x = inputs(9)
    logits = teacher(x)
    assert teacher.hard
    assert torch.equal(logits.argmax(1), torch.from_numpy(logits_of(x).argmax(1)))
    assert torch.allclose(logits.norm(dim=1), torch.full((9,), math.sqrt(OUTPUTS)))
    assert sorted(logits[0].tolist()) == [0, 0, 0, math.sqrt(OUTPUTS)]


# ---- counting, the cache, the budget


def test_nothing_is_asked_twice(api, make):
    x = inputs(6)
    twice = torch.cat((x, x[:3]))
    first = make(api)
    answers = first(twice)
    assert torch.equal(answers[:3], answers[6:])
    again = make(api)  # as after a restart
    assert torch.equal(again(x.flip(0)), answers[:6].flip(0))
    assert len(api.samples) == first.queries == again.queries == 6
    again(inputs(2, seed=1))
    assert len(api.samples) == again.queries == 8


def test_inputs_of_one_content_and_two_shapes_are_two(make):
    teacher = make(lambda batch: np.zeros((len(batch), OUTPUTS)))
    teacher(torch.zeros(1, 6))
    teacher(torch.zeros(1, 2, 3))
    assert teacher.queries == 2


def test_the_budget_is_never_passed_and_nothing_is_lost(api, make):
    teacher = make(api, budget=10)
    kept = teacher(inputs(8))
    with pytest.raises(RunError, match=r"3 more would make 11, allowed are 10\..*Raise `budget`"):
        teacher(inputs(3, seed=1))
    assert teacher.queries == len(api.samples) == 8
    assert torch.equal(teacher(inputs(8)), kept)
    teacher(inputs(2, seed=1))
    assert make(api, budget=11).queries == 10


@pytest.mark.parametrize("other", [{"name": "b"}, {"answers": "probabilities"}, {"outputs": 5}], ids=str)
def test_a_cache_of_another_api_is_refused(make, other):
    make(logits_of, name="a")
    with pytest.raises(UserError, match=r"answers in .*answers\.sqlite are of another API: 'a, logits of 4 classes'"):
        make(logits_of, **{"name": "a", **other})


def test_a_file_that_is_no_cache(make, tmp_path):
    (tmp_path / "answers.sqlite").write_text("something else " * 100)
    with pytest.raises(RunError, match=r"answers\.sqlite cannot be read or written: file is not a database"):
        make(logits_of)


def test_the_cache_holds_no_pickle_and_the_teacher_can_be_copied(api, make, tmp_path):
    teacher = make(api)
    teacher(inputs(3))
    base = sqlite3.connect(tmp_path / "answers.sqlite")
    rows = np.stack([np.frombuffer(answer, np.float32) for (answer,) in base.execute("SELECT answer FROM answers")])
    base.close()
    expected = inputs(3).numpy() @ WEIGHTS
    assert np.allclose(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()], atol=1e-5)
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(twin(inputs(3)), teacher(inputs(3)))
    assert teacher.queries == 3


def test_two_at_once_ask_each_input_once(api, make):
    teachers = [make(api, batch_size=2) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda teacher: teacher(inputs(12)), teachers))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert len(api.samples) == teachers[0].queries == 12


# ---- faults


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
    again = make(api)
    again(inputs(8))
    assert len(set(api.answered)) == len(api.answered) == again.queries == 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half", r"Expected logits of shape \(4, 4\) of the API, got shape \(2, 4\)\."),
        ("one class less", r"Expected logits of shape \(4, 4\) of the API, got shape \(4, 3\)\."),
        ("words", r"Expected logits of shape \(4, 4\) of the API, got no array of numbers\."),
        ("no json", r"JSON that has the field 'predictions' .*got 16 bytes"),
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
    with pytest.raises(RunError, match="Expected finite logits of the API, but 1 of 4 answers are none"):
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
    with pytest.raises(RunError, match="of the API, but 1 of 1 answers are none"):
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


def test_the_rate_is_kept(api, make):
    start = time.monotonic()
    make(api, rate=100, batch_size=5)(inputs(20))
    assert time.monotonic() - start >= 0.15


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


# ---- secrets


@pytest.mark.parametrize("url", [f"http://u:{KEY}@h/p", f"http://h/p?key={KEY}", f"http://{KEY}@h", f"http://h/#{KEY}"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="without user, password, query or fragment") as caught:
        HttpEndpoint(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://h/p", "h/p", "", "http://", "http://[1/"])
def test_what_is_no_address(url):
    with pytest.raises(UserError, match="to be like https://host/path"):
        HttpEndpoint(url)


def test_the_key_comes_from_the_environment(api, make, monkeypatch):
    with pytest.raises(UserError, match=r"environment variable TOY_KEY \(`key_env`\)"):
        HttpEndpoint(api.url, key_env="TOY_KEY")
    monkeypatch.setenv("TOY_KEY", KEY)
    make(HttpEndpoint(api.url, key_env="TOY_KEY"))(inputs(1))
    assert api.keys == [f"Bearer {KEY}"]


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "fault",
    [401, 404, *[[f] * 3 for f in (500, "slow", "hang up")], "half", "nan", "words", "no json", "down"],
    ids=str,
)
def test_no_secret_is_in_any_message_or_log(api, make, monkeypatch, caplog, fault):
    monkeypatch.setenv("TOY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    endpoint = HttpEndpoint("http://127.0.0.1:9/none" if fault == "down" else api.url, key_env="TOY_KEY", timeout=0.3)
    teacher = make(endpoint, retries=2)
    api.faults = fault if isinstance(fault, list) else [fault] * 3
    with pytest.raises(RunError) as caught:
        teacher(inputs(4))
    for error in chain(caught.value):
        said = repr(error) + str(vars(error))
        assert KEY not in said
        assert SECRET not in said
    shown = caplog.text + repr(teacher) + str(vars(endpoint)) + str(vars(teacher))
    shown += (teacher.cache.path).read_bytes().decode("latin1")
    assert KEY not in shown
    assert SECRET not in shown


# ---- in a run


def ask_toy_teacher(batch):
    with torch.no_grad():
        return make_teacher().eval()(torch.from_numpy(batch)).numpy()


class CountingApi:
    """A callable that knows what it was asked."""

    name = "toy"

    def __init__(self):
        self.asked = []

    def __call__(self, batch):
        self.asked += [row.tobytes() for row in batch]
        return ask_toy_teacher(batch)


@pytest.fixture(scope="module")
def api_run(tmp_path_factory, no_pictures):
    """The run of toys, with the teacher behind an API; and the same run with the module."""
    folder = tmp_path_factory.mktemp("api")
    ask = CountingApi()
    teacher = ApiTeacher(ask, 4, folder / "answers.sqlite", batch_size=50, budget=256)
    boost(folder / "run", teacher=teacher)
    boost(folder / "module")
    return folder, ask, teacher


def test_a_run_takes_it_in_place_of_a_module(api_run):
    folder, _, _ = api_run
    differ = {"macs", "params", "train_macs", "latency_ms", "seconds", "activation_bytes", "test_accuracy"}
    api, module = (curve(folder / name) for name in ("run", "module"))
    assert [{k: v for k, v in row.items() if k not in differ} for row in api] == [
        {k: v for k, v in row.items() if k not in differ} for row in module
    ]
    keep = {"latency_ms", "seconds"}
    assert [{k: v for k, v in r.items() if k not in keep} for r in api[1:]] == [
        {k: v for k, v in r.items() if k not in keep} for r in module[1:]
    ]
    assert api[0]["macs"] == api[0]["params"] == "0"
    assert api[0]["test_accuracy"] == ""


def test_a_run_asks_each_training_and_validation_sample_once_and_the_test_part_never(api_run):
    folder, ask, teacher = api_run
    parts = Toys().parts
    assert sorted(ask.asked) == sorted(x.numpy().tobytes() for part in ("train", "val") for x in parts[part][0])
    assert teacher.queries == len(ask.asked) == 256
    assert RunDirectory(folder / "run").teacher_figures()["queries"] == 256


def test_the_fingerprint_is_of_the_api(api_run, tmp_path):
    _, _, teacher = api_run
    twin, other = (ApiTeacher(CountingApi(), 4, tmp_path / name, name=name) for name in ("toy", "other"))
    assert FrozenTeacher(twin).fingerprint == FrozenTeacher(teacher).fingerprint
    assert FrozenTeacher(other).fingerprint != FrozenTeacher(teacher).fingerprint


def test_a_budget_that_is_too_small_stops_the_run_and_more_goes_on(tmp_path, no_pictures):
    ask = CountingApi()
    few = ApiTeacher(ask, 4, tmp_path / "answers", budget=200)
    with pytest.raises(
        RunError, match=r"The query budget of the API is spent: 64 more would make 256, allowed are 200"
    ):
        boost(tmp_path / "run", teacher=few)
    boost(tmp_path / "run", teacher=ApiTeacher(ask, 4, tmp_path / "answers", budget=256))
    assert RunDirectory(tmp_path / "run").committed() == 3
    assert len(set(ask.asked)) == len(ask.asked) == 256


def killed_while_asking(url, folder):
    """Asks in requests of 4; the third is never answered, as the process is killed while it is under way."""
    endpoint = HttpEndpoint(url)

    def ask(batch):
        if len(json.loads((folder / "log").read_text())) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        answers = endpoint(batch)
        (folder / "log").write_text(json.dumps([*json.loads((folder / "log").read_text()), len(batch)]))
        return answers

    ApiTeacher(ask, OUTPUTS, folder / "answers", name="killed", batch_size=4)(inputs(20))


def test_the_count_survives_a_kill(api, tmp_path):
    (tmp_path / "log").write_text("[]")
    assert in_child(tmp_path / "out", killed_while_asking, api.url, tmp_path) == -signal.SIGKILL
    assert len(api.samples) == 8
    teacher = ApiTeacher(HttpEndpoint(api.url), OUTPUTS, tmp_path / "answers", name="killed", batch_size=4)
    assert teacher.queries == 12  # the four that were under way may have been answered
    teacher(inputs(20))
    assert len(set(api.answered)) == len(api.answered) == 20
    assert teacher.queries == 24
