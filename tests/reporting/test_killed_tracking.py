"""Processes that are killed while they log to W&B: no row is lost. Real processes, W&B's own among them, offline."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.processes import descendants
from helpers.toys import in_child
from helpers.wandb_offline import offline_runs

from bdistil.reporting import tracking
from bdistil.reporting import wandb_file as wandb_log
from bdistil.reporting.curve_tracker import CurveTracker
from bdistil.reporting.tracking import Tracking, make_logger
from bdistil.reporting.wandb_file import last_time
from bdistil.reporting.wandb_logger import RunLogger
from bdistil.reporting.wandb_state import FLUSH_SECONDS, KEPT_SECONDS, ROOM, RunNotes
from bdistil.utils.signals import StopSignals

ROWS, NEVER = 100, 60.0  # rows that W&B's process would not write before it is killed, were it not for our interval
ENVIRON = {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}


def name(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


def a_start(folder, first, last, ending=None, whom="all", pause=0.0, flush=FLUSH_SECONDS):
    """Logs the steps from `first` to `last`; then a signal comes, as SLURM sends it: to W&B's processes as well."""
    os.environ.update(ENVIRON)
    tracking.FLUSH_SECONDS = flush
    with StopSignals(lambda: "stopped"):
        logger = make_logger(Tracking(), folder, {})
        tracker = CurveTracker([logger])
        tracker.define(logger)
        try:
            for step in range(first, last):
                logger.log_metrics({"train/loss": 1 / (step + 1), "none": float("nan")}, step)
            time.sleep(pause)
            if ending:
                found = [*descendants(os.getpid())]
                assert any("wandb-core" in name(pid) for pid in found)
                for pid in [*found, os.getpid()][: None if whom == "all" else -1]:
                    os.kill(pid, ending)
                time.sleep(0 if whom == "core" else 10)
        finally:
            tracker.finish()


def steps_of(runs):
    return [row["trainer/global_step"] for run in runs for row in run.history if "train/loss" in row]


