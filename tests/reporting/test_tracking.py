"""Tracking: real runs of W&B without a network, and what happens where W&B does not work."""

import csv
import json
import os
import re
import signal
import socket
import threading
import time
from types import SimpleNamespace

import lightning as L
import pytest
import wandb
from helpers.wandb_offline import finished_runs, offline_runs
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from bdistil.reporting import curve_tracker, tracking
from bdistil.reporting.curve_tracker import CurveTracker
from bdistil.reporting.tracking import Tracking, make_logger
from bdistil.storage.run_directory import FORMAT

STEPS, KEY = 3, "0123456789" * 4
CURVE = [
    {"stage": "teacher", "macs": "900", "val_accuracy": "0.9", "latency_ms": "", "reason": ""},
    {"stage": "1", "macs": "10", "val_accuracy": "0.5", "latency_ms": "1.5", "reason": "the first"},
]
CONFIG = {"model": {"boosting": {"rounds": 2}}, "seed": 3}


class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss["loss"])
        return loss


def a_fit(loggers, steps_before):
    trainer = L.Trainer(
        accelerator="cpu", logger=loggers, max_steps=STEPS, limit_val_batches=0, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps_before
    trainer.fit(Model())


def a_record(number):
    return {
        "format": FORMAT,
        "round": number,
        "steps": STEPS,
        "curve": {"macs": 10 * number, "val_accuracy": 0.9 - number / 10, "why": "x"},
    }


def a_round(folder, number):
    """A committed round on the disk."""
    place = folder / "rounds" / f"{number:03d}"
    place.mkdir(parents=True)
    (place / "student.safetensors").write_bytes(b"weights")
    (place / "round.json").write_text(json.dumps(a_record(number)))
    return place


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """No settings of W&B but those of the test, in the environment, on the disk, or left in the process."""
    home = tmp_path_factory.mktemp("wandb")
    wandb.teardown()  # first, as it takes its WANDB_SERVICE out of the environment
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB_") or n.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home / name))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("NETRC", str(home / "netrc"))
        yield patch
        wandb.teardown()


@pytest.fixture
def fresh(alone, monkeypatch):
    """W&B has not read its settings yet."""
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture(scope="module")
def started_twice(alone, tmp_path_factory):
    """Two starts of one folder, two fits each; the second fails at its end. Gives the folder."""
    folder = tmp_path_factory.mktemp("run")
    settings = Tracking(project="mine", group="digits", name="digits-3", tags=["mnist", "tiny"])
    modes = []

    def start(first, restored):
        logger = make_logger(settings, folder, CONFIG)
        loggers = [logger, CSVLogger(folder, name="csv")]
        tracker = CurveTracker(loggers)
        try:
            for each in loggers:
                tracker.define(each)
            tracker.restore(restored)
            for number in (first, first + 1):
                a_fit(loggers, number * STEPS)
                record = a_record(number)
                tracker.round(record["curve"], number + 1, (number + 1) * STEPS)
                tracker.student(a_round(folder, number), number + 1, {"macs": record["curve"]["macs"]})
            tracker.curve(CURVE)
            modes.append(os.environ.get("WANDB_MODE"))
            if restored:
                raise RuntimeError
        finally:
            tracker.finish()
            modes.append(os.environ.get("WANDB_MODE"))

    start(0, [])
    with pytest.raises(RuntimeError):
        start(2, [a_record(0), a_record(1)])
    assert modes == [None] * 4  # of the process, not only of the run
    return folder


@pytest.fixture
def runs(started_twice):
    first, second = finished_runs(started_twice)
    return first, second


def rounds_in(rows):
    return [(r["round"], r["round/macs"], round(r["round/val_accuracy"], 3)) for r in rows if r.get("round")]


def test_rounds_are_in_the_history(runs):
    first, second = (rounds_in(run.history) for run in runs)
    assert first == [(1, 0, 0.9), (2, 10, 0.8)]
    assert second == [(1, 0, 0.9), (2, 10, 0.8), (3, 20, 0.7), (4, 30, 0.6)]


def test_steps_of_fits_and_rounds_are_one_axis(runs):
    fits = [[row["trainer/global_step"] for row in run.history if "train/loss" in row] for run in runs]
    assert fits == [list(range(6)), list(range(6, 12))]
    rounds = [[row["trainer/global_step"] for row in run.history if "round" in row] for run in runs]
    assert rounds == [[3, 6], [6, 6, 9, 12]]
    rows = [row["_step"] for run in runs for row in run.history]
    assert rows == sorted(set(rows)), "both starts are one run of W&B, in which a row has a place of its own"
    assert not any("round/why" in row for run in runs for row in run.history)


def test_each_metric_has_its_x_axis(runs):
    for run in runs:
        assert run.metrics == {
            "trainer/global_step": ("", []),
            "*": ("trainer/global_step", []),
            "round": ("", []),
            "round/*": ("round", []),
            "round/macs": ("round", []),
            "round/val_accuracy": ("round", ["max"]),
        }
    assert runs[1].summary["round/val_accuracy"] == {"max": pytest.approx(0.9)}


def test_the_curve_is_a_table_and_a_plot(runs, started_twice):
    shown = [row for row in runs[0].history if "curve/path" in row]
    assert len(shown) == 1
    file = next(started_twice.rglob("files/" + shown[0]["curve/path"]))
    table = json.loads(file.read_text())
    assert table["columns"] == list(CURVE[0])
    assert table["data"] == [["teacher", 900, 0.9, None, None], ["1", 10, 0.5, 1.5, "the first"]]
    plot = runs[0].config["_wandb/visualize/accuracy_vs_macs"]["panel_config"]
    assert plot["panelDefId"] == "wandb/line/v0"
    assert plot["fieldSettings"] == {"x": "macs", "y": "val_accuracy", "stroke": None}
    assert "multiply-adds" in plot["stringSettings"]["title"]


def test_students_are_artifacts(runs, started_twice):
    found = [[a for a in run.artifacts if a["type"] == "student"] for run in runs]
    number = 0
    for artifact in found[0] + found[1]:
        assert artifact["name"] == "student-" + (started_twice / "wandb_id.txt").read_text()
        assert artifact["aliases"] == {f"round-{number + 1}", "latest"}
        assert artifact["metadata"] == {"macs": 10 * number}
        place = started_twice / "rounds" / f"{number:03d}"  # in place, not copied
        assert artifact["files"] == {n: str(place / n) for n in ("round.json", "student.safetensors")}
        number += 1
    assert number == 4


def test_a_folder_is_one_run(runs, started_twice):
    for run in runs:
        assert run.run == {
            "run_id": (started_twice / "wandb_id.txt").read_text(), "run_group": "digits", "job_type": "fit",
            "project": "mine", "name": "digits-3", "tags": ["mnist", "tiny"],
        }  # fmt: skip
        assert {key: run.config[key] for key in CONFIG} == CONFIG


def test_a_run_that_fails_is_marked(runs):
    assert [run.exit_code for run in runs] == [0, 1]


def test_other_loggers_get_the_rounds(started_twice):
    with open(started_twice / "csv" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["round"]]
    assert [(row["step"], row["round"], row["round/macs"]) for row in rows] == [("3", "1", "0.0"), ("6", "2", "10.0")]


# ---- where W&B does not work


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started_offline(logger):
    """Was the run made, offline, with a start and an end that are bounded? Ends it."""
    settings = logger.experiment.settings
    CurveTracker([logger]).finish()
    return settings.mode == "offline" and settings.init_timeout <= 10 and 0 < settings.finish_timeout <= 60


@pytest.mark.parametrize(("mode", "key_in"), [("auto", "environment"), ("online", "netrc")])
def test_a_dead_server_makes_the_run_offline(fresh, tmp_path, mode, key_in):
    server = f"127.0.0.1:{closed_port()}"
    fresh.setenv("WANDB_BASE_URL", f"http://{server}")
    if key_in == "netrc":
        (tmp_path / "netrc").write_text(f"machine {server}\nlogin user\npassword {KEY}\n")
        fresh.setenv("NETRC", str(tmp_path / "netrc"))
    else:
        fresh.setenv("WANDB_API_KEY", KEY)
    start = time.monotonic()
    with pytest.warns(
        UserWarning, match=rf"offline: http://{re.escape(server)} .*refused.*`wandb sync {tmp_path}/wandb/"
    ):
        logger = make_logger(Tracking(mode=mode), tmp_path, {})
    assert time.monotonic() - start < 5
    assert started_offline(logger)


def test_a_proxy_is_knocked_at_in_place_of_the_server(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        tracking._knock("https://wandb.invalid", 3)
    with pytest.raises(ConnectionRefusedError):
        tracking._knock("https://wandb.invalid", 3)


def test_a_slow_look_up_of_the_name_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(tracking, "create_connection", lambda *_: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        tracking._knock("http://wandb.invalid", 0.1)
    assert type(caught.value).__name__ == "TimeoutError"
    assert time.monotonic() - start < 1


def test_a_server_that_says_nothing_makes_the_run_offline(fresh, tmp_path):
    fresh.setattr(tracking, "INIT_SECONDS", 1.0)
    fresh.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        fresh.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.warns(UserWarning, match=r"offline: http://127.* did not start the run"):
            logger = make_logger(Tracking(), tmp_path, {})
        assert started_offline(logger)


@pytest.mark.parametrize(
    ("key", "message"), [("", "no API key is configured, see `wandb login`"), ("short", "API key must have 40")]
)
def test_online_without_a_key_is_offline_with_a_warning(fresh, tmp_path, key, message):
    fresh.setenv("WANDB_API_KEY", key)
    with pytest.warns(UserWarning, match=message):
        logger = make_logger(Tracking(mode="online"), tmp_path, {})
    assert started_offline(logger)


@pytest.mark.parametrize(("mode", "variable"), [("auto", None), ("offline", None), ("online", "offline")])
def test_what_the_user_expects_is_no_warning(fresh, tmp_path, caplog, mode, variable):
    if variable:
        fresh.setenv("WANDB_MODE", variable)
        fresh.setenv("WANDB_API_KEY", KEY)
    logger = make_logger(Tracking(mode=mode), tmp_path, {})
    assert started_offline(logger)
    assert sum(f"`wandb sync {tmp_path}/wandb/offline-run-*`" in message for message in caplog.messages) == 1


def test_wandb_dir_is_where_wandb_writes(fresh, tmp_path):
    fresh.setenv("WANDB_DIR", str(tmp_path))
    logger = make_logger(Tracking(), tmp_path / "run", {})
    assert started_offline(logger)
    assert len(offline_runs(tmp_path / "wandb")) == 1
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["wandb_id.txt", "wandb_step.json"]


@pytest.mark.parametrize(("mode", "variable"), [("disabled", None), ("online", "disabled")])
def test_disabled_is_no_logger(fresh, tmp_path, mode, variable):
    if variable:
        fresh.setenv("WANDB_MODE", variable)
    assert make_logger(Tracking(mode=mode), tmp_path, {}) is None
    assert not list(tmp_path.iterdir())


@pytest.fixture
def logger_and_service(fresh, tmp_path):
    """A logger with one row, and the process of W&B behind it."""
    logger = make_logger(Tracking(mode="offline"), tmp_path, {})
    logger.log_metrics({"train/loss": 1.0}, 4)
    service = wandb.setup()._connection._proc._process
    yield logger, service
    service.wait()  # or Python complains of it, in some other test


@pytest.fixture
def killed(logger_and_service):
    """A logger whose process of W&B has been killed after its first row."""
    logger, service = logger_and_service
    service.kill()
    service.wait()
    return logger


def test_a_killed_process_of_wandb_is_one_warning_and_the_fit_goes_on(killed, tmp_path):
    with pytest.warns(UserWarning, match=r"W&B is gone \(.*after step 5 is not there") as caught:
        a_fit([killed], 5)
    track_everything(CurveTracker([killed]), a_round(tmp_path, 0), torn=False)
    assert len([w for w in caught if "W&B" in str(w.message)]) == 1


def test_a_kill_between_two_rounds_is_the_same_warning(killed, tmp_path):
    after = Recorder()
    tracker = CurveTracker([killed, after])
    with pytest.warns(UserWarning, match="W&B is gone"):
        tracker.define(killed)
    track_everything(tracker, a_round(tmp_path, 0), torn=False)
    assert after.rows == [(1, 3), (2, 3)]


def test_a_kill_while_the_end_of_the_run_is_waited_for_is_the_same_warning(logger_and_service):
    """As SLURM ends both at once; Python's own end would have a traceback otherwise."""
    logger, service = logger_and_service
    service.send_signal(signal.SIGSTOP)
    kill = threading.Timer(1, service.kill)
    kill.start()
    with pytest.warns(UserWarning, match="W&B is gone") as caught:
        CurveTracker([logger]).finish()
    kill.join()
    assert len(caught) == 1


def test_a_start_after_a_kill_shows_no_step_twice_and_never_goes_back(fresh, tmp_path):
    """What the start before has logged of the epoch that is trained again, stays as it is."""
    for first in (0, 2):  # the second start goes on two steps before the end of the first
        logger = make_logger(Tracking(mode="offline"), tmp_path, {})
        tracker = CurveTracker([logger])
        tracker.define(logger)
        tracker.restore([a_record(0)] if first else [])
        a_fit([logger], first)
        a_fit([logger], first + STEPS)
        tracker.finish(0)
    first, second = finished_runs(tmp_path)
    assert [row["trainer/global_step"] for row in first.history] == [0, 1, 2, 3, 4, 5]
    assert [(row["trainer/global_step"], row.get("round")) for row in second.history] == [(5, 1), (6, None), (7, None)]
    assert first.run["run_id"] == second.run["run_id"]


def broken(*_, **__):
    raise RuntimeError("W&B is broken")


def test_a_broken_wandb_is_a_warning_and_no_logger(fresh, tmp_path):
    fresh.setattr(wandb, "init", broken)
    with pytest.warns(UserWarning, match="not tracked there. RuntimeError: W&B is broken") as caught:
        assert make_logger(Tracking(), tmp_path, {}) is None
    assert len(caught) == 1


def test_only_rank_zero_makes_a_run(fresh, tmp_path):
    fresh.setattr(rank_zero_only, "rank", 1)
    fresh.setattr(wandb, "init", broken)
    made = []
    fresh.setattr(wandb, "Artifact", lambda *_, **__: made.append(1))
    tracker = CurveTracker([make_logger(Tracking(), tmp_path / "run", {})])
    track_everything(tracker, tmp_path)
    assert not made
    assert not list(tmp_path.iterdir())


def track_everything(tracker, folder, *, torn=True):
    for logger in tracker.loggers:
        tracker.define(logger)
    tracker.restore([a_record(0)])
    tracker.restore([{}] if torn else [])
    tracker.round({"macs": 3}, 2, 3)
    tracker.curve(CURVE)
    tracker.curve([] if torn else CURVE)
    tracker.student(folder, 1, {})
    tracker.finish()


class Recorder(CSVLogger):
    """Keeps what it is given; `run` stands for the W&B run behind it."""

    def __init__(self, run=None):
        self.run, self.rows = run, []

    @property
    def experiment(self):
        return self.run

    def log_metrics(self, metrics, step=None):
        self.rows.append((metrics["round"], step))

    def save(self):
        pass


def test_a_tracker_that_fails_is_one_warning(tmp_path):
    class Broken(Recorder):
        experiment = property(broken)

    after = Recorder()
    tracker = CurveTracker([Broken(), after])
    with pytest.warns(
        UserWarning, match="Tracking failed, the run goes on without. RuntimeError: W&B is broken"
    ) as caught:
        track_everything(tracker, tmp_path)
    assert len(caught) == 1
    assert after.rows == [(1, 3), (2, 3)]


@pytest.mark.parametrize(("slow", "tried"), [(100.0, 4), (0.0, 2)])
def test_a_student_that_is_refused_is_a_warning_and_the_last_where_that_took_long(monkeypatch, tmp_path, slow, tried):
    """Each would wait for a minute for a server that has gone."""
    monkeypatch.setattr(curve_tracker, "SLOW_SECONDS", slow)
    taken = []

    class Run:
        id, define_metric = "x", None

        def log_artifact(self, artifact, aliases):
            taken.append(aliases[0])
            if aliases[0] == "round-2":
                raise RuntimeError("the server has gone")

    tracker = CurveTracker([Recorder(Run())])
    tracker.warned = True  # of something else
    folders = [a_round(tmp_path, number) for number in range(4)]
    tracker.student(folders[0], 1, {})
    with pytest.warns(UserWarning, match="student of round 2 is not in W&B") as caught:
        tracker.student(folders[1], 2, {})
    assert ("nor will those of later rounds" in str(caught[0].message)) == (tried == 2)
    for number in (2, 3):
        tracker.student(folders[number], number + 1, {})
    assert taken == [f"round-{number}" for number in range(1, tried + 1)]


def test_a_step_that_goes_back_is_the_last_one():
    logger = Recorder()
    tracker = CurveTracker([logger])
    tracker.round({}, 1, 8)
    tracker.round({}, 2, 5)
    assert logger.rows == [(1, 8), (2, 8)]


def test_rounds_that_a_run_has_are_not_logged_again():
    resumed = Recorder(SimpleNamespace(define_metric=lambda *_, **__: None, summary={"round": 2}))
    plain = Recorder()
    CurveTracker([resumed, plain]).restore([a_record(number) for number in range(3)])
    assert resumed.rows == [(3, 9)]
    assert plain.rows == [(1, 3), (2, 6), (3, 9)]
