"""Disks that are full or may not be written to: the rounds before are intact."""

import re
import subprocess
import sys

import pytest
from helpers.toys import (
    Hook,
    boost,
    control,
    digests,
    everything,
    fit,
    in_child,
    settings_for,
)

from bdistil import ProgressiveEnsemble, UserError

INTACT = "Every round committed before is intact."


def mount(folder, options):
    """Puts a small disk of memory at a folder; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount`")
    if done.returncode:
        pytest.skip(f"mounting a disk is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a disk with options, or mounts it again with others; gives its folder."""
    folder = tmp_path / "disk"
    mounted = []

    def use(options):
        if mounted:
            subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
        else:
            mount(folder, options)
            mounted.append(folder)
        return folder

    yield use
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(UserError, match=rf"`run_dir` {tmp_path / place} cannot be written to: .*Give a folder"):
            boost(tmp_path / place)
    if sys.platform == "linux":
        with pytest.raises(UserError, match="`run_dir` /proc/bdistil cannot be written to"):
            boost("/proc/bdistil")


def test_a_run_directory_that_is_read_only(disk):
    folder = disk("size=4m")
    boost(folder, settings=settings_for(1))
    disk("ro")
    before = everything(folder)
    with pytest.raises(UserError, match=rf"`run_dir` {folder} cannot be written to: Read-only file system"):
        boost(folder, settings=settings_for(1))
    assert everything(folder) == before
    assert len(ProgressiveEnsemble.load(folder)) == 1


def fill(folder):
    """Leaves no room on a disk."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def forbid(folder):
    """Lets nobody write to a disk any more, as a system does that has found an error on it."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def run_and_spoil(folder, spoil, point):
    """A run whose disk takes nothing from a point on: of round 0 for the teacher's logits, else of round 1."""
    controller = control(folder / "run")

    def spoilt(trainer, module):
        if module.number == (point != "teacher"):
            spoil(folder)

    if point == "commit":
        commit = controller.run.commit
        controller.run.commit = lambda number, *args: (number == 1 and spoil(folder), commit(number, *args))
    hooks = {"teacher": "on_fit_start", "save": "on_train_epoch_start", "score": "on_train_end"}
    fit(controller, callbacks=lambda: [Hook(**{hooks[point]: spoilt})] if point in hooks else [])


WAYS = {
    "full": (fill, rf"the disk is full. {INTACT} Free some space and"),
    "read-only": (forbid, rf"Read-only file system: .* {INTACT} Fix that"),
}


@pytest.mark.parametrize("point", ["teacher", "save", "score", "commit"])
@pytest.mark.parametrize(("spoil", "reason"), WAYS.values(), ids=WAYS)
def test_a_disk_that_takes_nothing_any_more(disk, tmp_path, spoil, reason, point):
    folder, log = disk("size=400k"), tmp_path / "log"
    # In a process of its own, as writing to a mapped file on a full disk kills.
    assert in_child(log, run_and_spoil, folder, spoil, point) == 1, log.read_text()
    said = log.read_text().splitlines()[-1]
    assert said.startswith("RunError: ")
    assert re.search(rf"{folder / 'run'}: .*{reason}", said), said
    if point != "teacher":
        assert list(digests(folder / "run")) == ["000"]
        assert len(ProgressiveEnsemble.load(folder / "run")) == 1

    disk("rw,size=8m")
    assert len(boost(folder / "run").ensemble) == 3
    boost(tmp_path / "whole")
    assert digests(folder / "run") == digests(tmp_path / "whole")
