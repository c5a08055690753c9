"""Runs of W&B on a server that comes and goes, which are killed or not: it ends with all rows, each once."""

import os
import signal
import sys
import time
from threading import Thread

import pytest
from helpers import wandb_server
from helpers.processes import descendants
from helpers.toys import in_child
from helpers.wandb_offline import finished_runs

from bdistil.cli import app as cli
from bdistil.reporting import tracking
from bdistil.reporting.curve_tracker import CurveTracker
from bdistil.reporting.tracking import Tracking, make_logger
from bdistil.reporting.wandb_state import RunNotes
from bdistil.utils.signals import StopSignals

ROWS, ROUNDS, EPOCHS = 100, 2, 3
NOBODY = "http://127.0.0.1:9"
SMALL = [
    "fit", "--config", "digits", "--model.boosting.rounds", str(ROUNDS), "--trainer.max_epochs", str(EPOCHS),
    "--model.teacher.epochs", "1", "--model.teacher.network.channels", "[4,8]", "--trainer.accelerator", "cpu",
    "--data.batch_size", "875", "--tracking.mode", "online",
    "--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.version", "0",
]  # fmt: skip


def online(url):
    os.environ.update({"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": url})
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        os.environ.pop(name, None)


def end_by(signal):
    """Sends a signal to this process and to those of W&B."""
    for pid in [*descendants(os.getpid()), os.getpid()]:
        os.kill(pid, signal)
    time.sleep(10)


