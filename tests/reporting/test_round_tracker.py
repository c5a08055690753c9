"""Rounds in loggers: real offline runs of W&B, a CSVLogger beside them, and loggers that fail."""

import csv
import json
import os
import warnings

import pytest
import wandb
from helpers.toys import control, fit, settings_for
from helpers.tracked_fits import CURVE, STEPS, commit, curve_row, fit_round, new_trainer
from helpers.wandb_offline import finished_runs
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from bdistil.reporting.round_tracker import RoundTracker
from bdistil.reporting.tracking import Tracking, make_logger
from bdistil.storage.run_directory import RunDirectory

CONFIG = {"model": {"boosting": {"rounds": 2}}, "seed": 3}


@pytest.fixture(scope="module")
def run(alone, tmp_path_factory):
    """A run directory after two starts, two rounds each; the second fails at its end."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    settings = Tracking(mode="offline", project="mine", group="digits", name="digits-3", tags=["mnist", "tiny"])
    modes = []

    def start(first, error=None):
        loggers = [make_logger(settings, run.root, CONFIG), CSVLogger(run.root, name="csv")]
        tracker = RoundTracker(run)
        try:
            for number in (first, first + 1):
                fit_round(tracker, loggers, number)
            run.write_curve(CURVE)
            tracker.finish()
            modes.append(os.environ.get("WANDB_MODE"))
            if error:
                raise error
        finally:
            tracker.close()
            modes.append(os.environ.get("WANDB_MODE"))

    start(0)
    with pytest.raises(RuntimeError):
        start(2, RuntimeError())
    assert modes == [None] * 4  # of the process, not only of the run
    return run


@pytest.fixture(scope="module")
def starts(run):
    first, second = finished_runs(run.root)
    return first, second


def rounds_in(rows):
    return [(r["round"], r["round/macs"], round(r["round/val_accuracy"], 3)) for r in rows if r.get("round")]


def test_rounds_are_in_the_history_and_again_in_that_of_the_next_start(starts):
    first, second = (rounds_in(start.history) for start in starts)
    assert first == [(1, 0, 0.9), (2, 10, 0.8)]
    assert second == [*first, (3, 20, 0.7), (4, 30, 0.6)]


def test_steps_of_fits_and_rounds_are_one_axis(starts):
    fits = [[row["trainer/global_step"] for row in start.history if "train/loss" in row] for start in starts]
    assert fits == [list(range(6)), list(range(6, 12))]
    rounds = [[row["trainer/global_step"] for row in start.history if "round" in row] for start in starts]
    assert rounds == [[3, 6], [3, 6, 9, 12]]
    assert not any("round/why" in row for start in starts for row in start.history)


def test_each_metric_has_its_x_axis(starts):
    for start in starts:
        assert start.metrics == {
            "trainer/global_step": ("", []),
            "*": ("trainer/global_step", []),
            "round": ("", []),
            "round/macs": ("round", []),
            "round/val_accuracy": ("round", ["max"]),
        }
    assert starts[1].summary["round/val_accuracy"] == {"max": pytest.approx(0.9)}


def test_the_curve_is_a_table_and_a_plot(starts, run):
    shown = [row for row in starts[0].history if "curve/path" in row]
    assert len(shown) == 1
    file = next(run.root.rglob("files/" + shown[0]["curve/path"]))
    table = json.loads(file.read_text())
    cells = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    for row, expected in zip(cells, run.read_curve(), strict=True):
        assert row["stage"] == expected["stage"]
        assert row["macs"] == float(expected["macs"])
        assert row["latency_ms"] == (float(expected["latency_ms"]) if expected["latency_ms"] else None)
        assert row["reason"] == (expected["reason"] or None)
    plot = starts[0].config["_wandb/visualize/accuracy_vs_macs"]["panel_config"]
    assert plot["panelDefId"] == "wandb/line/v0"
    assert plot["fieldSettings"] == {"x": "macs", "y": "val_accuracy", "stroke": None}
    assert "multiply-adds" in plot["stringSettings"]["title"]


def test_students_are_artifacts(starts, run):
    found = [artifact for start in starts for artifact in start.artifacts if artifact["type"] == "student"]
    assert len(found) == 4
    for number, artifact in enumerate(found):
        assert artifact["name"] == "student-" + (run.root / "wandb_id.txt").read_text()
        assert artifact["aliases"] == {f"round-{number + 1}", "latest"}
        assert artifact["metadata"] == curve_row(number)
        place = run.folder(number)  # in place, not copied
        assert artifact["files"] == {n: str(place / n) for n in ("round.json", "student.safetensors")}


def test_a_folder_is_one_run(starts, run):
    for start in starts:
        assert start.run == {
            "run_id": (run.root / "wandb_id.txt").read_text(), "run_group": "digits", "job_type": "fit",
            "project": "mine", "name": "digits-3", "tags": ["mnist", "tiny"],
        }  # fmt: skip
        assert {key: start.config[key] for key in CONFIG} == CONFIG


def test_a_run_that_fails_is_marked(starts):
    assert [start.exit_code for start in starts] == [0, 1]


def test_other_loggers_get_the_rounds(run):
    with open(run.root / "csv" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["round"]]
    assert [(row["step"], row["round"], row["round/macs"]) for row in rows] == [("3", "1", "0.0"), ("6", "2", "10.0")]


def test_rejected_tries_have_steps_of_their_own_and_no_part_in_the_summary(fresh, tmp_path):
    controller = control(tmp_path, settings=settings_for(accept="progress", min_progress=0.9))
    try:
        fit(controller, logger=make_logger(Tracking(mode="offline"), tmp_path, {}), log_every_n_steps=1)
    finally:
        controller.tracker.close()
    assert controller.run.stopped
    (start,) = finished_runs(tmp_path)
    steps = [row["trainer/global_step"] for row in start.history if "val_rms" in row]
    assert len(steps) == 6  # two epochs of the first round and of both tries of the second
    assert steps == sorted(set(steps))
    last = controller.run.rows()[-1]
    for key, column in (("val_accuracy", "val_accuracy"), ("val_loss", "val_loss"), ("val_rms", "rms_error")):
        assert start.summary[key] == pytest.approx(last[column], rel=1e-5)


# ---- loggers that fail


class Recorder(CSVLogger):
    """Keeps the rounds that it is given."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((metrics["round"], step))

    def save(self):
        pass


