"""Optimizer and schedule of one's own, by epoch and by step, and how a run remembers them."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.toys import BATCH, TRAIN, Hook, Killed, Toys, boost, control, digests, kill, make_student, settings_for
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from bdistil import UserError
from bdistil.boosting.optimization import Optimization
from bdistil.boosting.settings import BoostingSettings

STEPS = TRAIN // BATCH  # of an epoch


def sgd(parameters):
    return SGD(parameters, 0.05, momentum=0.9)


def warm_up(optimizer):
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8))


def rates_of(run_dir, trainer=None, **options):
    """The optimizer of a run of one round, and its rate in each step."""
    seen = SimpleNamespace(rates=[], optimizer=None)

    def look(trainer, module):
        seen.optimizer = trainer.optimizers[0]
        seen.rates.append(seen.optimizer.param_groups[0]["lr"])

    seen.controller = boost(
        run_dir, callbacks=lambda: [Hook(on_before_optimizer_step=look)], trainer=trainer,
        **{"settings": settings_for(1), **options},
    )  # fmt: skip
    return seen


# ---- what trains a round


def test_an_optimizer_of_ones_own_has_a_constant_rate(tmp_path):
    seen = rates_of(tmp_path, optimizer=sgd)
    assert type(seen.optimizer) is SGD
    assert seen.optimizer.defaults["momentum"] == 0.9
    assert seen.rates == [0.05] * (2 * STEPS)


def test_parameters_may_be_read_twice(tmp_path):
    """As a function does that makes groups with and without weight decay."""

    def grouped(parameters):
        matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        return AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], 0.01)

    seen = rates_of(tmp_path, optimizer=grouped)
    assert [len(group["params"]) for group in seen.optimizer.param_groups] == [2, 3]
    assert all(len(state) for state in seen.optimizer.state.values())


def test_a_schedule_by_step(tmp_path):
    seen = rates_of(tmp_path, optimizer=sgd, lr_scheduler=warm_up, lr_interval="step")
    assert seen.rates == pytest.approx([0.05 * min(1.0, (step + 1) / 8) for step in range(2 * STEPS)])


def test_a_schedule_by_epoch_with_the_default_optimizer(tmp_path):
    seen = rates_of(tmp_path, settings=settings_for(1, lr=0.2), lr_scheduler=lambda o: StepLR(o, 1, 0.1))
    assert type(seen.optimizer) is AdamW
    assert seen.rates == pytest.approx([0.2] * STEPS + [0.02] * STEPS)


def test_a_schedule_as_lightning_describes_it(tmp_path):
    def halved(optimizer):
        return {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step", "frequency": 3}

    seen = rates_of(tmp_path, optimizer=sgd, lr_scheduler=halved)
    assert seen.rates == pytest.approx([0.05 * 0.5 ** (step // 3) for step in range(2 * STEPS)])


def test_a_plateau_is_that_of_the_error_to_the_teacher(tmp_path):
    plateau = rates_of(
        tmp_path, {"epochs": 4}, optimizer=sgd,
        lr_scheduler=lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=0.9999),
    )  # fmt: skip
    assert plateau.rates[0] == 0.05
    assert plateau.rates[-1] == pytest.approx(0.05 * 1e-2)  # epochs 1 and 2 of 0 … 3 are no better, by so much


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"limit_val_batches": 0}, "Trainer that validates, as ReduceLROnPlateau monitors 'val_rms'"),
        ({"check_val_every_n_epoch": 2}, r"before ReduceLROnPlateau reads 'val_rms' after epoch 1, .*'frequency': 2"),
    ],
)
def test_a_plateau_without_its_metric_is_refused_before_training(tmp_path, trainer, message):
    with pytest.raises(UserError, match=message):
        rates_of(tmp_path / "a", trainer, optimizer=sgd, lr_scheduler=ReduceLROnPlateau)
    rates_of(tmp_path / "b", trainer, optimizer=sgd, lr_scheduler=partial(plateau, monitor="train_loss"))
    if "limit_val_batches" not in trainer:
        rates_of(tmp_path / "c", trainer, optimizer=sgd, lr_scheduler=partial(plateau, frequency=2))


@pytest.mark.parametrize(
    ("trainer", "rates"),
    [
        ({"epochs": None, "max_steps": 8}, [0.01 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
        ({"epochs": 9, "max_steps": 8}, [0.01 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
        ({"epochs": 1, "max_steps": 99}, [0.01] * STEPS),
    ],
    ids=["steps", "steps before epochs", "epochs before steps"],
)
def test_the_default_cosine_ends_with_the_fit(tmp_path, trainer, rates):
    seen = rates_of(tmp_path, trainer)
    assert seen.rates == pytest.approx(rates)
    assert seen.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_bf16_with_gradient_clipping_trains(tmp_path):
    seen = rates_of(tmp_path, {"precision": "bf16-mixed", "gradient_clip_val": 1.0})
    assert len(seen.rates) == 2 * STEPS
    assert not seen.optimizer.defaults["fused"]


@pytest.mark.parametrize("epochs", [None, 9, 3])
def test_a_schedule_over_steps_goes_on_where_it_stopped(tmp_path, epochs):
    options = {"settings": settings_for(1), "trainer": {"epochs": epochs, "max_steps": 3 * STEPS - 2}}
    boost(tmp_path / "whole", **options)

    def stop(trainer, module):
        if trainer.current_epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        boost(tmp_path / "run", callbacks=lambda: [Hook(on_train_epoch_start=stop)], **options)
    boost(tmp_path / "run", **options)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def numbers_of_numpy(parameters):
    return SGD(parameters, np.linspace(0.01, 0.05, 3)[2], momentum=np.float64(0.9))


def plateau(optimizer, **others):
    return {"scheduler": ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.9), **others}


@pytest.mark.parametrize(
    "own",
    [
        {"optimizer": sgd, "lr_scheduler": warm_up, "lr_interval": "step"},
        {"optimizer": numbers_of_numpy},
        {"optimizer": sgd, "lr_scheduler": plateau},
        {"optimizer": sgd, "lr_scheduler": partial(plateau, monitor="train_loss")},
    ],
    ids=["warm-up", "numpy", "plateau", "plateau of the training loss"],
)
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_optimizer_of_ones_own_goes_on_where_it_stopped(tmp_path, own, epoch):
    options = {**own, "settings": settings_for(2), "trainer": {"epochs": 4}}
    boost(tmp_path / "whole", **options)

    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, epoch):
            raise Killed

    with pytest.raises(Killed):
        boost(tmp_path / "run", callbacks=lambda: [Hook(on_train_epoch_start=stop)], **options)
    boost(tmp_path / "run", **options)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_state_that_lightning_does_not_load_is_told_in_the_first_epoch(tmp_path):
    class Curve(Hook):
        def state_dict(self):
            return {"curve": np.zeros(3)}

    with pytest.warns(UserWarning, match=r"last.ckpt cannot be resumed as it is: .* holds numpy.*fit with") as told:
        boost(tmp_path, callbacks=lambda: [Curve()], settings=settings_for(1))
    assert sum("cannot be resumed" in str(warning.message) for warning in told) == 1


# ---- what a run remembers


def test_the_run_says_what_trained_it(tmp_path):
    boost(tmp_path, optimizer=sgd, lr_scheduler=warm_up, lr_interval="step", settings=settings_for(1))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert not {"lr", "weight_decay", "schedule"} & set(config["boosting"])  # nothing that was not used
    assert config["optimizer"]["class"] == "torch.optim.sgd.SGD"
    assert (config["optimizer"]["lr"], config["optimizer"]["momentum"]) == (0.05, 0.9)
    assert config["lr_scheduler"]["class"] == "torch.optim.lr_scheduler.LambdaLR"
    assert config["lr_scheduler"]["interval"] == "step"
    record = json.loads((tmp_path / "rounds/000/round.json").read_text())
    assert {key: record[key] for key in ("optimizer", "lr_scheduler")} == {
        key: config[key] for key in ("optimizer", "lr_scheduler")
    }


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, r"optimizer\.class: 'torch\.optim\.sgd\.SGD' there, '\(absent\)' now"),
        ({"optimizer": lambda p: SGD(p, 0.06, momentum=0.9)}, r"optimizer\.lr: 0\.05 there, 0\.06 now"),
        ({"optimizer": lambda p: AdamW(p, 0.05)}, r"optimizer\.class: .*SGD' there, .*AdamW' now"),
        ({"optimizer": sgd, "lr_scheduler": warm_up}, r"lr_scheduler\.class: '\(absent\)' there, .*LambdaLR' now"),
    ],
)
def test_another_optimizer_is_refused(tmp_path, other, message):
    options = {"settings": settings_for(1)}
    boost(tmp_path, optimizer=sgd, **options)
    with pytest.raises(UserError, match=r"another configuration(.|\n)*" + message):
        boost(tmp_path, callbacks=lambda: [Hook(on_train_start=kill)], **other, **options)
    boost(tmp_path, optimizer=lambda p: SGD(p, momentum=0.9, lr=0.05), **options)  # another function, the same options


def described(optimizer=sgd, lr_scheduler=None, interval="epoch"):
    return Optimization(optimizer, lr_scheduler, interval).describe(make_student(0), BoostingSettings())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda o: StepLR(o, 5), lambda o: StepLR(o, 6)),
        (warm_up, lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 9))),
        (lambda o: OneCycleLR(o, 0.1, 5000, pct_start=0.3), lambda o: OneCycleLR(o, 0.1, 5000, pct_start=0.2)),
        (lambda o: ReduceLROnPlateau(o, patience=3), lambda o: ReduceLROnPlateau(o, patience=4)),
        (lambda o: SequentialLR(o, [warm_up(o), CosineAnnealingLR(o, 9)], [3]),
         lambda o: SequentialLR(o, [warm_up(o), CosineAnnealingLR(o, 9)], [4])),
    ],
    ids=["step", "lambda", "one cycle", "plateau", "sequential"],
)  # fmt: skip
def test_schedules_are_told_apart(first, second):
    assert described(lr_scheduler=first) == described(lr_scheduler=first) != described(lr_scheduler=second)
    assert described(lr_scheduler=first) == yaml.safe_load(yaml.safe_dump(described(lr_scheduler=first)))
    assert described(lr_scheduler=first) != described(lr_scheduler=first, interval="step")


def test_groups_of_parameters_are_remembered():
    def split(decay):
        def make(parameters):
            parameters = list(parameters)
            flat = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": decay}
            return SGD([{"params": [p for p in parameters if p.ndim > 1]}, flat], 0.1, weight_decay=0.5)

        return make

    assert described(split(0.0)) != described(split(0.25))
    assert described(split(0.25))["optimizer"]["groups"][1] == {"parameters": 3, "weight_decay": 0.25}


def test_the_default_is_in_the_settings_alone():
    assert described(None) == {}
    assert Optimization().settings_used(BoostingSettings()) == BoostingSettings().to_dict()


# ---- what is refused before training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": SGD(nn.Linear(2, 2).parameters(), 0.1)},
            r"`optimizer` to be a function of the parameters, got SGD",
        ),
        ({"optimizer": "sgd"}, r"`optimizer` to be a function of the parameters, got str"),
        ({"lr_scheduler": 3}, r"`lr_scheduler` to be a function of the optimizer, got int"),
        ({"lr_interval": "batch"}, r"`lr_interval` to be 'epoch' or 'step', got 'batch'"),
        ({"optimizer": lambda p: None}, r"`optimizer` to return a torch Optimizer, got NoneType"),
        (
            {"optimizer": lambda p: sgd(nn.Linear(2, 2).parameters())},
            r"SGD of others: the student would not be trained",
        ),
        ({"lr_scheduler": lambda o: 0.5}, r"`lr_scheduler` to return a schedule of torch, got float"),
        ({"lr_scheduler": lambda o: {"interval": "step"}}, r"`lr_scheduler` to return a schedule of torch, got dict"),
    ],
)
def test_what_makes_no_optimizer_or_schedule(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        control(tmp_path, **options).boosting.check(Toys())
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
@pytest.mark.parametrize(("interval", "length"), [("step", 2 * STEPS), ("epoch", 2)])
def test_a_schedule_that_fails_before_the_fit_ends_is_refused(tmp_path, interval, length):
    def one_cycle(total):
        return lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=total)

    options = {"optimizer": sgd, "lr_interval": interval, "trainer": {"epochs": 2}}
    with pytest.raises(UserError, match=f"Expected a OneCycleLR as long as the fit, {length} {interval}s"):
        boost(tmp_path / "short", lr_scheduler=one_cycle(length - 1), **options)
    assert not list(digests(tmp_path / "short"))
    boost(tmp_path / "right", lr_scheduler=one_cycle(length), **options)
    options["trainer"] = {"epochs": -1, "max_time": "00:01:00:00"}
    with pytest.raises(UserError, match=r"`max_epochs` or `max_steps` for a OneCycleLR.* limited by time alone"):
        boost(tmp_path / "endless", lr_scheduler=one_cycle(length), **options)


def test_a_plateau_of_a_score_needs_its_name(tmp_path):
    with pytest.raises(UserError, match=r"of mode 'min', as it monitors val_rms, an error, got mode 'max'"):
        boost(tmp_path, optimizer=sgd, lr_scheduler=lambda o: ReduceLROnPlateau(o, mode="max"))
