"""A run that was killed and started again ends as an uninterrupted one."""

import json
import os
import signal

import lightning as L
import pytest
import torch
from helpers.toys import (
    BATCH,
    ROUNDS,
    TIMES,
    TRAIN,
    Hook,
    Killed,
    Toys,
    boost,
    control,
    curve,
    digests,
    fit,
    in_child,
    ledger,
    make_trainer,
    settings_for,
)
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import bdistil.reporting.report
import bdistil.storage.run_directory
from bdistil.storage.run_directory import RunDirectory


def script(run_dir, point=None):
    """A run of a process of its own that kills itself at a point."""
    controller = control(run_dir)

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def in_epoch(trainer, module):
        if point == "epoch" and (module.number, trainer.current_epoch, trainer.global_step % 6) == (1, 2, 3):
            die()

    if point == "commit":
        commit = controller.run.commit
        controller.run.commit = lambda number, *args: die() if number == 1 else commit(number, *args)
    fit(controller, callbacks=lambda: [Hook(on_train_batch_start=in_epoch)], epochs=3)


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = boost(tmp_path / "whole", trainer={"epochs": 3})
    wanted = digests(tmp_path / "whole")
    assert len(wanted) == ROUNDS
    for point in ("epoch", "commit"):
        run_dir, log = tmp_path / point, tmp_path / f"{point}.log"
        assert in_child(log, script, run_dir, point) == -signal.SIGKILL, log.read_text()
        assert list(digests(run_dir)) == ["000"]
        done = torch.load(run_dir / "work/001/last.ckpt", weights_only=True)["epoch"]
        assert done == {"epoch": 1, "commit": 2}[point]
        assert (run_dir / "ledger/train/error.002.f32").exists() is (point == "commit")
        assert in_child(log, script, run_dir) == 0, log.read_text()
        assert digests(run_dir) == wanted
        assert curve(run_dir, without=TIMES) == curve(tmp_path / "whole", without=TIMES)
        torch.testing.assert_close(ledger(run_dir), ledger(tmp_path / "whole"), atol=0, rtol=0)
    assert whole.run.record(1)["epochs"] == 3


class Weighted(Toys):
    """A sampler of the user, which is kept as it is."""

    def train_dataloader(self):
        sampler = WeightedRandomSampler(torch.linspace(0.5, 1.5, TRAIN), TRAIN)
        return DataLoader(TensorDataset(*self.parts["train"]), batch_size=BATCH, sampler=sampler)


