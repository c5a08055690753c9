"""One start at a time in a run directory; a dead process blocks nobody."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import kill, started
from helpers.toys import Hook, Toys, control, fit, make_trainer

from bdistil import UserError
from bdistil.storage import run_lock
from bdistil.storage.run_directory import RunDirectory
from bdistil.storage.run_lock import RunLock

HOLDER = """
import multiprocessing, sys, time, types
from pathlib import Path
for name in ("bdistil", "bdistil.storage"):  # without what they import, which takes seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(sys.argv[2], *name.split(".")))]
from bdistil.storage.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
worker = None
if len(sys.argv) > 3:  # as a DataLoader with workers: a forked process shares the open file
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(float(sys.argv[3]),))
    worker.start()
if "release" in sys.argv:
    lock.release()
print("held", worker and worker.pid, flush=True)
time.sleep(600)
"""


def holder(path, *words):
    """A process that holds a lock; with a number of seconds, so does a worker of it that lives as long."""
    root = Path(__file__).parents[2]
    return started([sys.executable, "-c", HOLDER, path, root, *words], stdout=subprocess.PIPE, text=True)


def test_the_second_of_two_processes_is_refused_by_name(tmp_path):
    with holder(tmp_path / "lock") as first:
        first.stdout.readline()
        before = time.monotonic()
        with pytest.raises(UserError) as refused:
            RunLock(tmp_path / "lock").acquire()
        assert time.monotonic() - before < 5
    for word in (f"process {first.pid} on host {socket.gethostname()}", str(tmp_path), "another `run_dir`"):
        assert word in str(refused.value)


def test_a_killed_process_blocks_nobody(tmp_path):
    with holder(tmp_path / "lock") as first:
        first.stdout.readline()
        kill(first.pid)
        first.wait()
        mine = RunLock(tmp_path / "lock")
        mine.acquire()
    assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    mine.release()
    assert (tmp_path / "lock").read_text() == ""


def test_workers_of_a_killed_process_are_waited_for(tmp_path):
    with holder(tmp_path / "lock", 1.5) as first:
        first.stdout.readline()
        kill(first.pid)
        first.wait()
        before = time.monotonic()
        RunLock(tmp_path / "lock").acquire()
        assert 0.5 < time.monotonic() - before < 30


def test_workers_do_not_keep_a_lock_that_was_given_back(tmp_path):
    with holder(tmp_path / "lock", 30, "release") as first:
        worker = int(first.stdout.readline().split()[1])
        RunLock(tmp_path / "lock").acquire()
        kill(worker)


def test_workers_that_outlive_a_killed_process_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LINGER", 0.5)
    with holder(tmp_path / "lock", 30) as first:
        worker = int(first.stdout.readline().split()[1])
        kill(first.pid)
        first.wait()
        RunLock(tmp_path / "lock").acquire()
        kill(worker)


def test_one_object_may_hold_it_several_times_and_let_go_in_any_order(tmp_path):
    lock, other = RunLock(tmp_path / "lock"), RunLock(tmp_path / "lock")
    outer, inner = lock.held(), lock.held()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with pytest.raises(UserError, match=r"this process; an earlier loop over `rounds\(\)` has not ended"):
        other.acquire()
    inner.__exit__(None, None, None)
    other.acquire()
    lock.release()  # what it does not hold
    with pytest.raises(UserError):
        lock.acquire()


def written(path, **holder):
    path.write_text(json.dumps({"host": "elsewhere", "process": 1, "job": None, "restarts": 0, **holder}))
    return RunLock(path)


@pytest.mark.parametrize(
    ("holder", "taken"),
    [
        ({}, False),
        ({"job": "77"}, True),  # the same job, before it was requeued on this host
        ({"job": "77", "restarts": 1}, False),  # another step of the same start of the job
        ({"job": "78"}, False),
    ],
)
def test_a_requeued_job_passes_over_itself_on_another_host(tmp_path, monkeypatch, holder, taken):
    """A file server may keep the lock of a dead host for a while."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(run_lock, "LINGER", 0.0)
    monkeypatch.setattr(run_lock, "_try_lock", lambda handle: False)
    lock = written(tmp_path / "lock", **holder)
    if taken:
        lock.acquire()
        return
    with pytest.raises(UserError, match="process 1 on host elsewhere"):
        lock.acquire()


def test_without_locks_of_the_file_system_only_a_live_process_of_this_host_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_try_lock", lambda handle: None)
    here = socket.gethostname()
    written(tmp_path / "a").acquire()
    written(tmp_path / "b", host=here, process=os.getpid()).acquire()
    with pytest.raises(UserError, match=f"process {os.getppid()} on host {here}"):
        written(tmp_path / "c", host=here, process=os.getppid()).acquire()


def test_two_starts_of_a_run(tmp_path):
    """The second one is refused before its first round; the first one is not disturbed."""
    first, data = control(tmp_path), Toys()
    rounds = first.rounds(data)
    module = next(rounds)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on host {socket.gethostname()}"):
        next(control(tmp_path).rounds(Toys()))
    make_trainer(first).fit(module, data)
    rounds.close()
    fit(control(tmp_path))


def test_a_fit_that_fails_lets_go_even_where_its_loop_is_kept_alive(tmp_path):
    """As a notebook does, which keeps the last traceback."""

    def fail(trainer, module):
        raise InterruptedError

    kept = []
    try:
        fit(control(tmp_path), callbacks=lambda: [Hook(on_train_start=fail)])
    except InterruptedError as error:
        kept.append(error)
    assert len(fit(control(tmp_path)).ensemble)
    del kept


def test_other_processes_of_a_job_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("bdistil.utils.distributed.early_rank", lambda: 1)
    with RunDirectory(tmp_path).in_use(), RunDirectory(tmp_path).in_use():
        assert not (tmp_path / ".lock").exists()
