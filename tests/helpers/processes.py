"""Processes that tests start: a bound on how long they run, and no survivors."""

import os
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

# Seconds that anything may take on a machine that is busy with other work. Nothing that works takes as long.
BUSY = 600
# Environment variable that the processes of this test process inherit; its value is the test process.
OWNER = "BDISTIL_TEST_OWNER"


def descendants(pid):
    """Children of a process, their children and so on."""
    children = []
    with suppress(OSError):  # a thread or the process has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    for child in children:
        yield child
        yield from descendants(child)


def end(process):
    """Ends a process of `subprocess` and what it has started; the ranks of torchrun have sessions of their own."""
    if process.poll() is None:
        for pid in [*descendants(process.pid), process.pid]:
            kill(pid)
    process.wait()


def kill(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def started(command, **options):
    """A process that is ended with the block, however the block ends."""
    with subprocess.Popen([str(word) for word in command], **options) as process:
        try:
            yield process
        finally:
            end(process)


def orphans():
    """Processes that come from this test process and whose parent is gone."""
    mark, mine = f"{OWNER}={os.getpid()}".encode(), {os.getpid(), *descendants(os.getpid())}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) not in mine:
            try:
                found = mark in (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended, or is somebody else's
                continue
            if found:
                yield int(folder.name)