class Generated(Toys):
    """A sampler with a generator of its own."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        sampler = WeightedRandomSampler(torch.linspace(0.5, 1.5, TRAIN), TRAIN, generator=generator)
        return DataLoader(TensorDataset(*self.parts["train"]), batch_size=BATCH, sampler=sampler)


def by_step(optimizer):
    """A schedule that needs the number of steps before the progress of a resumed fit is known."""
    return OneCycleLR(optimizer, 0.01, total_steps=1000)


@pytest.mark.parametrize(
    ("data", "settings", "schedule"),
    [
        (Toys, {}, {}),
        (Weighted, {}, {}),
        (Generated, {}, {}),
        (Generated, {}, {"lr_scheduler": by_step, "lr_interval": "step"}),
        (lambda: Toys(noisy=True), {"state": "recompute"}, {}),
        (lambda: Toys(noisy=True, workers=1), {"state": "recompute"}, {}),
        (lambda: Toys(workers=1), {}, {"lr_scheduler": by_step, "lr_interval": "step"}),
    ],
    ids=[
        "shuffled", "weighted", "own generator", "own generator, schedule by step", "noisy", "noisy in a worker",
        "schedule by step in a worker",
    ],
)  # fmt: skip
def test_a_round_goes_on_from_its_last_saved_epoch(tmp_path, data, settings, schedule):
    options = {"settings": settings_for(2, **settings), "trainer": {"epochs": 3}, **schedule}
    boost(tmp_path / "whole", data(), **options)

    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 2):
            raise Killed

    run_dir, epochs = tmp_path / "run", []
    with pytest.raises(Killed):
        boost(run_dir, data(), callbacks=lambda: [Hook(on_train_epoch_start=stop)], **options)
    note = Hook(on_train_epoch_start=lambda trainer, module: epochs.append((module.number, trainer.current_epoch)))
    boost(run_dir, data(), callbacks=lambda: [note], **options)
    assert epochs == [(1, 2)]
    assert digests(run_dir) == digests(tmp_path / "whole")


def test_a_fit_that_failed_may_be_repeated_in_the_loop(tmp_path):
    failed = []

    def fail(trainer, module):
        if not failed and (module.number, trainer.current_epoch, trainer.fit_loop.batch_idx) == (1, 1, 3):
            failed.append(True)
            raise Killed

    boost(tmp_path / "whole", Weighted())
    controller, data = control(tmp_path / "run"), Weighted()
    for module in controller.rounds(data):
        for _ in range(2):
            trainer = make_trainer(Hook(on_train_batch_end=fail), controller)
            try:
                trainer.fit(module, data, ckpt_path=controller.ckpt_path)
                break
            except Killed:
                continue
    assert failed
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert curve(tmp_path / "run", without=TIMES) == curve(tmp_path / "whole", without=TIMES)


def short_epochs(run_dir, last=None):
    """A run of ten epochs of a few milliseconds that kills itself in one of them; gives those that were trained."""
    epochs = []

    def note(trainer, module):
        epochs.append(trainer.current_epoch)
        if trainer.current_epoch == last:
            os.kill(os.getpid(), signal.SIGKILL)

    boost(
        run_dir,
        callbacks=lambda: [Hook(on_train_batch_start=note)],
        settings=settings_for(1),
        trainer={"epochs": 10, "limit_train_batches": 1},
    )
    return epochs


@pytest.mark.parametrize("last", [1, 4, 9])
def test_each_epoch_is_saved_however_short(tmp_path, last):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert in_child(log, short_epochs, run_dir, last) == -signal.SIGKILL, log.read_text()
    assert short_epochs(run_dir) == list(range(last, 10))
    short_epochs(tmp_path / "whole")
    assert digests(run_dir) == digests(tmp_path / "whole")


@pytest.mark.parametrize("early", [False, True], ids=["all epochs", "stopped early"])
def test_a_round_that_had_ended_is_committed_without_training(tmp_path, early):
    def stop_early(trainer, module):
        trainer.should_stop = early

    def fail(trainer, module):
        if module.number == 1:
            raise Killed

    boost(tmp_path / "whole", callbacks=lambda: [Hook(on_train_epoch_end=stop_early)])
    with pytest.raises(Killed):
        boost(tmp_path / "torn", callbacks=lambda: [Hook(on_train_epoch_end=stop_early, on_train_end=fail)])
    assert list(digests(tmp_path / "torn")) == ["000"]
    steps = []
    note = {"on_train_batch_start": lambda trainer, module: steps.append(module.number)}
    boost(tmp_path / "torn", callbacks=lambda: [Hook(on_train_epoch_end=stop_early, **note)])
    assert set(steps) == {2}
    assert digests(tmp_path / "torn") == digests(tmp_path / "whole")
    assert curve(tmp_path / "torn", without=TIMES) == curve(tmp_path / "whole", without=TIMES)
    assert RunDirectory(tmp_path / "torn").record(1)["epochs"] == (1 if early else 2)


@pytest.fixture
def killed_once(monkeypatch):
    """Makes a function raise before or after its work, at one of its calls."""

    def arm(owner, name, *, when=lambda *_: True, after=False):
        original, armed = getattr(owner, name), [True]

        def once(*args, **kwargs):
            if armed and when(*args):
                armed.clear()
                if after:
                    original(*args, **kwargs)
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, once)

    return arm


@pytest.mark.parametrize(
    ("point", "after"),
    [("commit", True), ("write_curve", False), ("write teacher", False), ("write test", False), ("write test", True)],
)
def test_a_kill_between_two_files_costs_nothing(finished, tmp_path, killed_once, point, after):
    # At the commit of the last round, as no later one mends what it leaves.
    last = {"commit": lambda run, number, *_: number == ROUNDS - 1, "write_curve": lambda run, rows: len(rows) > ROUNDS}
    name, *files = point.split()
    killed_once(RunDirectory, name, when=last.get(point, lambda run, file, *_: file in files), after=after)
    with pytest.raises(Killed):
        boost(tmp_path)
    boost(tmp_path)
    assert digests(tmp_path) == digests(finished.run_dir)
    assert curve(tmp_path, without=TIMES) == curve(finished.run_dir, without=TIMES)


class Untested(L.LightningDataModule):
    """Has no test part."""

    train_dataloader, val_dataloader = Toys.train_dataloader, Toys.val_dataloader

    def __init__(self):
        super().__init__()
        vars(self).update({name: vars(Toys())[name] for name in ("parts", "noisy", "workers")})


def test_a_kill_before_the_last_row_of_the_curve_costs_nothing_without_a_test_part(tmp_path, killed_once):
    killed_once(RunDirectory, "write_curve", when=lambda run, rows: len(rows) > ROUNDS)
    with pytest.raises(Killed):
        boost(tmp_path, Untested())
    boost(tmp_path, Untested())
    assert [row["stage"] for row in curve(tmp_path)] == ["teacher", "1", "2", "3"]


@pytest.mark.parametrize(
    ("owner", "name", "when", "after"),
    [
        (bdistil.storage.run_directory, "write_atomically", lambda path, text: path.name == "rejected.json", True),
        (RunDirectory, "reject", lambda *_: True, True),
        (RunDirectory, "stop", lambda *_: True, False),
    ],
    ids=["in a rejection", "after a rejection", "before the stop"],
)
def test_a_kill_around_a_rejection_costs_nothing(tmp_path, killed_once, owner, name, when, after):
    options = {"settings": settings_for(2, accept="progress", min_progress=0.9)}
    killed_once(owner, name, when=when, after=after)
    with pytest.raises(Killed):
        boost(tmp_path, **options)
    assert len(boost(tmp_path, **options).ensemble) == 1
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert [text.split(":")[0] for text in stopped["tries"]] == ["F1", "F2-hidden"]
