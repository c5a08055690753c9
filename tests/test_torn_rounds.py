"""Committed rounds and ledgers that are no longer whole: what is torn is named, and nothing is deleted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from toys import (
    CLASSES,
    TRAIN,
    Hook,
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

pytestmark = pytest.mark.usefixtures("no_pictures")


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


def test_a_round_of_a_stopped_run_can_be_trained_again(tmp_path):
    def stop_at_round_2():
        controller = control(tmp_path)
        controller.boosting.decide = lambda number, *_: (number < 2, "as the test says")
        return fit(controller)

    stop_at_round_2()
    wanted = digests(tmp_path)
    assert list(wanted) == ["000", "001"]
    assert (tmp_path / "stopped.json").exists()
    shutil.rmtree(tmp_path / "rounds/001")
    assert len(stop_at_round_2().ensemble) == 2
    assert digests(tmp_path) == wanted


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
