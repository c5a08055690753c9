"""A ledger on a disk of the node: what is there of another run, or of other rounds, is not taken for this one's."""

import hashlib
import json
import os
import shutil

import pytest
from helpers.toys import Hook, boost, digests, on_ranks, settings_for

from bdistil.storage.run_directory import RunDirectory


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setenv("BDISTIL_SCRATCH", str(tmp_path / "disk"))
    return tmp_path / "disk"


def files(disk):
    return {
        f"{f.parent.name}/{f.name}": (f.stat().st_ino, hashlib.sha256(f.read_bytes()).hexdigest())
        for f in disk.glob("bdistil-run-*/ledger/*/*.f*")
    }


def bits(found):
    return {name: digest for name, (_, digest) in found.items()}


def test_the_ledger_is_on_the_disk_and_is_that_of_a_run_without_one(finished, disk, tmp_path):
    boost(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(finished.run_dir)
    assert not (tmp_path / "run/ledger").exists()
    wanted = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest()
              for f in finished.run_dir.glob("ledger/*/*.f*")}  # fmt: skip
    assert bits(files(disk)) == wanted


def test_a_disk_that_is_up_to_date_is_read_and_an_empty_one_is_filled(disk, tmp_path):
    boost(tmp_path / "whole", settings=settings_for(3))
    whole = disk.rename(tmp_path / "whole disk")
    for removed in (False, True):
        run_dir = tmp_path / f"{removed}/run"
        boost(run_dir, settings=settings_for(2))
        (run_dir / "config.yaml").write_text((tmp_path / "whole/config.yaml").read_text())
        asked = next(disk.glob("*/ledger/train/teacher.f*"))
        before = asked.stat().st_ino
        if removed:
            shutil.rmtree(disk)
        boost(run_dir, settings=settings_for(3))
        assert digests(run_dir) == digests(tmp_path / "whole")
        assert (asked.stat().st_ino == before) is not removed
        shutil.rmtree(disk)
    assert whole.exists()


def test_a_run_started_anew_in_the_same_place_does_not_take_over_the_disk(disk, tmp_path):
    boost(tmp_path / "run", settings=settings_for(1), seed=1)
    shutil.rmtree(tmp_path / "run")
    boost(tmp_path / "run", settings=settings_for(2), seed=2)
    boost(tmp_path / "other", settings=settings_for(2), seed=2)
    assert digests(tmp_path / "run") == digests(tmp_path / "other")
    owner = json.loads(next(disk.glob("bdistil-run-*/ledger/owner.json")).read_text())
    assert owner["run"] == RunDirectory(tmp_path / "run").identity()


def test_what_a_disk_has_of_other_rounds_is_removed(disk, tmp_path):
    """A node that comes back has the errors of a second round that another start has trained anew."""
    boost(tmp_path / "run", settings=settings_for(2))
    (place,) = disk.glob("bdistil-run-*/ledger")
    owner = json.loads((place / "owner.json").read_text())
    stale = next(place.glob("train/error.002.*"))
    stale.write_bytes(bytes(stale.stat().st_size))  # whole, and wrong
    (place / "owner.json").write_text(json.dumps({**owner, "rounds": ["of another start", "the same"]}))
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 3"))
    boost(tmp_path / "run", settings=settings_for(3))
    boost(tmp_path / "whole", settings=settings_for(3))
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def on_own_disk(folder, dies):
    """A process with a scratch disk of its own, which ends in the first round."""
    os.environ["BDISTIL_SCRATCH"] = str(folder / f"disk{os.environ['RANK']}")

    def end(trainer, module):
        trainer.strategy.barrier()
        os._exit(1)

    hooks = [Hook(on_train_start=end)] if dies else []
    boost(
        folder / "run", settings=settings_for(2), callbacks=lambda: hooks, trainer={"num_nodes": 2, "strategy": "ddp"}
    )


@pytest.mark.distributed
def test_a_first_round_goes_on_where_one_of_two_disks_is_empty(tmp_path):
    on_ranks(tmp_path, on_own_disk, tmp_path, True, nodes=2)
    shutil.rmtree(tmp_path / "disk1")
    assert on_ranks(tmp_path, on_own_disk, tmp_path, False, nodes=2) == [0, 0], (tmp_path / "rank0.log").read_text()
    assert RunDirectory(tmp_path / "run").committed() == 2