def a_start(folder, url, first, last, ending=None, pause=0.0, gone=None, mode="online"):
    """Logs the steps from `first` to `last`, online; then a signal comes, to W&B's processes as well."""
    online(url)
    tracking.FINISH_SECONDS = 5.0
    with StopSignals(lambda: "stopped"):
        logger = make_logger(Tracking(mode="online"), folder, {})
        assert logger.experiment.settings.mode == mode
        tracker = CurveTracker([logger])
        tracker.define(logger)
        try:
            for step in range(first, last):
                if gone and step == (first + last) // 2:
                    time.sleep(pause)
                    gone.touch()  # the test, which has the server
                    while gone.exists():
                        time.sleep(0.01)
                logger.log_metrics({"train/loss": 1 / (step + 1)}, step)
            tracker.round({"macs": last}, last // ROWS, last)
            if ending:
                time.sleep(pause)
                end_by(ending)
        finally:
            tracker.finish()


def a_run(folder, url, killed):
    """The command line; W&B is killed with it before the end of its run, where all rounds are committed."""
    online(url)
    if killed:
        CurveTracker.finish = lambda self: end_by(signal.SIGKILL)
    sys.exit(cli.main([*SMALL, "--run_dir", str(folder), "--trainer.logger.save_dir", str(folder.with_name("csv"))]))


def steps_of(rows):
    return [row["trainer/global_step"] for row in rows if "train/loss" in row]


@pytest.fixture
def server():
    with wandb_server.serving() as server:
        yield server


def the_run(server):
    ((_, rows),) = server.runs.items()
    at = [row["_step"] for row in rows]
    assert at == sorted(set(at))
    return rows


def test_starts_that_end_well_are_one_run(server, tmp_path):
    for first in (0, ROWS):
        assert in_child(tmp_path / "log", a_start, tmp_path / "run", server.url, first, first + ROWS) == 0
    rows = the_run(server)
    assert steps_of(rows) == list(range(2 * ROWS))
    assert [row["round"] for row in rows if row.get("round")] == [1, 2]


def test_a_start_without_the_server_changes_nothing_about_what_those_before_owe_it(server, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert in_child(log, a_start, folder, server.url, 0, ROWS, signal.SIGKILL, 1.0) == -signal.SIGKILL
    assert not the_run(server)
    assert in_child(log, a_start, folder, NOBODY, ROWS, ROWS + 5, None, 0, None, "offline") == 0, log.read_text()
    assert RunNotes(folder).unsent
    assert "wandb sync" in log.read_text()
    assert "wandb: " not in log.read_text().replace("wandb: [wandb.login()]", ""), "what is offline is said once, by us"
    assert in_child(log, a_start, folder, server.url, ROWS + 5, ROWS + 9) == 0, log.read_text()
    assert not RunNotes(folder).unsent
    assert steps_of(the_run(server)) == [*range(ROWS), *range(ROWS + 5, ROWS + 9)]  # the others are for `wandb sync`


@pytest.mark.parametrize("ending", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_what_was_not_uploaded_when_a_start_was_killed_is_uploaded_by_the_next(server, tmp_path, ending):
    log, folder = tmp_path / "log", tmp_path / "run"
    for first in (0, ROWS - 5, 2 * ROWS - 5):  # an epoch is trained again
        assert in_child(log, a_start, folder, server.url, first, first + ROWS, ending, 0.5) != 0
    assert len(steps_of(the_run(server))) < 3 * ROWS - 5, "or the rest proves nothing"
    assert in_child(log, a_start, folder, server.url, 3 * ROWS - 5, 3 * ROWS) == 0, log.read_text()
    rows = [row for row in the_run(server) if "train/loss" in row]
    assert steps_of(rows) == list(range(3 * ROWS))
    assert [row["train/loss"] for row in rows] == [1 / (step + 1) for step in range(3 * ROWS)]
    assert [row["_timestamp"] for row in rows] == sorted({row["_timestamp"] for row in rows})


def test_a_server_that_goes_away_holds_the_end_up_for_a_moment_and_the_next_start_uploads_the_rest(server, tmp_path):
    log, folder, gone = tmp_path / "log", tmp_path / "run", tmp_path / "gone"

    def go():
        while not gone.exists():
            time.sleep(0.01)
        server.gone()
        gone.unlink()

    power_cut = Thread(target=go)
    power_cut.start()
    assert in_child(log, a_start, folder, server.url, 0, ROWS, None, 1, gone) == 0, log.read_text()
    power_cut.join()
    assert len(steps_of(the_run(server))) < ROWS, "or the rest proves nothing"
    (place,) = (folder / "wandb").glob("run-*")
    assert f"W&B did not take all rows within 5 s. They are in {place}" in log.read_text()
    with wandb_server.serving(server.runs) as again:
        assert in_child(log, a_start, folder, again.url, ROWS, 2 * ROWS) == 0, log.read_text()
    assert steps_of(the_run(server)) == list(range(2 * ROWS))


def test_what_the_server_refuses_is_said_by_the_command_line(server, tmp_path):
    log, server.refuses = tmp_path / "log", True
    assert in_child(log, a_run, tmp_path / "run", server.url, False) == 0, log.read_text()
    assert f"View run at {server.url}" in log.read_text()
    assert "Some run data will not be synced" in log.read_text()
    assert not the_run(server)


def test_a_finished_run_uploads_what_the_server_lacks_and_then_leaves_it_alone(server, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert in_child(log, a_run, folder, server.url, True) == -signal.SIGKILL, log.read_text()
    assert not the_run(server)
    (csv,) = (tmp_path / "csv").rglob("metrics.csv")
    before = csv.read_bytes()
    assert in_child(log, a_run, folder, NOBODY, False) == 0, log.read_text()  # too early
    shown = [row for run in finished_runs(folder) for row in run.history if "round" in row]
    assert not shown, "or `wandb sync` doubles them"
    assert in_child(log, a_run, folder, server.url, False) == 0, log.read_text()
    assert csv.read_bytes() == before, "nothing is owed to other loggers"
    rows = the_run(server)
    assert [row["round"] for row in rows if row.get("round")] == [1, 2]
    assert sum("val_loss" in row for row in rows) == ROUNDS * EPOCHS
    assert in_child(log, a_run, folder, server.url, False) == 0, log.read_text()
    assert len([*(folder / "wandb").glob("run-*")]) == 2
