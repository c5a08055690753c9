"""The W&B logger of a run directory, where W&B works offline, and where it does not work."""

import re
import shutil
import signal
import socket
import threading
import time

import pytest
import wandb
from helpers.tracked_fits import CURVE, STEPS, Model, commit, curve_row, new_trainer
from helpers.wandb_offline import offline_runs

from bdistil.reporting import tracking
from bdistil.reporting.round_tracker import RoundTracker
from bdistil.reporting.tracking import Tracking, make_logger
from bdistil.storage.run_directory import RunDirectory

KEY = "0123456789" * 4


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started_offline(logger):
    """Was the run made, offline, with a start and an end that are bounded? Ends it."""
    settings = logger.experiment.settings
    logger.experiment.finish()
    return settings.mode == "offline" and settings.init_timeout <= 10 and 0 < settings.finish_timeout <= 60


@pytest.mark.parametrize(("mode", "key_in"), [("auto", "environment"), ("online", "netrc")])
def test_a_dead_server_makes_the_run_offline(fresh, tmp_path, mode, key_in):
    fresh.setattr(tracking, "INIT_SECONDS", 2.0)
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
    assert time.monotonic() - start < 30
    assert started_offline(logger)


def test_a_server_that_does_not_answer_makes_the_run_offline(fresh, tmp_path):
    fresh.setattr(tracking, "INIT_SECONDS", 2.0)
    fresh.setenv("WANDB_API_KEY", KEY)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        fresh.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.warns(UserWarning, match=r"offline: http://127.* did not start the run"):
            logger = make_logger(Tracking(), tmp_path, {})
        assert time.monotonic() - start < 30
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
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"wandb_id.txt", "wandb_place.txt"}


def test_a_copy_of_a_run_directory_is_a_run_of_its_own_and_a_moved_one_goes_on(fresh, tmp_path):
    def start(folder):
        logger = make_logger(Tracking(mode="offline"), folder, {})
        found = logger.experiment.id
        logger.experiment.finish()
        return found

    first, copy, moved = (tmp_path / name for name in ("first", "copy", "moved"))
    own = start(first)
    shutil.copytree(first, copy)
    other = start(copy)
    assert other != own
    assert (start(first), start(copy)) == (own, other)
    first.rename(moved)
    assert start(moved) == own
    first.symlink_to(moved)
    assert start(first) == own


@pytest.mark.parametrize(("mode", "variable"), [("disabled", None), ("online", "disabled")])
def test_disabled_is_no_logger(fresh, tmp_path, mode, variable):
    if variable:
        fresh.setenv("WANDB_MODE", variable)
    assert make_logger(Tracking(mode=mode), tmp_path, {}) is None
    assert not list(tmp_path.iterdir())


def test_after_the_command_wandb_disabled_nothing_is_written(fresh, tmp_path):
    (tmp_path / "config" / "wandb").mkdir(parents=True)
    (tmp_path / "config" / "wandb" / "settings").write_text("[default]\nmode = disabled\n")
    fresh.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config" / "wandb"))
    logger = make_logger(Tracking(mode="online"), tmp_path / "run", {})
    logger.log_metrics({"train/loss": 1.0}, 0)
    assert not logger.lost
    assert not list((tmp_path / "run").rglob("*.wandb"))


def test_a_broken_wandb_is_a_warning_and_no_logger(fresh, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("W&B is broken")

    fresh.setattr(wandb, "init", broken)
    with pytest.warns(UserWarning, match="not tracked there. RuntimeError: W&B is broken") as caught:
        assert make_logger(Tracking(), tmp_path, {}) is None
    assert len(caught) == 1


# ---- the process of W&B is killed


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


def a_tracker(folder, logger):
    """A tracker of a run with one round, which has started its second."""
    run = RunDirectory(folder / "run")
    commit(run, 0)
    run.write_curve(CURVE)
    tracker, trainer = RoundTracker(run), new_trainer([logger])
    tracker.start(trainer, 1)
    return tracker, trainer


def test_a_killed_process_of_wandb_is_one_warning_and_training_continues(killed, tmp_path):
    trainer = new_trainer([killed])
    with pytest.warns(UserWarning, match="W&B failed .*training continues") as caught:
        trainer.fit(Model())
    assert trainer.global_step == STEPS
    tracker, trainer = a_tracker(tmp_path, killed)
    tracker.committed(trainer, curve_row(0), 0)
    tracker.finish()
    tracker.close()
    assert len([w for w in caught if "W&B" in str(w.message)]) == 1


def test_a_kill_between_two_rounds_is_the_same_warning(killed, tmp_path):
    with pytest.warns(UserWarning, match="W&B failed"):
        a_tracker(tmp_path, killed)


def test_a_kill_while_the_end_of_the_run_is_waited_for_is_the_same_warning(logger_and_service, tmp_path):
    """As SLURM ends both at once; Python's own end would have a traceback otherwise."""
    logger, service = logger_and_service
    tracker, _ = a_tracker(tmp_path, logger)
    service.send_signal(signal.SIGSTOP)
    kill = threading.Timer(1, service.kill)
    kill.start()
    with pytest.warns(UserWarning, match="W&B failed") as caught:
        tracker.close()
    kill.join()
    assert len(caught) == 1
