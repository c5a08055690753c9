"""The shipped sbatch files on a real SLURM of one node: a run that is requeued ends as an uninterrupted one."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
from toys import TIMES, curve, digests
from wandb_offline import offline_runs

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.slurm]

ONE_NODE = Path(__file__).with_name("one_node_slurm.sh")
BIN = Path(sys.executable).parent
RECIPES = Path(str(files("bdistil") / "recipes"))
DIGITS = [
    "--config", "digits", "--model.boosting.rounds", "2", "--trainer.max_epochs", "150", "--trainer.accelerator", "cpu",
    "--model.teacher.epochs", "2", "--model.teacher.network.channels", "[4,8]",
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Calls of SLURM's commands, in a folder to submit jobs from."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([ONE_NODE, "start", folder / "daemons"], capture_output=True, text=True, timeout=300)
    if started.returncode == 3:
        pytest.skip(f"no SLURM here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    environ = {
        **os.environ, "SLURM_CONF": str(folder / "daemons/slurm.conf"), "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline",
    }  # fmt: skip

    def call(*words):
        done = subprocess.run(list(map(str, words)), env=environ, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.folder, call.environ = folder, environ
    yield call
    subprocess.run([ONE_NODE, "stop", folder / "daemons"], check=True, timeout=60)


@pytest.fixture(scope="module")
def uninterrupted(slurm):
    """The run on two processes of torchrun."""
    run_dir = slurm.folder / "uninterrupted"
    slurm("torchrun", "--standalone", "--nproc-per-node", 2, "--no-python", "bdistil", "fit", *DIGITS,
          "--run_dir", run_dir, "--trainer.strategy", "ddp", "--trainer.devices", 2)  # fmt: skip
    return run_dir


def submit(slurm, file, name, *options):
    """Submits a shipped sbatch file; the job's number, its run directory and its log."""
    told = slurm("sbatch", f"--job-name={name}", *options, RECIPES / "slurm" / file, *DIGITS)
    number = re.search(r"\d+", told)[0]
    return number, slurm.folder / f"runs/{name}-{number}", slurm.folder / f"{name}-{number}.out"


def wait(until, log, seconds=900):
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, log.read_text()[-5000:] if log.exists() else "the job did not start"
        time.sleep(0.2)
    return found


def ended(slurm, number):
    state = re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", number))[1]
    return state if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else None


def check_run(run_dir, uninterrupted, log):
    """Complete, equal to the uninterrupted run to the last bit, and one run of W&B. Gives its starts."""
    assert digests(run_dir) == digests(uninterrupted)
    assert len(digests(run_dir)) == 2
    assert curve(run_dir, without=TIMES) == curve(uninterrupted, without=TIMES)
    for file in sorted((uninterrupted / "ledger").rglob("*.f32")):
        assert file.read_bytes() == (run_dir / "ledger" / file.relative_to(uninterrupted / "ledger")).read_bytes()
    assert not list(run_dir.rglob("hpc_ckpt*"))
    assert (run_dir / "report.html").exists()
    starts = json.loads((run_dir / "environment.json").read_text())
    assert [int(start["told"].get("SLURM_RESTART_COUNT", 0)) for start in starts] == list(range(len(starts)))
    assert {(start["processes"], start["told"]["SLURM_JOB_ID"]) for start in starts} == {
        (2, run_dir.name.split("-")[-1])
    }
    assert log.read_text().count("was interrupted with") == len(starts) - 1
    tracked = offline_runs(run_dir)
    assert len(tracked) == len(starts)
    assert {run.run["run_id"] for run in tracked if run.run} == {(run_dir / "wandb_id.txt").read_text()}
    return starts


def test_a_job_that_is_requeued_in_the_middle_goes_on(slurm, uninterrupted):
    number, run_dir, log = submit(slurm, "one_node.sbatch", "requeued", "--time=20")
    wait((run_dir / "work/001/last.ckpt").exists, log)
    slurm("scontrol", "requeue", number)
    assert wait(lambda: ended(slurm, number), log) == "COMPLETED", log.read_text()[-5000:]
    starts = check_run(run_dir, uninterrupted, log)
    assert len(starts) == 2
    assert starts[0]["launcher"] == "srun"


def test_a_job_that_hits_its_time_limit_goes_back_into_the_queue(slurm, uninterrupted):
    number, run_dir, log = submit(slurm, "one_node.sbatch", "limited", "--time=20", "--signal=B:SIGUSR1@30")
    wait((run_dir / "work/000/last.ckpt").exists, log)
    used = int(slurm("squeue", "--noheader", "--job", number, "--format=%M").split(":")[0]) + 1
    slurm("scontrol", "update", f"JobId={number}", f"TimeLimit={used + 1}")  # the clock of SLURM counts in minutes
    wait(lambda: "back into the queue" in log.read_text(), log)
    slurm("scontrol", "update", f"JobId={number}", "TimeLimit=20")  # of the start to come
    assert wait(lambda: ended(slurm, number), log) == "COMPLETED", log.read_text()[-5000:]
    assert len(check_run(run_dir, uninterrupted, log)) == 2
    assert f"job {number} goes back into the queue" in log.read_text()
    assert "DUE TO TIME LIMIT" not in log.read_text()


def test_torchrun_under_slurm_stops_and_goes_on_as_well(slurm, uninterrupted):
    number, run_dir, log = submit(slurm, "torchrun.sbatch", "elastic", "--time=20")
    wait((run_dir / "work/000/last.ckpt").exists, log)
    slurm("scancel", "--batch", "--signal=USR1", number)  # what SLURM does before the time limit
    assert wait(lambda: ended(slurm, number), log) == "COMPLETED", log.read_text()[-5000:]
    starts = check_run(run_dir, uninterrupted, log)
    assert [start["launcher"] for start in starts] == ["torchrun"] * 2