@pytest.mark.parametrize("flush", [NEVER, FLUSH_SECONDS])
@pytest.mark.parametrize(
    ("ending", "whom", "status"),
    [(signal.SIGTERM, "all", 1), (signal.SIGKILL, "all", -signal.SIGKILL), (signal.SIGTERM, "core", 0)],
)
def test_starts_together_lack_no_row_and_have_none_twice(tmp_path, ending, whom, status, flush):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert in_child(log, a_start, folder, 0, ROWS, ending, whom, 0, flush) == status, log.read_text()
    (first,) = offline_runs(folder)
    assert flush == FLUSH_SECONDS or len(steps_of([first])) < ROWS, "or the rest proves nothing"
    assert in_child(log, a_start, folder, ROWS - 5, ROWS + 5) == 0, log.read_text()
    runs = offline_runs(folder)
    assert steps_of(runs) == list(range(ROWS + 5))
    rows = [row for run in runs for row in run.history if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == [1 / (step + 1) for step in range(ROWS + 5)]
    for axis in ("_step", "_timestamp"):
        assert [row[axis] for row in rows] == sorted({row[axis] for row in rows})


@pytest.mark.parametrize("flush", [NEVER, FLUSH_SECONDS])
def test_what_a_start_owes_is_still_owed_when_it_is_killed_at_once(tmp_path, flush):
    folder, log = tmp_path / "run", tmp_path / "log"
    for first, last in ((0, ROWS), (ROWS, ROWS), (ROWS, ROWS + 1)):
        how = (10 * FLUSH_SECONDS, flush) if first else (0, NEVER)
        killed = in_child(log, a_start, folder, first, last, signal.SIGKILL, "all", *how)
        assert killed == -signal.SIGKILL, log.read_text()
        time.sleep(0 if first else 1.1 * KEPT_SECONDS)  # old rows are owed as well
    assert in_child(log, a_start, folder, ROWS + 1, ROWS + 2) == 0, log.read_text()
    runs = offline_runs(folder)
    assert steps_of(runs) == list(range(ROWS + 2))
    at = [row["_step"] for run in runs for row in run.history if "train/loss" in row]
    assert at == sorted(set(at))


def test_rows_are_in_the_file_of_wandb_a_moment_after_they_were_logged(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    pause = 10 * FLUSH_SECONDS
    assert in_child(log, a_start, folder, 0, ROWS, signal.SIGKILL, "all", pause) == -signal.SIGKILL, log.read_text()
    assert steps_of(offline_runs(folder)) == list(range(ROWS))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run that has ended well."""
    folder = tmp_path_factory.mktemp("run")
    assert in_child(folder / "log", a_start, folder, 0, ROWS) == 0, (folder / "log").read_text()
    return folder


@pytest.fixture
def copy(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "run"))


def go_on(folder):
    assert in_child(folder / "log", a_start, folder, ROWS, ROWS + 1) == 0, (folder / "log").read_text()
    return steps_of(offline_runs(folder)[-1:])


def notes_of(folder):
    return json.loads((folder / "wandb_step.json").read_text())


def test_a_run_that_ended_well_owes_nothing_nor_one_whose_files_of_wandb_were_uploaded_and_deleted(copy):
    (copy / "wandb_step.json").write_text(json.dumps({**notes_of(copy), "log": "wandb/gone.wandb"}))
    assert go_on(copy) == [ROWS]
    assert len(notes_of(copy)["tail"]) == 1
    assert go_on(copy) == []


def test_a_file_that_cannot_be_read_is_a_warning(tmp_path):
    before = RunNotes(tmp_path)
    before.begin(tmp_path / "log")
    before.add({"train/loss": 0.5}, 0)
    (tmp_path / "log").mkdir()
    with pytest.warns(UserWarning, match="log cannot be read. IsADirectoryError"):
        assert RunNotes(tmp_path).begin(tmp_path / "next") == []


@pytest.mark.parametrize("text", ["", "\0", "7"], ids=["empty", "zeros", "number"])
def test_after_notes_that_a_crash_of_the_host_has_torn_wandb_goes_on_from_its_own_files(copy, text):
    (copy / "wandb_step.json").write_text(text)
    with pytest.warns(UserWarning, match="cannot be read, W&B goes on"):
        notes = RunNotes(copy)
    assert notes.unsent, "nobody knows"
    (file,) = copy.rglob("offline-run-*/*.wandb")
    notes.begin(file.parent.with_name("next") / file.name)
    assert (notes.fitted, notes.reached, notes.rows) == (ROWS - 1, ROWS - 1, ROWS + ROOM)
    assert notes.shown({"train/loss": 0.0}, ROWS - 1)
    assert not notes.shown({"val/loss": 0.0}, ROWS - 1)
    assert RunNotes(copy).rows == ROWS + ROOM


def test_without_the_private_names_of_wandb_rows_are_noted_for_longer_and_a_start_goes_on(tmp_path):
    told = []
    run = SimpleNamespace(
        settings=SimpleNamespace(),
        offline=True,
        disabled=False,
        log=lambda row, step=None: told.append(row),
        _label=None,
    )
    before = RunNotes(tmp_path)
    before.begin(None)
    before.add({"train/loss": 0.5}, 0)
    with pytest.warns(UserWarning, match="of unknown name"):
        logger = RunLogger(tmp_path, experiment=run)
    assert not logger.lost
    assert logger._notes.kept > 15


def test_notes_that_cannot_be_read_are_a_warning(tmp_path):
    (tmp_path / "wandb_step.json").mkdir()
    with pytest.warns(UserWarning, match="wandb_step.json cannot be read"):
        assert RunNotes(tmp_path).unsent


def test_a_start_with_wandb_disabled_notes_nothing(tmp_path):
    logger = RunLogger(tmp_path, experiment=SimpleNamespace(disabled=True, settings=SimpleNamespace(), _label=None))
    logger.log_metrics({"train/loss": 0.5}, 0)
    assert not (tmp_path / "wandb_step.json").exists()


def test_notes_of_a_version_before_are_read(copy):
    (copy / "wandb_step.json").write_text(json.dumps([ROWS - 1, ROWS - 1, ROWS]))
    assert go_on(copy) == [ROWS]


def test_a_kill_between_two_rows_of_a_step_costs_none_of_them(tmp_path):
    before, at = RunNotes(tmp_path), 7
    before.begin(tmp_path / "log")
    before.add({"train/loss": 0.5, "epoch": 0}, at)
    after = RunNotes(tmp_path)
    after.begin(tmp_path / "log")
    assert after.shown({"train/loss": 0.5, "epoch": 0}, at)
    assert not after.shown({"weights": object()}, at), "nor is what is no number"
    assert not after.shown({"val/loss": 0.6, "epoch": 0}, at)
    after.add({"val/loss": 0.6, "epoch": 0}, at)
    assert after.shown({"lr": 0.1}, at - 1)
    assert not after.shown({"train/loss": 0.5}, at + 1)
    again = RunNotes(tmp_path)
    assert again.shown({"train/loss": 0.5, "epoch": 0}, at)
    assert again.shown({"val/loss": 0.6, "epoch": 0}, at)


def test_rows_from_a_step_on_are_found_wherever_they_begin_in_a_file(tmp_path, monkeypatch):
    many = 1000
    assert in_child(tmp_path / "log", a_start, tmp_path / "run", 0, many) == 0
    (file,) = tmp_path.rglob("*.wandb")
    monkeypatch.setattr(wandb_log, "END", 1)
    assert file.stat().st_size > 2 * wandb_log.BLOCK
    for step in (0, 1, 500, many - 1):
        assert [row["_step"] for row in wandb_log.rows_from(file, step)] == list(range(step, many))
    assert wandb_log.rows_from(file, many) == []


def test_the_last_row_is_found_in_front_of_much_else(done, tmp_path):
    """Most of the file comes after it: not only its end is read."""
    last = notes_of(done)["tail"][-1]["_timestamp"]
    (file,) = done.rglob("*.wandb")
    assert last_time(file) == last
    longer = tmp_path / "longer.wandb"
    longer.write_bytes(file.read_bytes())
    with open(longer, "ab") as more:
        while more.tell() < 2**21:  # whole chunks without a record's content, block by block
            more.write(bytes([0, 0, 0, 0, 0, 0, 1]) * ((32 * 1024 - more.tell() % (32 * 1024)) // 7))
            more.write(bytes(-more.tell() % (32 * 1024)))
    assert last_time(longer) == last
