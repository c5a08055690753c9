"""A whole run in one call is the run of the loop."""

import pytest
import torch
from helpers.toys import (
    CLASSES,
    FEATURES,
    ROUNDS,
    VAL,
    Hook,
    Killed,
    Toys,
    digests,
    logged,
    make_student,
    make_teacher,
    samples,
    settings_for,
)
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD

from bdistil import UserError, distill

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}


def call(run_dir, **options):
    given = {"settings": settings_for(), "max_epochs": 2, **QUIET, **options}
    return distill(make_teacher(), make_student, Toys(), run_dir=run_dir, **given)


def test_it_is_the_run_of_the_loop(finished, tmp_path):
    ensemble = call(tmp_path)
    assert digests(tmp_path) == digests(finished.run_dir)
    x = samples(VAL, 12)[0]
    assert torch.equal(ensemble(x), finished.answers[-1])


def test_it_goes_on_where_it_stopped_and_loads_a_finished_run(tmp_path):
    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 1):
            raise Killed

    fits = []
    count = Hook(on_train_start=lambda trainer, module: fits.append(module.number))
    with pytest.raises(Killed):
        call(tmp_path, callbacks=[Hook(on_train_epoch_start=stop)])
    assert len(call(tmp_path, callbacks=count)) == ROUNDS
    assert fits == [1, 2]
    assert len(call(tmp_path, callbacks=count)) == ROUNDS
    assert fits == [1, 2]


def test_rounds_and_the_options_of_a_trainer(tmp_path):
    stopping = EarlyStopping("val_rms", patience=0, min_delta=1e6)
    logger = CSVLogger(tmp_path / "log", name="", version="")
    ensemble = call(
        tmp_path / "run", settings=None, rounds=1, max_epochs=9, callbacks=[stopping], logger=logger,
        log_every_n_steps=1, optimizer=lambda parameters: SGD(parameters, 0.05),
    )  # fmt: skip
    assert len(ensemble) == 1
    rows = logged(tmp_path / "log")
    assert max(int(row["epoch"]) for row in rows if row["epoch"]) == 1
    assert stopping.wait_count == 0  # a copy was used
    assert list((tmp_path / "run").glob("lightning_logs")) == []


class Holds(Callback):
    """Counts epochs in an object of the user's."""

    def __init__(self, *held):
        self.held = held

    def on_train_epoch_start(self, trainer, pl_module):
        for held in self.held:
            held.epochs = getattr(held, "epochs", 0) + 1


def test_callbacks_hold_the_data_module_and_the_teacher_themselves(tmp_path):
    """Those of a curriculum had a copy of the data module, and changed nothing."""
    data, teacher, logger = Toys(), make_teacher(), CSVLogger(tmp_path / "log", name="", version="")
    options = {"max_epochs": 2, "callbacks": [Holds(data, teacher, logger)], "logger": [logger], **QUIET}
    distill(teacher, make_student, data, run_dir=tmp_path / "run", rounds=1, **options)
    assert (data.epochs, teacher.epochs, logger.epochs) == (2, 2, 2)


def test_a_fast_dev_run_is_not_kept(tmp_path):
    ensemble = call(tmp_path, fast_dev_run=True)
    assert ensemble(torch.randn(2, FEATURES)).shape == (2, CLASSES)
    assert not digests(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epoch": 3}, r"options of Lightning's Trainer beside those of `distill`.*max_epoch"),
        ({"enable_checkpointing": False}, r"`enable_checkpointing=True` and `barebones=False`.*Leave both out"),
        ({"barebones": True}, r"`barebones=False`"),
        ({"max_epochs": 0}, r"`max_epochs` of the Trainer to be at least 1"),
        ({"precision": "64-true"}, r"`precision` of the Trainer"),
        ({"strategy": "fsdp"}, r"`strategy` of the Trainer to be 'auto' or 'ddp', got fsdp"),
    ],
)
def test_options_are_checked_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        call(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
