"""Two hosts with networks of their own: a scratch disk for each, and one that is cut off in the middle of a run."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from helpers.job import BOUND, ROUNDS, finish, finished, said, start
from helpers.toys import TIMES, curve, digests

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PORT, TIMEOUT = 29577, 60  # of the rendezvous; seconds after which a process is taken for dead


def ip(*words, check=True):
    return subprocess.run(["ip", *map(str, words)], check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts():
    """Two network namespaces with addresses of their own, joined by a cable, as (name, address)."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need `ip` (iproute2)")
    tag = os.getpid()
    names = [f"bd{tag}a", f"bd{tag}b"]
    found = []
    try:
        for name in names:
            if (made := ip("netns", "add", name, check=False)).returncode:
                pytest.skip(f"two hosts need network namespaces: {made.stderr.strip()}")
        made = ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1],
                  check=False)  # fmt: skip
        if made.returncode:
            pytest.skip(f"two hosts need veth: {made.stderr.strip()}")
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
            found.append((name, f"10.77.0.{number}"))
        yield found
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def launch(hosts, run_dir, **options):
    """One torchrun a host, with a process and a scratch disk each."""
    started = []
    for number, (name, address) in enumerate(hosts):
        scratch = run_dir.parent / f"disk{number}"
        scratch.mkdir(exist_ok=True)
        words = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", hosts[0][1], "--master-port", str(PORT),
                 "--local-addr", address]  # fmt: skip
        env = {"BDISTIL_SCRATCH": str(scratch), "GLOO_SOCKET_IFNAME": "cable"}
        started.append(
            start(run_dir, 2, nodes=2, words=words, env=env, prefix=["ip", "netns", "exec", name], **options)
        )
    return started


def ledgers(run_dir):
    """Digests of the files of each scratch disk by name."""
    found = []
    for disk in sorted(run_dir.parent.glob("disk*")):
        files = sorted(disk.glob("bdistil-run-*/ledger/*/*.f*"))
        found.append({f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    return found


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("one") / "run", 2)


def check_run(run_dir, one_host):
    """Equal to the run of one host with as many processes, and each disk has the whole ledger."""
    assert digests(run_dir) == digests(one_host)
    assert len(digests(run_dir)) == ROUNDS
    assert curve(run_dir, without=TIMES) == curve(one_host, without=TIMES)
    files = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest()
             for f in (one_host / "ledger").glob("*/*.f*")}  # fmt: skip
    assert ledgers(run_dir) == [files, files]
    assert not (run_dir / "ledger").exists()
    assert not list(run_dir.parent.glob("disk*/*/ledger/.processes*"))


def test_two_hosts_with_a_disk_each_give_the_run_of_one(hosts, one_host, tmp_path):
    for process in launch(hosts, tmp_path / "run"):
        status, log = finish(process)
        assert status == 0, log[-5000:]
    check_run(tmp_path / "run", one_host)
    (start,) = json.loads((tmp_path / "run/environment.json").read_text())
    assert start["processes"] == 2


@pytest.mark.parametrize("lost", ["cable", "host", "disk"])
def test_a_host_that_is_cut_off_ends_the_job_and_the_next_start_goes_on(hosts, one_host, tmp_path, lost):
    run_dir = tmp_path / "run"
    jobs = launch(hosts, run_dir, pause=0.05, timeout=TIMEOUT)
    while not (run_dir / "work/001/last.ckpt").exists():
        assert all(job.poll() is None for job in jobs), said(jobs[0])[-5000:] + said(jobs[1])[-5000:]
        time.sleep(0.1)
    try:
        if lost == "cable":
            ip("-n", hosts[1][0], "link", "set", "cable", "down")
        else:
            os.killpg(jobs[1].pid, signal.SIGKILL)
            for pid in ip("netns", "pids", hosts[1][0]).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        began = time.monotonic()
        for job in jobs:
            status, log = finish(job)
            assert status != 0, log[-5000:]
        assert time.monotonic() - began < BOUND
    finally:
        ip("-n", hosts[1][0], "link", "set", "cable", "up")
    assert list(digests(run_dir)) == ["000"]
    if lost == "disk":
        shutil.rmtree(tmp_path / "disk1")  # another host takes its place
    for job in launch(hosts, run_dir):
        status, log = finish(job)
        assert status == 0, log[-5000:]
    check_run(run_dir, one_host)
