"""The run directory: rounds whole or not at all, configurations that must not mix, and disks that refuse."""

import contextlib
import errno
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import yaml

from bdistil.boosting.ledger.ledger import ErrorLedger
from bdistil.cli.guard import guarded
from bdistil.errors import RunError, UserError
from bdistil.storage import files as disk
from bdistil.storage.provenance import flatten
from bdistil.storage.run_directory import CURVE_COLUMNS, RunConfig, RunDirectory

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor([1, 2]), "scalar": torch.tensor(3.0)}


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "deep" / "run")
    run.prepare()
    return run


def everything_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- rounds


def test_a_round_comes_back(run):
    assert run.committed() == 0
    run.commit(0, WEIGHTS, {"round": 0, "why": "ö, 1"})
    assert run.committed() == 1
    found = run.weights(0)
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in WEIGHTS.items())
    record = run.record(0)
    file = run.folder(0) / "student.safetensors"
    assert (record["round"], record["why"]) == (0, "ö, 1")
    assert (record["weights"]["file"], record["weights"]["bytes"]) == (file.name, file.stat().st_size)
    assert set(everything_in(run.root)) == {"rounds/000/round.json", "rounds/000/student.safetensors"}


def test_tensors_need_not_lie_in_one_piece(run):
    run.commit(0, {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, requires_grad=True)}, {})
    assert run.weights(0)["a"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


class Killed(BaseException):
    """The process ends here."""


def killed(*_, **__):
    raise Killed


def killed_half_way(tensors, path):
    path.write_bytes(b"half of it")
    raise Killed


STEPS = {
    "before the weights": ("run_directory.save_file", killed),
    "in the weights": ("run_directory.save_file", killed_half_way),
    "before the record": ("run_directory.digest", killed),
    "before the name": ("files.os.replace", killed),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_commit_that_is_cut_off_leaves_the_rounds_before(run, step):
    run.commit(0, WEIGHTS, {"round": 0})
    before = everything_in(run.folder(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"bdistil.storage.{STEPS[step][0]}", STEPS[step][1])
        with pytest.raises(Killed):
            run.commit(1, WEIGHTS, {"round": 1})
    assert run.committed() == 1
    assert not run.folder(1).exists()
    assert everything_in(run.folder(0)) == before
    leftover = run.root / "rounds" / ".001.tmp"
    assert not leftover.exists()
    leftover.mkdir()
    (leftover / "more").write_text("of another try")
    run.commit(1, {"a": torch.ones(2)}, {"round": 1})
    assert run.committed() == 2
    assert run.weights(1)["a"].tolist() == [1.0, 1.0]
    assert sorted(p.name for p in run.folder(1).iterdir()) == ["round.json", "student.safetensors"]
    assert not leftover.exists()


@pytest.mark.parametrize(("format", "found"), [(None, "none"), (1, "1"), (3, "3"), ("2", "2")])
def test_a_round_of_another_format_is_refused(run, format, found):
    run.commit(0, WEIGHTS, {})
    path = run.folder(0) / "round.json"
    record = json.loads(path.read_text())
    assert record.pop("format") == 2
    path.write_text(json.dumps(record if format is None else {"format": format, **record}))
    message = (
        rf"{path} has format {found}, but this version of bdistil reads format 2: "
        "train the run again in a new `run_dir`, or load it with the version that wrote it"
    )
    for read in (run.record, run.weights):
        with pytest.raises(RunError, match=message):
            read(0)


@pytest.mark.parametrize("text", ["", "[]x", "[1]", "null", "3", "{}"])
def test_a_record_that_is_none_is_named(run, text):
    run.commit(0, WEIGHTS, {})
    (run.folder(0) / "round.json").write_text(text)
    message = r"round.json (of a committed round is missing or torn|has format none)"
    with pytest.raises(RunError, match=message) as error:
        run.record(0)
    assert "\n" not in str(error.value)


def test_a_round_is_never_written_over(run):
    run.commit(0, WEIGHTS, {"first": True})
    with pytest.raises(RunError, match="commit of round 1"):
        run.commit(0, {"a": torch.ones(1)}, {"first": False})
    assert run.record(0)["first"]
    assert run.weights(0).keys() == WEIGHTS.keys()


def test_everything_is_on_the_disk_before_it_has_a_name(run, monkeypatch):
    events = []
    sync, replace = disk.sync, os.replace
    monkeypatch.setattr(disk, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(disk.os, "replace", lambda old, new: (events.append(f"-> {new.name}"), replace(old, new)))
    run.commit(0, WEIGHTS, {})
    assert sorted(events[:2]) == ["round.json", "student.safetensors"]
    assert events[2:] == [".000.tmp", "-> 000", "rounds"]


@pytest.mark.parametrize(("there", "gap"), [([1], "000"), ([0, 2], "001"), ([0, 1, 4, 5], "002")], ids=str)
def test_a_gap_is_named(run, there, gap):
    for number in there:
        run.commit(number, WEIGHTS, {})
    with pytest.raises(RunError, match=rf"rounds/{gap} is missing, but later rounds are there"):
        run.committed()


def test_other_things_among_the_rounds_do_not_count(run):
    run.commit(0, WEIGHTS, {})
    (run.root / "rounds" / "001").write_text("a file")
    for name in (".001.tmp", "notes", "1"):
        (run.root / "rounds" / name).mkdir()
    assert run.committed() == 1


def test_a_folder_that_is_not_there_holds_no_round(tmp_path):
    assert RunDirectory(tmp_path / "nothing").committed() == 0


def test_a_commit_ends_the_work_on_the_round(run):
    for number in (0, 1):
        run.work(number).mkdir(parents=True)
        run.checkpoint(number).write_text("…")
    run.commit(0, WEIGHTS, {})
    assert not run.work(0).exists()
    assert run.checkpoint(1).exists()


# ---- tries and the end


def test_tries_of_a_round(run):
    assert run.tries(0) == []
    assert run.verdicts(0) == (0, 0)
    run.work(0).mkdir(parents=True)
    run.checkpoint(0).write_text("…")
    run.reject(0, "F1: too weak")
    assert not run.checkpoint(0).exists()
    run.reject(0, "F2: still")
    assert RunDirectory(run.root).tries(0) == ["F1: too weak", "F2: still"]
    assert run.tries(1) == []
    assert run.verdicts(0) == (0, 2)
    run.commit(0, WEIGHTS, {})
    assert run.verdicts(0) == (1, 0)


def test_a_stop_keeps_its_reason(run):
    assert run.stopped is None
    run.commit(0, WEIGHTS, {})
    run.reject(1, "F1: too weak")
    run.stop(1, "no class was accepted")
    assert RunDirectory(run.root).stopped == "no class was accepted"
    assert json.loads((run.root / "stopped.json").read_text())["tries"] == ["F1: too weak"]
    run.commit(1, WEIGHTS, {})
    assert run.stopped is None  # it was the stop of another round


# ---- the configuration

CONFIG = {
    "model": {"boosting": {"rounds": 3, "ladder": [{"links": 0}, {"links": 1}]}, "student": {}, "name": "ö"},
    "trainer": {"devices": 1, "max_epochs": 2},
    "run_dir": "here",
    "seed": None,
    "channels": (4, 8),
}


def changed(**values):
    """The configuration with dotted keys (written with __) replaced, added or taken away."""
    config = json.loads(json.dumps(CONFIG))
    for name, value in values.items():
        *path, last = name.split("__")
        place = config
        for key in path:
            place = place[key]
        if value == "absent":
            del place[last]
        else:
            place[last] = value
    return config


def test_the_same_configuration_goes_on(run):
    run.freeze(RunConfig(CONFIG))
    before = run.config.read_bytes()
    run.freeze(RunConfig(CONFIG))
    RunDirectory(run.root).freeze(RunConfig(changed()))  # with a list where there was a tuple
    assert run.config.read_bytes() == before
    assert run.read_config() == yaml.safe_load(before) == changed()


def test_what_differs_is_listed(run):
    run.freeze(RunConfig(CONFIG))
    before = run.config.read_bytes()
    other = changed(
        model__boosting__rounds=4, trainer__max_epochs="absent", trainer__precision="16", model__name="ä",
        model__boosting__ladder=[{"links": 0}],
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        run.freeze(RunConfig(other))
    head, *lines, tail = str(caught.value).splitlines()
    assert f"`run_dir` {run.root} holds a run of another configuration" in head
    assert lines == [
        "  model.boosting.ladder: [{'links': 0}, {'links': 1}] there, [{'links': 0}] now",
        "  model.boosting.rounds: 3 there, 4 now",
        "  model.name: 'ö' there, 'ä' now",
        "  trainer.max_epochs: 2 there, '(absent)' now",
        "  trainer.precision: '(absent)' there, '16' now",
    ]
    assert "Choose another `run_dir`" in tail
    assert run.config.read_bytes() == before


@pytest.mark.parametrize("ignore", [["trainer.devices", "run_dir"], ("run_dir", "trainer")])
def test_keys_that_may_differ(run, ignore):
    run.freeze(RunConfig(CONFIG, ignore))
    run.freeze(RunConfig(changed(trainer__devices=8, run_dir="there"), ignore))
    with pytest.raises(UserError, match=r"\n  seed: None there, 5 now\n") as caught:
        run.freeze(RunConfig(changed(seed=5, trainer__devices=8), ignore))
    assert "devices" not in str(caught.value)
    with pytest.raises(UserError, match=r"run_dir: 'here' there, 'there' now"):
        run.freeze(RunConfig(changed(run_dir="there")))


def test_own_keys_that_begin_like_those_that_may_differ_are_compared(run):
    own = {**CONFIG, "config_version": 1, "tracking_loss": "mse", "trainer_lr": 0.1, "tracking": {"group": "a"}}
    free = ["config", "tracking", "trainer"]
    run.freeze(RunConfig(own, free))
    run.freeze(RunConfig({**own, "tracking": {"group": "b"}, "config": "c.yaml"}, free))
    for key in ("config_version", "tracking_loss", "trainer_lr"):
        with pytest.raises(UserError, match=rf"{key}: .* there, 'other' now"):
            run.freeze(RunConfig({**own, key: "other"}, free))


def test_rounds_without_a_configuration(run):
    run.freeze(RunConfig(CONFIG))
    run.commit(0, WEIGHTS, {})
    run.config.unlink()
    with pytest.raises(UserError, match=r"run holds rounds but no config\.yaml: put the file back"):
        run.freeze(RunConfig(CONFIG))
    assert not run.config.exists()


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


# ---- the curve


def test_the_curve_comes_back(run):
    reason = 'fell, by "more" than\n0.002: ö'
    run.write_curve([
        {"stage": "teacher", "macs": 2_700_000_000, "val_accuracy": 0.123456789, "reason": None},
        {"stage": 1, "macs": 22_000, "latency_ms": 1e-7, "reason": reason, "train_macs": 0},
    ])  # fmt: skip
    teacher, first = run.read_curve()
    assert list(teacher) == list(CURVE_COLUMNS)
    assert (teacher["stage"], teacher["macs"], teacher["val_accuracy"]) == ("teacher", "2700000000", "0.123457")
    assert teacher["reason"] == teacher["test_accuracy"] == first["val_accuracy"] == ""
    assert (first["stage"], first["latency_ms"], first["reason"], first["train_macs"]) == ("1", "1e-07", reason, "0")


def test_rows_are_what_is_committed(run):
    assert run.rows() == []
    run.write("teacher", {"stage": "teacher", "macs": 9})
    for number in (0, 1):
        run.commit(number, WEIGHTS, {"curve": {"stage": number + 1, "macs": 3 * (number + 1)}})
    stages = [{"stage": "teacher", "macs": 9}, {"stage": 1, "macs": 3}, {"stage": 2, "macs": 6}]
    assert run.rows() == stages
    assert run.read("test") is None
    run.write("test", [0.9, 0.5, 0.7])
    again = RunDirectory(run.root)
    assert again.read("test") == [0.9, 0.5, 0.7]
    assert again.rows() == [
        row | {"test_accuracy": a} for row, a in zip(stages, [0.9, 0.5, 0.7], strict=True)
    ]  # fmt: skip
    run.commit(2, WEIGHTS, {"curve": {"stage": 3, "macs": 9}})
    assert run.read("test") is None  # they were of other students
    assert run.rows() == [*stages, {"stage": 3, "macs": 9}]


# ---- disks that refuse


def mount(*options):
    return subprocess.run(["mount", *options], capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB."""
    if not sys.platform.startswith("linux") or not shutil.which("mount"):
        pytest.skip("needs the mount of Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    if refused := mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)).stderr:
        pytest.skip(f"a small disk cannot be mounted here: {refused.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk):
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_costs_the_round_and_no_other(small_disk):
    run = RunDirectory(small_disk / "run")
    run.prepare()
    run.commit(0, WEIGHTS, {"round": 0})
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100 << 10))
    student = {"weight": torch.ones(50 << 10)}  # 200 kB
    with pytest.raises(RunError, match=r"commit of round 2 in .*run: the disk is full\. Every round .* is intact"):
        run.commit(1, student, {"round": 1})
    assert run.committed() == 1
    assert torch.equal(run.weights(0)["a"], WEIGHTS["a"])
    ballast.unlink()
    run.commit(1, student, {"round": 1})
    assert torch.equal(run.weights(1)["weight"], student["weight"])


def test_a_full_disk_leaves_small_files_as_they_were(small_disk):
    run = RunDirectory(small_disk / "run")
    run.prepare()
    run.write_curve([{"stage": "teacher"}])
    run.write("teacher", {"stage": "teacher"})
    fill(small_disk)
    for write in (
        lambda: run.write_curve([{"stage": "teacher"}, {"stage": 1}]),
        lambda: run.write("teacher", {"stage": "another"}),
        lambda: run.reject(0, "F1: too weak"),
        lambda: run.stop(0, "…"),
        lambda: run.write("test", [0.5]),
    ):
        with pytest.raises(RunError, match=r"in .*run: the disk is full\. Every round committed before is intact"):
            write()
    assert [row["stage"] for row in run.read_curve()] == ["teacher"]
    assert run.read("teacher") == {"stage": "teacher"}
    assert (run.tries(0), run.stopped, run.read("test")) == ([], None, None)


def exit_status_of(function):
    """Of a process that calls a function: what it returns, or minus the signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, none of which is ours
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        status = 1
        try:
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_ledger_on_a_full_disk_is_an_error(small_disk):
    fill(small_disk)
    os.truncate(small_disk / "ballast", 200 << 10)

    def write_a_ledger():
        try:
            ErrorLedger(small_disk / "ledger").create(50_000, [(0, torch.randn(50_000, 4))], outputs=4)
        except OSError as error:
            return error.errno
        except RunError as error:
            return errno.ENOSPC if "the disk is full" in str(error) else 1
        return 0

    # In a process of its own: a write through a memory map kills it (SIGBUS) where the disk has no room.
    assert exit_status_of(write_a_ledger) == errno.ENOSPC


def test_a_run_does_not_start_on_a_full_disk(small_disk):
    fill(small_disk)
    with pytest.raises(UserError, match=r"`run_dir` .*run cannot be written to: No space left on device"):
        RunDirectory(small_disk / "run").prepare()


def test_a_full_disk_is_one_message_of_any_command(small_disk, capsys):
    fill(small_disk)
    assert guarded(lambda: (small_disk / "report.html").write_text("x" * 9000)) == 1
    assert "The disk is full: [Errno 28]" in capsys.readouterr().err


def test_a_quota_is_a_full_disk(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(disk, "sync", refuse)
    with pytest.raises(RunError, match="the disk is full"):
        run.commit(0, WEIGHTS, {})


def test_a_disk_that_can_only_be_read(small_disk):
    run = RunDirectory(small_disk / "run")
    run.prepare()
    run.commit(0, WEIGHTS, {})
    if refused := mount("-o", "remount,ro", str(small_disk)).stderr:
        pytest.skip(f"a disk cannot be made read-only here: {refused.strip()}")
    for place in (run.root, small_disk / "another"):
        message = rf"`run_dir` {place} cannot be written to: Read-only file system\. Give a folder"
        with pytest.raises(UserError, match=message):
            RunDirectory(place).prepare()
    with pytest.raises(RunError, match=r"commit of round 2 in .*Read-only file system.*is intact"):
        run.commit(1, WEIGHTS, {})
    assert run.weights(0).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("below", [False, True])
def test_a_file_where_the_run_should_be(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / "run" if below else tmp_path / "file"
    with pytest.raises(UserError, match=rf"`run_dir` {place} cannot be written to: (Not a directory|File exists)"):
        RunDirectory(place).prepare()
    assert (tmp_path / "file").read_text() == "mine"


def test_preparing_leaves_what_is_there(run):
    run.commit(0, WEIGHTS, {})
    before = everything_in(run.root)
    run.prepare()
    assert everything_in(run.root) == before
