"""kill -9 at any moment of `bdistil fit`: the same command goes on and ends as if nothing had happened."""

import itertools
import os
import random
import signal
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from helpers.processes import started
from helpers.toys import TIMES, curve, everything, in_child
from torch import nn

from bdistil.callbacks import round_controller
from bdistil.cli import app as cli
from bdistil.models.convnets import ConvStudent
from bdistil.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow

POINTS, SEED = 24, 0
SMALL = [
    "fit", "--config", "digits", "--model.boosting.rounds", "2", "--trainer.max_epochs", "3",
    "--model.teacher.epochs", "3", "--model.teacher.network.channels", "[4,8]", "--trainer.accelerator", "cpu",
    "--tracking.mode", "disabled", "--data.batch_size", "875", "--model.student", f"{__name__}.Dropping",
]  # fmt: skip


class Dropping(ConvStudent):
    """A student that draws random numbers as it trains: a wrong seed would show."""

    def __init__(self, channels=(3, 6)):
        super().__init__(channels)
        self.body.stages[-1].append(nn.Dropout(0.1))


# Stages of a run, and what is called in each: the process dies before or after one of these calls.
WATCHED = {
    "steps of the teacher": [("bdistil.teachers.training.TeacherTraining", "training_step")],
    "steps of a round": [("bdistil.boosting.round.BoostingRound", "training_step")],
    "verdict": [
        ("bdistil.boosting.ledger.ledger.ErrorLedger", "advance"),
        ("bdistil.boosting.ledger.ledger.ErrorLedger", "publish"),
    ],
    "files": [("os", "replace"), ("os", "fsync"), ("shutil", "rmtree")],
}


def die_at(owner, name, moments, at):
    """Has a function count the moments before and after its calls, and the process die at one of them."""
    original = getattr(owner, name)

    def tick():
        if next(moments) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(*args, **kwargs):
        tick()
        result = original(*args, **kwargs)
        tick()
        return result

    setattr(owner, name, watched)


def script(run_dir, stage, at, count):
    """The command in a process of its own, which kills itself; without a kill it says how many moments there were."""
    round_controller.write_report = lambda run: run.report  # the picture takes as long as the run
    moments = itertools.count()
    for place, name in WATCHED.get(stage, []):
        module, _, kind = place.rpartition(".")
        owner = getattr(import_module(module), kind) if module else import_module(place)
        die_at(owner, name, moments, at)
    status = cli.main([*SMALL, "--run_dir", str(run_dir)])
    count.write_text(str(next(moments)))
    sys.exit(status)


def result(run_dir):
    """What must be the same to the last bit: teacher, students, ledger, curve."""
    kept = {name: data for name, data in everything(run_dir).items() if name.endswith((".safetensors", ".f32"))}
    return kept, curve(run_dir, without=TIMES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and how many moments each of its stages has."""
    folder = tmp_path_factory.mktemp("whole")
    log, count, moments = folder / "log", folder / "count", {}
    for stage in WATCHED:
        run_dir = folder / stage.replace(" ", "_")
        assert in_child(log, script, run_dir, stage, -1, count) == 0, log.read_text()
        moments[stage] = int(count.read_text())
    results = [result(folder / stage.replace(" ", "_")) for stage in WATCHED]
    assert all(found == results[0] for found in results)
    kept, rows = results[0]
    assert {"teacher.safetensors", "rounds/001/student.safetensors", "ledger/train/error.002.f32"} <= set(kept)
    assert len(rows) == 3
    return results[0], moments


def points():
    """(stage, where in it in 0 … 1), as many in each stage."""
    draw = random.Random(SEED)
    return [(stage, round(draw.random(), 3)) for stage in WATCHED for _ in range(POINTS // len(WATCHED))]


@pytest.mark.parametrize(("stage", "where"), points())
def test_a_kill_costs_at_most_the_epoch_under_way(whole, tmp_path, stage, where):
    wanted, moments = whole
    run_dir, log, count = tmp_path / "run", tmp_path / "log", tmp_path / "count"
    at = int(where * moments[stage])
    assert in_child(log, script, run_dir, stage, at, count) == -signal.SIGKILL, log.read_text()
    assert in_child(log, script, run_dir, None, -1, count) == 0, log.read_text()
    assert result(run_dir) == wanted


def test_the_epochs_before_the_one_under_way_are_kept(whole, tmp_path):
    _, moments = whole
    run_dir, log, stage = tmp_path / "run", tmp_path / "log", "steps of a round"
    last = moments[stage] * 5 // 6  # of two rounds of three epochs: the last epoch of the second one
    assert in_child(log, script, run_dir, stage, last, tmp_path / "count") == -signal.SIGKILL
    kept = torch.load(RunDirectory(run_dir).checkpoint(1), weights_only=True)
    assert kept["epoch"] == 1  # two of three epochs are over
    assert kept["callbacks"]["RoundController"]["epochs"] == 2


@pytest.mark.parametrize("turn", range(3))
def test_a_kill_from_outside_at_any_time(whole, tmp_path, turn):
    """The program itself, killed by the clock again and again until it ends."""
    wanted, _ = whole
    run_dir, draw, kills = tmp_path / "run", random.Random(turn), 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "bdistil.cli", *SMALL, "--run_dir", str(run_dir)]
    while kills < 4:
        with (
            open(tmp_path / "log", "a") as log,
            started(command, stdout=log, stderr=log, env=environment) as process,
        ):
            try:
                process.wait(draw.uniform(9, 16))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            else:
                break
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 0
    assert result(run_dir) == wanted
