"""A run that is stopped goes on in its W&B run, offline and on a server that comes and goes. Real processes."""

import os
import signal
import subprocess
import sys
import time
from threading import Thread

import pytest
import torch
import wandb
from helpers import wandb_server
from helpers.toys import in_child
from helpers.wandb_offline import HEADER, offline_runs
from safetensors.torch import save_file
from torch import nn

from bdistil.boosting.round import BoostingRound
from bdistil.boosting.run import Boosting
from bdistil.cli import app as cli
from bdistil.cli import compare
from bdistil.models.convnets import StridedConvNet
from bdistil.reporting import tracking
from bdistil.reporting.round_tracker import RoundTracker
from bdistil.reporting.tracking import RunLogger, Tracking, make_logger
from bdistil.storage.run_directory import RunDirectory

ROUNDS, EPOCHS, STEPS = 2, 3, 4  # steps of an epoch
KILLED_AT = (ROUNDS - 1) * EPOCHS * STEPS + STEPS + 2  # in the second epoch of the last round
SMALL = [
    "fit", "--config", "digits", "--model.boosting.rounds", str(ROUNDS), "--trainer.max_epochs", str(EPOCHS),
    "--model.teacher.epochs", "1", "--model.teacher.network.channels", "[4,8]", "--trainer.accelerator", "cpu",
    "--data.batch_size", "875", "--trainer.log_every_n_steps", "1",
    "--trainer.logger", "lightning.pytorch.loggers.CSVLogger",
]  # fmt: skip


def environment(url):
    """Of a process that is online if it has the address of a server, else offline."""
    online = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": url}
    return online if url else {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def enter(url):
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        os.environ.pop(name, None)
    os.environ.update(environment(url))


def a_start(folder, url, killed_at=None, by=signal.SIGTERM):
    """The command line; its own process gets a signal at a step, before that is logged."""
    enter(url)
    log_metrics, training_step = RunLogger.log_metrics, BoostingRound.training_step

    def log_loss(self, batch, batch_idx):
        loss = training_step(self, batch, batch_idx)
        self.log("train/loss", loss["loss"] if isinstance(loss, dict) else loss)
        return loss

    def log_or_die(self, metrics, step=None):
        if step == killed_at:
            os.kill(os.getpid(), by)
        log_metrics(self, metrics, step)

    RunLogger.log_metrics, BoostingRound.training_step = log_or_die, log_loss
    sys.exit(cli.main([*SMALL, "--run_dir", str(folder), "--trainer.logger.save_dir", str(folder.with_name("csv"))]))


def values_by_step(rows):
    """Every value that was logged of a fit, by name and place on the x axis."""
    found = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("train/", "val_")):
                found.setdefault((name, row["trainer/global_step"]), []).append(value)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run logs that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_child(folder / "log", a_start, folder / "run", None) == 0, (folder / "log").read_text()
    (only,) = offline_runs(folder / "run")
    return values_by_step(only.history)


@pytest.fixture
def server():
    with wandb_server.serving() as server:
        yield server


def check_rows(rows, whole):
    """All that a whole run logs is there; what was trained again is twice there, at the same x with the same value."""
    found = values_by_step(rows)
    assert found.keys() == whole.keys()
    assert all({*values} == {*whole[key]} for key, values in found.items())
    twice = {step for (_, step), values in found.items() if len(values) > len(whole[_, step])}
    assert twice
    assert min(twice) >= KILLED_AT - STEPS, "no completed epoch was trained again"
    assert {row["round"] for row in rows if "round" in row} == {1, 2}