def track_everything(loggers, folder):
    """A tracker is called in all its ways; two rounds, the first of which is committed."""
    run = RunDirectory(folder)
    commit(run, 0)
    run.write_curve(CURVE)
    tracker, trainer = RoundTracker(run), new_trainer(loggers)
    tracker.start(trainer, 1)
    commit(run, 1)
    tracker.committed(trainer, curve_row(1), 1)
    tracker.finish()
    tracker.close()


def test_a_logger_that_fails_is_one_warning(tmp_path):
    class Broken(WandbLogger):
        @property
        def experiment(self):
            raise RuntimeError("W&B is broken")

    after = Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        track_everything([Broken(experiment=object()), after], tmp_path)
    messages = [str(warning.message) for warning in caught if "W&B is broken" in str(warning.message)]
    assert [message.split(" to W&B")[0].split(",")[0] for message in messages] == [
        "Broken failed", "The student of round 2 was not logged", "The curve was not logged",
    ]  # fmt: skip
    assert after.rows == [(1, STEPS), (2, STEPS)]


def test_after_a_student_that_is_refused_no_other_is_offered(tmp_path):
    """Each would wait for a minute for a server that has gone."""
    offered = []

    class Run:
        id, log, define_metric, finish = "x", *(lambda *_, **__: None,) * 3

        def log_artifact(self, artifact, aliases):
            offered.append(aliases[0])
            if aliases[0] == "round-2":
                raise RuntimeError("the server has gone")

    run = RunDirectory(tmp_path)
    tracker, trainer = RoundTracker(run), new_trainer([WandbLogger(experiment=Run())])
    tracker.start(trainer, 0)
    for number in range(4):
        commit(run, number)
    tracker.committed(trainer, {}, 0)
    with pytest.warns(UserWarning, match="student of round 2 was not logged .* later rounds will not be"):
        tracker.committed(trainer, {}, 1)
    for number in (2, 3):
        tracker.committed(trainer, {}, number)
    assert offered == ["round-1", "round-2"]


def test_only_rank_zero_makes_a_run(fresh, tmp_path):
    fresh.setattr(rank_zero_only, "rank", 1)
    made = []
    for name in ("init", "Artifact", "Table"):
        fresh.setattr(wandb, name, lambda *_, **__: made.append(1))
    logger = make_logger(Tracking(), tmp_path / "tracked", {})
    track_everything([logger], tmp_path / "run")
    assert not made
    assert not (tmp_path / "tracked").exists()
