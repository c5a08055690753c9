"""A fit that was killed ends as it would have ended, by epochs and by steps."""

import pytest
import torch
from helpers.toys import Hook, Killed, Toys, make_plain, make_teacher, make_trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging

from bdistil import UserError
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


LIMITS = [{"epochs": 3}, {"epochs": None, "max_steps": 16}, {"epochs": 4, "max_steps": 1000}]


@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps", "both"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_fit_ends_as_a_whole_one(tmp_path, limits, workers):
    whole = train(tmp_path / "whole/last.ckpt", Toys(workers=workers), limits)
    with pytest.raises(Killed):
        train(tmp_path / "run/last.ckpt", Toys(workers=workers), limits, stop_at=2)
    rest = train(tmp_path / "run/last.ckpt", Toys(workers=workers), limits)
    assert all(torch.equal(rest[name], value) for name, value in whole.items())


class Plateau(Distillation):
    """Its rate falls after each epoch that does not halve the loss."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.student.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_schedules_and_early_stopping_see_the_epoch_before_the_kill(tmp_path, cut):
    def train(path, stop_at=None):
        def stop(trainer, module):
            if trainer.current_epoch == stop_at:
                raise Killed

        torch.manual_seed(3)
        module, keeper, rates = Plateau(make_plain(0), teacher=make_teacher()), EpochKeeper(path, 0, "teacher"), []
        look = Hook(on_train_epoch_start=lambda trainer, _: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
        patience = EarlyStopping("val_loss", patience=3, min_delta=100.0)
        trainer = make_trainer(Hook(on_train_epoch_start=stop), look, patience, keeper, epochs=6)
        with indexed_loaders(data := Toys(), 5):
            trainer.fit(module, data, ckpt_path=keeper.ckpt_path)
        return rates, keeper.state.epochs, module.student.state_dict()

    rates, epochs, weights = train(tmp_path / "whole/last.ckpt")
    assert len(set(rates)) > 1
    with pytest.raises(Killed):
        train(tmp_path / "run/last.ckpt", stop_at=min(cut, epochs - 1))
    rest, again, found = train(tmp_path / "run/last.ckpt")
    assert (rest, again) == (rates[-len(rest) :], epochs)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert train(tmp_path / "run/last.ckpt")[:2] == ([], epochs), "a fit that is over is not trained further"


def test_a_second_fit_begins_anew(tmp_path):
    keeper, steps = EpochKeeper(tmp_path / "last.ckpt", 0, "teacher"), []
    for _ in range(2):
        torch.manual_seed(3)
        module, stop = Distillation(make_plain(0), teacher=make_teacher()), EarlyStopping("val_loss", min_delta=100.0)
        stop.patience = 1
        trainer = make_trainer(stop, keeper, epochs=5)
        trainer.fit(module, Toys())
        steps.append((trainer.global_step, keeper.state.epochs))
    assert steps[0] == steps[1]
    assert steps[0][0] > 0


def test_a_fit_resumed_after_its_end_has_averaged_weights(tmp_path):
    def train():
        torch.manual_seed(3)
        module, keeper = Distillation(make_plain(0), teacher=make_teacher()), EpochKeeper(tmp_path / "last.ckpt", 0)
        trainer = make_trainer(keeper, WeightAveraging(), epochs=3)
        trainer.fit(module, Toys(), ckpt_path=keeper.ckpt_path)
        return module.student.state_dict()

    first, again = train(), train()
    assert all(torch.equal(again[name], value) for name, value in first.items())


class Steady(Distillation):
    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), 0.1)


@pytest.mark.parametrize("beside", [True, False], ids=["beside it", "without it"])
@pytest.mark.filterwarnings("ignore:.*`ckpt_path`", "ignore:Checkpoint directory")
def test_a_checkpoint_of_another_callback_is_refused(tmp_path, beside):
    """It was saved before this one had counted the epoch, whose order of samples would be repeated."""
    for path in (None, str(tmp_path / "other/last.ckpt")):
        keeper = EpochKeeper(tmp_path / "own/last.ckpt", 0, "teacher")
        others = [keeper] if beside or path else []
        trainer = make_trainer(ModelCheckpoint(tmp_path / "other", save_last=True), *others, epochs=2 if path else 1)
        module = Steady(make_plain(0), teacher=make_teacher())
        if path is None:
            trainer.fit(module, Toys())
            continue
        with pytest.raises(UserError, match=r"that EpochKeeper writes, got one .* counted 0 of 1 epochs"):
            trainer.fit(module, Toys(), ckpt_path=path)
