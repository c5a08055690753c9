"""Points of fits in any order of cost; metrics that are missing are named after the first epoch."""

import pytest
import torch
from helpers.toys import CLASSES, FEATURES, Toys, boost, make_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from bdistil import UserError
from bdistil.callbacks import ComputeCost, MetricCurves
from bdistil.metrics.curve import area_under_curve, merge_points


class Foreign(LightningModule):
    """Somebody's classifier."""

    def __init__(self, width=4, every=1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))
        self.epochs = 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_epoch_end(self):
        self.epochs += 1

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(module, *callbacks, **options):
    trainer = make_trainer(*callbacks, enable_checkpointing=False, **options)
    trainer.fit(module, Toys())
    return float(trainer.callback_metrics["val_accuracy"])


def test_fits_of_equal_and_falling_cost_are_points():
    curves, found = MetricCurves(), []
    for seed, width in enumerate((16, 4, 4, 16)):  # two seeds of each
        torch.manual_seed(seed)
        found.append(fitted(Foreign(width), ComputeCost(), curves))
    costs = [width * (FEATURES + CLASSES) for width in (4, 16)]
    means = [(found[1] + found[2]) / 2, (found[0] + found[3]) / 2]
    assert merge_points(curves.points) == (costs, pytest.approx(means))
    figures = curves.add(100_000, 1.0)
    assert figures["area"] == pytest.approx(area_under_curve([*costs, 100_000], [*means, 1.0]))


@pytest.mark.filterwarnings("ignore:.*`ckpt_path`")
def test_points_outlive_a_test_with_a_checkpoint_of_the_fit(tmp_path):
    """It was saved before the fit ended, and so before the fit had its point; a rehearsal has none."""
    curves, cost, saved = MetricCurves(), ComputeCost(), ModelCheckpoint(tmp_path, save_last=True)
    fitted(Foreign(), ComputeCost(), curves, fast_dev_run=True)
    assert curves.points == []
    trainer = make_trainer(cost, curves, saved)
    trainer.fit(Foreign(), Toys())
    seen = cost.samples_seen
    trainer.validate(datamodule=Toys(), ckpt_path="best", verbose=False)
    assert len(curves.points) == 1
    assert cost.samples_seen == seen
    again = MetricCurves()
    trainer = make_trainer(ComputeCost(), again, epochs=3, enable_checkpointing=False)
    trainer.fit(Foreign(), Toys(), ckpt_path=tmp_path / "last.ckpt")
    assert len(again.points) == 1


def test_a_point_that_costs_less_and_is_better_is_a_fall():
    curves = MetricCurves()
    curves.add(200, 0.5)
    assert curves.add(100, 0.9)["violations"] == 1


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        (MetricCurves(metric="accuracy"), r"expected 'accuracy' among logged metrics, got .*'val_accuracy'"),
        (MetricCurves(cost="macs"), r"expected 'macs' among logged metrics"),
    ],
)
def test_a_missing_metric_is_named_after_the_first_epoch(curves, message):
    module = Foreign()
    with pytest.raises(UserError, match=message):
        fitted(module, ComputeCost(), curves, epochs=5)
    assert module.epochs <= 1


def test_a_metric_that_comes_with_a_later_validation():
    module = Foreign()
    fitted(module, ComputeCost(), curves := MetricCurves(), epochs=4, check_val_every_n_epoch=4)
    assert len(curves.points) == 1


def test_a_fit_without_a_cost_is_refused_after_the_first_epoch():
    class Free(Foreign):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("cost", 0.0)

    module = Free()
    with pytest.raises(UserError, match="expected 'cost' to be > 0, got 0"):
        fitted(module, MetricCurves(cost="cost"), epochs=5)
    assert module.epochs <= 1


def test_a_metric_that_a_fit_without_validation_does_not_log():
    module = Foreign()
    told = "MetricCurves expected 'val_accuracy' among logged metrics"
    with pytest.raises(UserError, match=told), pytest.warns(UserWarning, match=told):
        fitted(module, ComputeCost(), MetricCurves(), epochs=3, limit_val_batches=0)


def test_a_boosting_run_has_a_curve_of_its_own(tmp_path):
    """The accuracies of the prefixes were paired with the costs of single students."""
    with pytest.raises(UserError, match=r"beside RoundController.*Leave it out: the controller logs the same"):
        boost(tmp_path, callbacks=lambda: [ComputeCost(), MetricCurves()])


@pytest.mark.filterwarnings("ignore:.*checkpoint")
def test_a_fit_that_is_resumed_after_its_end_has_its_point(tmp_path):
    """A script of several fits that is started again, with the checkpoints of those that are over."""

    def script(folder, widths):
        curves = MetricCurves()
        for width in widths:
            torch.manual_seed(width)
            saved = ModelCheckpoint(folder / str(width), save_last=True)
            last = folder / str(width) / "last.ckpt"
            trainer = make_trainer(ComputeCost(latency=False), curves, saved, epochs=2)
            trainer.fit(Foreign(width), Toys(), ckpt_path=last if last.exists() else None)
        return curves.points

    whole = script(tmp_path / "whole", (4, 8, 16))
    script(tmp_path / "cut", (4, 8))
    for _ in range(2):
        assert torch.tensor(script(tmp_path / "cut", (4, 8, 16))).allclose(torch.tensor(whole))


def test_two_modules_of_one_trainer_have_a_point_each():
    curves = MetricCurves()
    trainer = make_trainer(ComputeCost(), curves, enable_checkpointing=False, epochs=1)
    first, second = Foreign(), Foreign()
    trainer.fit(first, Toys())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, Toys())
    assert (first.epochs, second.epochs, len(curves.points)) == (1, 1, 2)


@pytest.mark.filterwarnings("ignore:.*`ckpt_path`", "ignore:Checkpoint directory")
@pytest.mark.parametrize("same", [True, False], ids=["trainer", "checkpoint"])
def test_a_fit_that_is_continued_has_one_point(tmp_path, same):
    curves, saved = MetricCurves(), ModelCheckpoint(tmp_path, save_last=True)
    fitted(Foreign(), ComputeCost(), curves)
    module, trainer = Foreign(), make_trainer(ComputeCost(), curves, saved, epochs=1)
    trainer.fit(module, Toys())
    assert len(curves.points) == 2
    if same:
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, Toys())
    else:
        trainer = make_trainer(ComputeCost(), curves, ModelCheckpoint(tmp_path), epochs=4)
        trainer.fit(module, Toys(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert module.epochs == 4
    assert len(curves.points) == 2
    assert curves.points[1][1] == float(trainer.callback_metrics["val_accuracy"])
