"""Committed rounds and ledgers that are no longer whole: what is torn is named, and nothing is deleted."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.toys import (
    CLASSES,
    TRAIN,
    Hook,
    Killed,
    Toys,
    boost,
    control,
    digests,
    everything,
    fit,
    make_student,
    settings_for,
)

from bdistil import RunError
from bdistil.boosting import commit
from bdistil.callbacks import round_controller


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two")
    boost(run_dir, settings=settings_for(2))
    return run_dir


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("rounds/000/student.safetensors", cut, r"is torn: \d+ bytes, \d+ were written"),
        ("rounds/000/student.safetensors", flip, "has changed since it was written"),
        ("rounds/001/student.safetensors", Path.unlink, "is missing"),
        ("rounds/000/round.json", Path.unlink, r"is missing or torn \(.*No such file"),
        ("rounds/001/round.json", cut, "is missing or torn"),
        ("rounds/000", shutil.rmtree, "is missing, but later rounds are there"),
        ("ledger/train/teacher.f32", cut, r"is missing or torn: \d+ bytes, 3072 expected"),
        ("ledger/val/teacher.f32", Path.unlink, "is missing or torn: 0 bytes, 1024 expected"),
        ("ledger/train/ledger.json", cut, "is missing or torn"),
    ],
)
def test_a_torn_file_is_named_and_nothing_is_deleted(two_rounds, tmp_path, file, damage, message):
    run_dir = tmp_path / "run"
    shutil.copytree(two_rounds, run_dir)
    damage(run_dir / file)
    before = everything(run_dir)
    with pytest.raises(RunError, match=rf"{run_dir / file}.* {message}"):
        boost(run_dir, settings=settings_for(2))
    assert everything(run_dir) == before


@pytest.mark.parametrize("torn", ["rounds/001", "rounds/001 of a finished run", "ledger/train", "ledger"])
def test_the_way_out_that_a_message_names(two_rounds, tmp_path, torn):
    run_dir, (torn, *finished) = tmp_path / "run", torn.split(" of ")
    shutil.copytree(two_rounds, run_dir)
    wanted = digests(run_dir)
    if not finished:
        (run_dir / "test.json").unlink()
    shutil.rmtree(run_dir / torn)
    read = []
    data = Toys()
    data.test_dataloader = lambda: read.append(1) or Toys().test_dataloader()
    boost(run_dir, data, settings=settings_for(2))
    assert digests(run_dir) == wanted
    assert len(read) == (1 if torn.startswith("rounds") else 0 if finished else 1), "the test part of new students"


def test_a_round_of_a_stopped_run_can_be_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "decide", lambda settings, number, *_: (number < 2, "as the test says"))

    def stop_at_round_2():
        return fit(control(tmp_path))

    stop_at_round_2()
    wanted = digests(tmp_path)
    assert list(wanted) == ["000", "001"]
    assert (tmp_path / "stopped.json").exists()
    shutil.rmtree(tmp_path / "rounds/001")
    assert len(stop_at_round_2().ensemble) == 2
    assert digests(tmp_path) == wanted


def called_safe_to_delete():
    """Names in the table of docs/cluster.md whose last column says yes."""
    table = (Path(__file__).parents[2] / "docs/cluster.md").read_text().split("safe to delete? |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.count("|") == 4]
    return [name for names, _, safe in rows if safe.strip().startswith("yes") for name in re.findall("`(.+?)`", names)]


@pytest.fixture(scope="module")
def blank_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_controller, "write_report", lambda run: run.report.write_text("without pictures"))
        yield


@pytest.fixture(scope="module")
def safe_runs(tmp_path_factory, blank_reports):
    """Runs with scratch disks of their own and with none: one that was cut in the second round, and the whole one."""

    def leave(trainer, module):
        if module.number == 1 and trainer.current_epoch == 1:
            raise Killed

    made = {}
    for scratch in (False, True):
        root = tmp_path_factory.mktemp("scratch" if scratch else "none")
        with pytest.MonkeyPatch.context() as patch:
            if scratch:
                patch.setenv("BDISTIL_SCRATCH", str(root / "disk"))
            with pytest.raises(Killed):
                boost(root / "run", settings=settings_for(2), callbacks=lambda: [Hook(on_train_epoch_start=leave)])
            shutil.copytree(root, cut_root := root.with_name(f"{root.name}-cut"))
            boost(root / "run", settings=settings_for(2))
        made[scratch] = {"whole": root, "cut": cut_root}
    return made


@pytest.mark.parametrize("state", ["cut", "whole"])
@pytest.mark.parametrize("name", called_safe_to_delete())
def test_what_is_called_safe_to_delete_is(safe_runs, tmp_path, monkeypatch, name, state):
    roots = safe_runs[name == "identity.txt"]
    shutil.copytree(roots[state], root := tmp_path / "root")
    if name == "identity.txt":
        monkeypatch.setenv("BDISTIL_SCRATCH", str(root / "disk"))
    found = sorted((root / "run").glob(name))
    absent = {("work/", "whole"), ("report.html", "cut"), ("wandb_place.txt", state)}  # W&B has tests of its own
    assert found or (name, state) in absent, "the table names what is there"
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    boost(root / "run", settings=settings_for(2))
    assert digests(root / "run") == digests(roots["whole"] / "run")
    assert (root / "run/curve.csv").exists()
    assert (root / "run/report.html").exists()


@pytest.mark.parametrize("part", ["train", "val"])
def test_errors_that_were_lost_are_made_again(two_rounds, tmp_path, part):
    run_dir = tmp_path / "run"
    boost(run_dir, settings=settings_for(2), callbacks=lambda: [], student=make_student)
    assert digests(run_dir) == digests(two_rounds)
    shutil.rmtree(run_dir / "rounds/001")
    for name in ("test.json", f"ledger/{part}/error.002.f32"):
        (run_dir / name).unlink()
    boost(run_dir, settings=settings_for(2))
    assert digests(run_dir) == digests(two_rounds)


def test_infinity_in_the_ledger(tmp_path):
    def leave(trainer, module):
        if module.number == 0:
            raise InterruptedError

    with pytest.raises(InterruptedError):  # after the commit
        boost(tmp_path, callbacks=lambda: [Hook(on_fit_end=leave)])
    file = tmp_path / "ledger/train/error.001.f32"
    rows = np.fromfile(file, np.float32).reshape(TRAIN, CLASSES)
    rows[50, 2] = np.inf
    rows.tofile(file)
    with pytest.raises(
        RunError, match=r"NaN or infinity in the ledger \(.*train/error\.001\.f32\), first at sample 50"
    ):
        boost(tmp_path)