def test_offline_starts_of_a_stopped_run_are_one_run(whole, server, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert in_child(log, a_start, folder, None, KILLED_AT) == 1, log.read_text()
    assert in_child(log, a_start, folder, None) == 0, log.read_text()
    runs = offline_runs(folder)
    assert len(runs) == 2
    (name,) = {run.run["run_id"] for run in runs if run.run}  # a file that a kill has torn may lack it
    assert name == (folder / "wandb_id.txt").read_text()
    check_rows([row for run in runs for row in run.history], whole)

    assert in_child(log, a_start, folder, None) == 0, log.read_text()
    assert len(offline_runs(folder)) == 2, "of a finished run there is nothing to log"

    # W&B does not read on after a file that was killed before its first record: docs/wandb.md says to delete those.
    written = [file.parent for file in folder.glob("wandb/offline-run-*/*.wandb") if file.stat().st_size > HEADER]
    command = [sys.executable, "-m", "wandb", "sync", *map(str, sorted(written))]
    subprocess.run(command, env={**os.environ, **environment(server.url)}, stdin=subprocess.DEVNULL, check=True)
    assert [*server.runs] == [name]
    (rows,) = server.runs.values()
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    check_rows(rows, whole)


def test_a_killed_run_goes_on_with_the_same_values(whole, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert in_child(log, a_start, folder, None, KILLED_AT, signal.SIGKILL) == -signal.SIGKILL, log.read_text()
    assert in_child(log, a_start, folder, None) == 0, log.read_text()
    rows = [row for run in offline_runs(folder) for row in run.history]
    found = values_by_step(rows)
    assert {step for _, step in found} >= {step for _, step in whole if step >= KILLED_AT}
    assert all({*values} == {*whole[key]} for key, values in found.items())
    assert {row["round"] for row in rows if "round" in row} == {1, 2}, "of all rounds"


def test_online_a_stopped_run_goes_on_in_its_run(whole, server, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert in_child(log, a_start, folder, server.url, KILLED_AT) == 1, log.read_text()
    assert in_child(log, a_start, folder, server.url) == 0, log.read_text()
    ((name, rows),) = server.runs.items()
    assert name == (folder / "wandb_id.txt").read_text()
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    check_rows(rows, whole)


def test_what_the_server_refuses_is_said_by_the_command_line(server, tmp_path):
    log, server.refuses = tmp_path / "log", True
    assert in_child(log, a_start, tmp_path / "run", server.url) == 0, log.read_text()
    assert f"View run at {server.url}" in log.read_text()
    assert "Some run data will not be synced" in log.read_text()
    assert not any(server.runs.values())


def some_rows(folder, url, gone=None):
    enter(url)
    tracking.FINISH_SECONDS = 5.0
    logger = make_logger(Tracking(mode="online"), folder, {})
    for step in range(10):
        if gone and step == 5:
            gone.touch()  # the test, which has the server
            while gone.exists():
                time.sleep(0.01)
        logger.log_metrics({"train/loss": 1 / (step + 1)}, step)
    start, tracker = time.monotonic(), RoundTracker(RunDirectory(folder))
    tracker.loggers = [logger]
    tracker.close()
    assert time.monotonic() - start < 20


def test_a_server_that_goes_away_holds_up_the_end_for_a_moment(server, tmp_path):
    log, gone = tmp_path / "log", tmp_path / "gone"

    def go():
        while not gone.exists():
            time.sleep(0.01)
        server.gone()
        gone.unlink()

    power_cut = Thread(target=go)
    power_cut.start()
    assert in_child(log, some_rows, tmp_path / "run", server.url, gone) == 0, log.read_text()
    power_cut.join()
    assert "wandb sync" in log.read_text(), "W&B says how to upload the rest"
    with wandb_server.serving(server.runs) as again:
        assert in_child(log, some_rows, tmp_path / "run", again.url) == 0, log.read_text()
    ((_, rows),) = server.runs.items()
    assert {key: {*values} for key, values in values_by_step(rows).items()} == {
        ("train/loss", step): {1 / (step + 1)} for step in range(10)
    }


def tracked_comparison(folder, url):
    enter(url)
    folder.mkdir()
    compare._track(Tracking(mode="online"), folder, (["method"], [["bdistil"]]))


def test_a_server_that_takes_no_table_does_not_fail_a_comparison(server, tmp_path):
    log = tmp_path / "log"
    assert in_child(log, tracked_comparison, tmp_path / "compared", server.url) == 0, log.read_text()
    assert "The comparison was not logged to W&B (" in log.read_text()


def end_that_is_killed(folder):
    enter(None)

    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    Boosting.finish = killed
    cli.main([*SMALL, "--run_dir", str(folder), "--trainer.logger.save_dir", str(folder.with_name("csv"))])


def test_a_run_killed_after_its_last_round_logs_its_curve_when_it_goes_on(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert in_child(log, end_that_is_killed, folder) != 0
    assert RunDirectory(folder).committed() == ROUNDS, log.read_text()
    for _ in range(2):  # the second start has nothing to do
        assert in_child(log, a_start, folder, None) == 0, log.read_text()
    _, second = offline_runs(folder)
    assert any(key.startswith("curve/") for row in second.history for key in row)
    assert second.exit_code == 0


def start_that_fails(folder):
    enter(None)
    teacher = StridedConvNet((4, 8))
    nn.init.constant_(next(teacher.parameters()), torch.nan)
    save_file(teacher.state_dict(), folder.with_name("nan.safetensors"))
    options = ["--run_dir", str(folder), "--model.teacher.checkpoint", str(folder.with_name("nan.safetensors"))]
    options += ["--trainer.logger.save_dir", str(folder.with_name("csv"))]
    assert cli.main([*SMALL, *options]) == 1
    assert wandb.run is None, "another run may begin in this process"


def test_a_start_that_fails_before_its_first_round_ends_its_run(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert in_child(log, start_that_fails, folder) == 0, log.read_text()
    (only,) = offline_runs(folder)
    assert only.exit_code == 1
