"""Signals end a run at once and cleanly; the same command goes on, and ends as an uninterrupted run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.processes import BUSY, started
from helpers.toys import Hook, boost, control, digests, fit, in_child, settings_for
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from bdistil.boosting.checks.trainer import check_strategy
from bdistil.cli.app import main
from bdistil.errors import UserError
from bdistil.utils.signals import Interrupted, StopSignals


def script(run_dir, number=None):
    """A run of a process of its own; a signal comes in the second epoch of its second round."""

    def send(trainer, module):
        if (module.number, trainer.current_epoch, trainer.global_step % 6) == (1, 1, 3):
            os.kill(os.getpid(), number)

    fit(control(run_dir), callbacks=lambda: [Hook(on_train_batch_start=send)] if number else [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_script_with_1_and_the_way_to_go_on(finished, tmp_path, number):
    log = tmp_path / "log"
    assert in_child(log, script, tmp_path / "run", number) == 1, log.read_text()
    assert "was interrupted with 1 of 3 rounds committed. Give the same command again" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert (tmp_path / "run/work/001/last.ckpt").exists(), "the first epoch of the round is kept"
    assert in_child(log, script, tmp_path / "run") == 0, log.read_text()
    assert digests(tmp_path / "run") == digests(finished.run_dir)


def test_handlers_are_those_of_before_when_a_run_is_over(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    boost(tmp_path, settings=settings_for(1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_second_signal_does_not_break_into_the_way_out():
    with StopSignals(lambda: "stopped") as signals:
        with pytest.raises(Interrupted, match="stopped"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):  # were the first one lost
            signals.check()


def with_pool(run_dir):
    """A run with a pool of forked processes, which it ends by SIGTERM."""

    def pool(trainer, module):
        with multiprocessing.get_context("fork").Pool(2) as workers:
            workers.map_async(time.sleep, [BUSY, BUSY])
            time.sleep(0.5)

    boost(run_dir, callbacks=lambda: [Hook(on_train_epoch_end=pool)], settings=settings_for(1), trainer={"epochs": 1})


def test_a_worker_that_is_ended_is_no_end_of_the_run(tmp_path):
    assert in_child(tmp_path / "log", with_pool, tmp_path / "run") == 0
    assert "was interrupted" not in (tmp_path / "log").read_text()
    assert "Accuracy of the prefix" in (tmp_path / "log").read_text()


def test_a_run_in_a_thread_leaves_the_handlers_alone(tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(boost(tmp_path, settings=settings_for(1))))
    thread.start()
    thread.join(60)
    assert ended[0].run.committed() == 1


# ---- strategies


@pytest.mark.parametrize("name", ["auto", "ddp", DDPStrategy(), SingleDeviceStrategy("cpu")])
def test_whole_modules_are_trained(name):
    check_strategy(name)


@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        "deepspeed_stage_2",
        "ddp_spawn",
        "ddp_notebook",
        DDPStrategy(start_method="spawn"),
        FSDPStrategy(),
        DeepSpeedStrategy.__new__(DeepSpeedStrategy),  # a kind of DDPStrategy; its package need not be here
    ],
)
def test_other_strategies_are_refused_with_the_way_out(name):
    with pytest.raises(UserError, match=r"Expected `strategy` .* got ((?i:fsdp|deepspeed)|ddp_).*'ddp'"):
        check_strategy(name)


def test_a_trainer_with_such_a_strategy_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(find_free_network_port()))
    with pytest.raises(Exception, match="got ddp_fork") as caught:
        boost(tmp_path, trainer={"strategy": "ddp_fork", "devices": 1})
    assert "Give strategy='ddp'" in str(caught.value)
    assert not list(tmp_path.glob("rounds/*"))


def test_a_recipe_with_such_a_strategy_is_refused(tmp_path, capsys):
    status = main(["fit", "--config", "digits", "--trainer.strategy", "fsdp", "--run_dir", str(tmp_path / "run")])
    assert status == 2
    assert "got fsdp" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


CHILD = "import time; from bdistil.utils.signals import end_with_parent; end_with_parent(); print(1); time.sleep(600)"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-uc", {CHILD!r}])
print(child.pid, flush=True)
child.wait()
"""


def test_a_process_ends_with_the_one_that_started_it():
    with started([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == b"1\n"  # the child has begun
        parent.kill()
        end = time.monotonic() + BUSY / 20
        while is_running(child) and time.monotonic() < end:
            time.sleep(0.1)
        assert not is_running(child)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
