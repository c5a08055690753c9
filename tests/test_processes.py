"""Processes that tests start end with them, also where a test fails."""

import os
import subprocess
import sys
import time

import pytest
from helpers.processes import BUSY, descendants, kill, orphans, started

SLEEP = "import time; time.sleep(600)"
# Starts a process in a session of its own, as torchrun does, and says its number.
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    end = time.monotonic() + BUSY
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_process_and_its_children_end_with_a_block_that_fails():
    with pytest.raises(ZeroDivisionError), started([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as process:  # noqa: PT012
        child = int(process.stdout.readline())
        assert set(descendants(process.pid)) == {child}
        raise ZeroDivisionError
    assert process.returncode == -9
    wait_until(lambda: not runs(child))


def test_a_process_whose_parent_was_killed_is_found():
    with started([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        assert child not in set(orphans())
        process.kill()
        process.wait()  # or its children would be ended with it
    assert os.getpid() not in set(orphans())
    wait_until(lambda: child in set(orphans()))
    kill(child)
    wait_until(lambda: not runs(child))
