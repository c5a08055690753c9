"""An API in the place of a module in a boosting run, and after a kill."""

import json
import os
import signal

import pytest
import torch
from helpers.api_toys import OUTPUTS, inputs
from helpers.toys import Toys, boost, curve, in_child, make_teacher

from bdistil import AdaptedTeacher, ApiTeacher, AveragedTeacher, FrozenTeacher, HttpEndpoint, RunError
from bdistil.storage.run_directory import RunDirectory


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
def api_run(tmp_path_factory):
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
    assert RunDirectory(folder / "run").read("teacher")["queries"] == 256


@pytest.mark.parametrize("wrap", [AdaptedTeacher, lambda api: AveragedTeacher([api, make_teacher()], of="logits")])
def test_an_api_inside_another_teacher_is_asked_no_more(tmp_path, wrap):
    ask = CountingApi()
    boost(tmp_path / "run", teacher=wrap(ApiTeacher(ask, 4, tmp_path / "answers.sqlite", batch_size=50)))
    test = {x.numpy().tobytes() for x in Toys().parts["test"][0]}
    assert len(ask.asked) == 256
    assert test.isdisjoint(ask.asked)
    row = RunDirectory(tmp_path / "run").read("teacher")
    assert (row["macs"], row["latency_ms"], row["queries"]) == (0, 0, 256)


def test_the_fingerprint_is_of_the_api(api_run, tmp_path):
    _, _, teacher = api_run
    twin, other = (ApiTeacher(CountingApi(), 4, tmp_path / name, name=name) for name in ("toy", "other"))
    assert FrozenTeacher(twin).fingerprint == FrozenTeacher(teacher).fingerprint
    assert FrozenTeacher(other).fingerprint != FrozenTeacher(teacher).fingerprint


def test_a_budget_that_is_too_small_stops_the_run_and_more_goes_on(tmp_path):
    ask = CountingApi()
    few = ApiTeacher(ask, 4, tmp_path / "answers", budget=200)
    with pytest.raises(
        RunError, match=r"The query budget of the API is spent: 32 more would make 224, allowed are 200"
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
