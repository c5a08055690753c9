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
from helpers.toys import TIMES, curve, digests
from helpers.wandb_offline import offline_runs

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
    started = subprocess.run([ONE_NODE, "start", folder / "daemons"], capture_output=True, text=True, timeout=600)
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


class Job:
    """A shipped sbatch file, submitted."""

    def __init__(self, slurm, file, name, *options):
        self.slurm = slurm
        told = slurm("sbatch", f"--job-name={name}", *options, RECIPES / "slurm" / file, *DIGITS)
        self.number = re.search(r"\d+", told)[0]
        self.run_dir = slurm.folder / f"runs/{name}-{self.number}"
        self.log = slurm.folder / f"{name}-{self.number}.out"

    @property
    def state(self):
        return re.search(r"JobState=(\w+)", self.slurm("scontrol", "show", "job", self.number))[1]

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, until, seconds=900):
        end = time.monotonic() + seconds
        while not until():
            assert self.state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), self.said()[-5000:]
            assert time.monotonic() < end, self.said()[-5000:]
            time.sleep(0.2)

    def complete(self):
        self.wait(lambda: self.state == "COMPLETED")


def fit_rows(runs):
    """What the fits have logged in all starts of a run, by step. Steps that are logged again have the same values."""
    found = {}
    for row in (row for run in runs for row in run.history if "epoch" in row):
        known = found.setdefault(row["trainer/global_step"], {})
        for key, value in row.items():
            if not key.startswith("_"):  # W&B's own
                assert known.setdefault(key, value) == value
    return found


def check_run(job, uninterrupted, ledger=None):
    """Complete, equal to the uninterrupted run to the last bit, and one run of W&B. Gives its starts."""
    run_dir, ledger = job.run_dir, ledger or job.run_dir / "ledger"
    assert digests(run_dir) == digests(uninterrupted)
    assert len(digests(run_dir)) == 2
    assert curve(run_dir, without=TIMES) == curve(uninterrupted, without=TIMES)
    files = list((uninterrupted / "ledger").rglob("*.f32"))
    assert files
    for file in files:
        assert file.read_bytes() == (ledger / file.relative_to(uninterrupted / "ledger")).read_bytes()
    assert not list(run_dir.rglob("hpc_ckpt*"))
    assert (run_dir / "report.html").exists()
    starts = json.loads((run_dir / "environment.json").read_text())
    assert [int(start["variables"].get("SLURM_RESTART_COUNT", 0)) for start in starts] == list(range(len(starts)))
    assert {(start["processes"], start["variables"]["SLURM_JOB_ID"]) for start in starts} == {
        (2, run_dir.name.split("-")[-1])
    }
    assert job.said().count("was interrupted with") == len(starts) - 1
    tracked = offline_runs(run_dir)
    assert len(tracked) == len(starts)
    assert {run.run["run_id"] for run in tracked if run.run} == {(run_dir / "wandb_id.txt").read_text()}
    check_rows(tracked, fit_rows(offline_runs(uninterrupted)))
    return starts


def check_rows(runs, whole):
    """All rows are there, except the last ones of a start whose W&B process got the signal, too.

    This SLURM signals all processes of a step, unlike one with proctrack/cgroup.
    """
    found = fit_rows(runs)
    assert found
    assert all(whole[step] == row for step, row in found.items())
    if lost := whole.keys() - found.keys():
        stopped, second = runs
        assert stopped.exit_code is None
        assert max(fit_rows([stopped]), default=-1) < min(lost)
        assert max(lost) < min(fit_rows([second]))


def test_a_job_that_is_requeued_in_the_middle_goes_on(slurm, uninterrupted):
    job = Job(slurm, "one_node.sbatch", "requeued", "--time=20")
    job.wait((job.run_dir / "work/001/last.ckpt").exists)
    slurm("scontrol", "requeue", job.number)
    job.complete()
    starts = check_run(job, uninterrupted)
    assert len(starts) == 2
    assert starts[0]["launcher"] == "srun"


def test_a_job_that_hits_its_time_limit_goes_back_into_the_queue(slurm, uninterrupted):
    job = Job(slurm, "one_node.sbatch", "limited", "--time=20", "--signal=B:SIGUSR1@90")
    job.wait((job.run_dir / "work/000/last.ckpt").exists)
    used = int(slurm("squeue", "--noheader", "--job", job.number, "--format=%M").split(":")[0]) + 1
    # In minutes: the signal comes after 30 s at most.
    slurm("scontrol", "update", f"JobId={job.number}", f"TimeLimit={used + 1}")
    job.wait(lambda: "back into the queue" in job.said())
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")  # of the start to come
    job.complete()
    assert len(check_run(job, uninterrupted)) == 2
    assert f"job {job.number} goes back into the queue" in job.said()
    assert "DUE TO TIME LIMIT" not in job.said()


def test_torchrun_under_slurm_stops_and_goes_on_as_well(slurm, uninterrupted):
    job = Job(slurm, "torchrun.sbatch", "elastic", "--time=20")
    job.wait((job.run_dir / "work/000/last.ckpt").exists)
    slurm("scancel", "--batch", "--signal=USR1", job.number)  # what SLURM does before the time limit
    job.complete()
    starts = check_run(job, uninterrupted)
    assert [start["launcher"] for start in starts] == ["torchrun"] * 2


def test_the_job_of_several_nodes_keeps_its_ledger_on_their_disks(slurm, uninterrupted):
    """On the one node that there is; two hosts are in test_hosts.py."""
    disk = slurm.folder / "disk"
    job = Job(slurm, "several_nodes.sbatch", "disk", "--time=20", "--nodes=1", f"--export=ALL,SCRATCH={disk}")
    job.complete()
    (ledger,) = disk.glob("bdistil-disk-*/ledger")
    assert not (job.run_dir / "ledger").exists()
    assert len(check_run(job, uninterrupted, ledger)) == 1
