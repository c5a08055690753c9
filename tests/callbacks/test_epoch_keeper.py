"""A fit that was killed ends as it would have ended, by epochs and by steps."""

import pytest
import torch
from helpers.toys import Hook, Killed, Toys, make_plain, make_teacher, make_trainer

from bdistil.callbacks import EpochKeeper
from bdistil.data.loaders import indexed_loaders
from bdistil.distillation import Distillation


def train(path, data, limits, stop_at=None):
    def stop(trainer, module):
        if trainer.current_epoch == stop_at:
            raise Killed

    torch.manual_seed(3)
    module, keeper = Distillation(make_plain(0), teacher=make_teacher()), EpochKeeper(path, 0, "teacher")
    trainer = make_trainer(keeper, Hook(on_train_epoch_start=stop), **limits)
    with indexed_loaders(data, 5):
        trainer.fit(module, data, ckpt_path=keeper.ckpt_path)
    return module.student.state_dict()


@pytest.mark.parametrize("limits", [{"epochs": 3}, {"epochs": None, "max_steps": 16}], ids=["epochs", "steps"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_fit_ends_as_a_whole_one(tmp_path, limits, workers):
    whole = train(tmp_path / "whole/last.ckpt", Toys(workers=workers), limits)
    with pytest.raises(Killed):
        train(tmp_path / "run/last.ckpt", Toys(workers=workers), limits, stop_at=2)
    rest = train(tmp_path / "run/last.ckpt", Toys(workers=workers), limits)
    assert all(torch.equal(rest[name], value) for name, value in whole.items())
