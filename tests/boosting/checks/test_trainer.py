"""Trainers that would not train a round: refused before a step, kept out of the run, or made right."""

from contextlib import nullcontext

import lightning as L
import pytest
import torch
from helpers.toys import (
    BATCH,
    CLASSES,
    EPOCHS,
    FEATURES,
    ROUNDS,
    TRAIN,
    Hook,
    Killed,
    Toys,
    boost,
    control,
    digests,
    everything,
    fit,
    kill,
    make_plain,
    make_student,
    make_teacher,
    make_trainer,
    settings_for,
)
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader

from bdistil import ProgressiveEnsemble, UserError
from bdistil.distillation import Distillation


@pytest.fixture
def refused(tmp_path):
    """A run fails before the teacher answers for its samples, with a message, and nothing is committed."""

    def refuse(match, datamodule=None, asked=2, **options):
        teacher, most = make_teacher(), []
        teacher.register_forward_hook(lambda module, args, _: most.append(len(args[0])))
        with pytest.raises(UserError, match=match):
            boost(tmp_path / "run", datamodule, teacher=teacher, **options)
        assert max(most, default=0) <= asked
        assert not digests(tmp_path / "run")

    return refuse


def test_a_single_process_with_the_number_of_another_is_refused(refused, monkeypatch):
    """As in a sweep of several tasks of one SLURM job, each a run of its own."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # read from RANK or SLURM_PROCID when Lightning is imported
    refused("got one of a single process. Give strategy='ddp' .* or, .* unset the variable", asked=TRAIN)


# ---- one Trainer for all rounds


def test_one_trainer_for_all_rounds_is_refused(tmp_path):
    controller, data = control(tmp_path), Toys()
    trainer, rounds = make_trainer(controller), controller.rounds(data)
    trainer.fit(next(rounds), data, ckpt_path=controller.ckpt_path)
    second = next(rounds)
    with pytest.raises(
        UserError, match=r"of its own for each round, got one that has trained 12 steps.*inside the loop"
    ):
        trainer.fit(second, data, ckpt_path=controller.ckpt_path)
    rounds.close()
    assert list(digests(tmp_path)) == ["000"]
    assert len(boost(tmp_path).ensemble) == ROUNDS  # the first round stays, the others are trained


def test_a_trainer_that_has_trained_the_teacher_is_refused(tmp_path):
    class Teaches(Distillation):
        pass

    trainer = make_trainer(control(tmp_path / "other"), max_steps=3)
    trainer.callbacks.clear()
    trainer.fit(Teaches(make_plain(0), teacher=make_teacher()), Toys())
    controller, data = control(tmp_path), Toys()
    trainer.callbacks.append(controller)
    with pytest.raises(UserError, match="got one that has trained 3 steps"):
        trainer.fit(next(controller.rounds(data)), data)


def test_a_second_fit_of_a_round_is_refused(tmp_path):
    controller, data = control(tmp_path), Toys()
    rounds = controller.rounds(data)
    module = next(rounds)
    make_trainer(controller).fit(module, data)
    before = digests(tmp_path)
    with pytest.raises(UserError, match="one fit for round 1, got a second one: take the next module"):
        make_trainer(controller).fit(module, data)
    assert digests(tmp_path) == before
    rounds.close()


def test_a_round_is_validated_after_its_fit_and_not_before(tmp_path):
    controller, data = control(tmp_path), Toys()
    rounds = controller.rounds(data)
    module = next(rounds)
    with pytest.raises(UserError, match="validated during or after its fit"):
        make_trainer(controller).validate(module, data, verbose=False)
    module.train()  # that was interrupted
    trainer = make_trainer(controller)
    trainer.fit(module, data)
    before = digests(tmp_path)
    (figures,) = trainer.validate(module, data, verbose=False)
    assert figures["val_accuracy"] == pytest.approx(controller.run.record(0)["curve"]["val_accuracy"])
    assert digests(tmp_path) == before
    assert next(rounds).number == 1
    rounds.close()


def test_the_best_epoch_would_replace_an_average(tmp_path):
    with pytest.raises(UserError, match="keep_epoch='last' beside StochasticWeightAveraging"):
        boost(
            tmp_path, settings=settings_for(1, keep_epoch="best"),
            callbacks=lambda: [StochasticWeightAveraging(swa_lrs=1e-2)],
        )  # fmt: skip


# ---- fits without a step


@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        ("max_epochs", {"epochs": 0}),
        ("max_steps", {"max_steps": 0}),
        ("limit_train_batches", {"limit_train_batches": 0}),
    ],
)
def test_limits_that_leave_no_step(refused, name, trainer):
    refused(rf"`{name}` of the Trainer to be at least 1, got 0: .* committed untrained", trainer=trainer)


class Few(Toys):
    """Fewer samples than a batch, and incomplete batches are dropped."""

    def train_dataloader(self):
        return DataLoader(super().train_dataloader().dataset, batch_size=TRAIN + 1, shuffle=True, drop_last=True)


def test_a_loader_without_a_batch(refused):
    refused(rf"`train_dataloader\(\)` to yield a batch, got 0 of {TRAIN} samples .*drop_last=True", Few())


def test_a_fit_that_ends_without_a_step_commits_nothing(refused):
    def stop(trainer, module):
        trainer.should_stop = True

    refused(
        r"student of round 1 was not trained: the fit ended without a step\. Nothing of this round was committed",
        callbacks=lambda: [Hook(on_fit_start=stop)], asked=BATCH * 16,
    )  # fmt: skip


def test_a_fit_that_changes_no_weight_commits_nothing(refused):
    refused(
        r"student of round 1 was not trained: 12 steps of the optimizer changed no weight", asked=BATCH * 16,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0),
    )  # fmt: skip


# ---- fast_dev_run


@pytest.mark.parametrize("batches", [True, 2])
def test_nothing_of_a_fast_dev_run_counts(tmp_path, batches):
    (tmp_path / "notes.txt").write_text("mine")
    controller = boost(tmp_path, trainer={"fast_dev_run": batches})
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["notes.txt"]
    assert controller.ensemble(torch.randn(2, FEATURES)).shape == (2, 4)  # the rest of a script runs, too
    fit(controller)  # the real run, with the same controller
    assert len(controller.ensemble) == ROUNDS


def test_a_fast_dev_run_in_the_middle_of_a_run_changes_nothing(finished, tmp_path):
    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 1):
            raise KeyError

    with pytest.raises(KeyError):
        boost(tmp_path, callbacks=lambda: [Hook(on_train_epoch_start=stop)])
    before = {name: content for name, content in everything(tmp_path).items() if not name.startswith("environment")}
    boost(tmp_path, trainer={"fast_dev_run": True})
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before
    boost(tmp_path)
    assert digests(tmp_path) == digests(finished.run_dir)


def test_a_fast_dev_run_may_have_other_settings_than_the_run(tmp_path):
    boost(tmp_path, settings=settings_for(2, eta=0.25), trainer={"fast_dev_run": True})
    assert len(boost(tmp_path, settings=settings_for(2)).ensemble) == 2


# ---- callbacks that carry the past of one student over to the next


def test_one_early_stopping_for_all_rounds_begins_anew(tmp_path):
    def stopping():
        return EarlyStopping("val_rms", patience=2, min_delta=0.02)

    options = {"settings": settings_for(3, lr=0.05), "trainer": {"epochs": 12}}
    boost(tmp_path / "own", callbacks=lambda: [stopping()], **options)
    shared = stopping()
    epochs = boost(tmp_path / "shared", callbacks=lambda: [shared], **options)
    assert digests(tmp_path / "shared") == digests(tmp_path / "own")
    assert any(epochs.run.record(number)["epochs"] < 12 for number in range(3))


def test_an_early_stopping_that_has_stopped_a_teacher_begins_anew(tmp_path):
    used = EarlyStopping("val_rms", mode="max", patience=1)
    used.best_score, used.wait_count = torch.tensor(1e9), 1
    controller = boost(tmp_path, callbacks=lambda: [used], settings=settings_for(1))
    assert controller.run.record(0)["epochs"] == EPOCHS


@pytest.mark.parametrize("make", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2)], ids=["EMA", "SWA"])
@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step.*", "ignore:Swapping scheduler")
def test_a_callback_that_averages_needs_one_for_each_round(tmp_path, make):
    shared = make()
    with pytest.raises(UserError, match=r"Averaging of its own in the Trainer of each round.*Make it inside the loop"):
        boost(tmp_path, callbacks=lambda: [shared])
    assert list(digests(tmp_path)) == ["000"]
    assert len(boost(tmp_path, callbacks=lambda: [make()]).ensemble) == ROUNDS


def test_a_wider_try_needs_an_average_of_its_own(tmp_path):
    shared, made = EMAWeightAveraging(), []

    def callbacks():
        made.append(EMAWeightAveraging() if not made else shared)
        return [made[-1]]

    settings = settings_for(2, accept="progress", min_progress=0.9)  # every later try is rejected
    with pytest.raises(UserError, match="got that of another fit"):
        boost(tmp_path, callbacks=callbacks, settings=settings)
    assert len(made) == 3


def test_averaged_weights_are_committed(tmp_path):
    averages = []

    def last(trainer, module):
        averages.append(module.student.head.weight.detach().clone())

    class Mean(EMAWeightAveraging):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            last(trainer, pl_module)

    boost(tmp_path, callbacks=lambda: [Mean(decay=0.5)], settings=settings_for(1))
    assert torch.equal(ProgressiveEnsemble.load(tmp_path).students[0].head.weight, averages[0])


class OwnAverage(Hook):
    """An average of the weights that replaces them at the end of training, as people write it."""

    average = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = [parameter.detach().clone() for parameter in pl_module.student.parameters()]
        self.average = now if self.average is None else [(a + b) / 2 for a, b in zip(self.average, now, strict=True)]

    def on_train_end(self, trainer, pl_module):
        for parameter, value in zip(pl_module.student.parameters(), self.average, strict=True):
            parameter.data.copy_(value)

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state_dict):
        self.average = state_dict["average"]


@pytest.mark.parametrize(
    ("make", "student"),
    [
        (lambda: EMAWeightAveraging(decay=0.8), make_student),
        (OwnAverage, make_student),
        (lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1), lambda round: nn.Linear(FEATURES, CLASSES)),
    ],
    ids=["EMA", "own", "SWA"],
)
@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step.*", "ignore:Swapping scheduler")
def test_averaged_weights_survive_a_kill_in_the_verdict(tmp_path, monkeypatch, make, student):
    options = {"callbacks": lambda: [make()], "student": student, "settings": settings_for(1)}
    boost(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr("bdistil.callbacks.round_controller.close_round", kill)
        with pytest.raises(Killed):
            boost(tmp_path / "run", **options)
    boost(tmp_path / "run", **options)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_an_average_survives_a_kill_before_it_is_taken(tmp_path):
    options = {"settings": settings_for(1)}
    boost(tmp_path / "whole", callbacks=lambda: [EMAWeightAveraging(decay=0.8)], **options)
    with pytest.raises(Killed):
        boost(tmp_path / "run", callbacks=lambda: [Hook(on_train_end=kill), EMAWeightAveraging(decay=0.8)], **options)
    boost(tmp_path / "run", callbacks=lambda: [EMAWeightAveraging(decay=0.8)], **options)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_weights_that_change_after_the_verdict_are_a_warning(tmp_path, hook):
    def double(trainer, module):
        module.student.head.weight.data.mul_(2)

    late = pytest.warns(
        UserWarning, match="changed the weights of the student of round 1 in `on_fit_end`, after it was"
    )
    with late if hook == "on_fit_end" else nullcontext():
        boost(tmp_path, callbacks=lambda: [Hook(**{hook: double})], settings=settings_for(1))


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_finders_are_refused_by_name(refused, finder):
    refused(rf"without {finder.__name__} \(or Tuner\) beside RoundController.*Distillation", Sized(),
            callbacks=lambda: [finder()])  # fmt: skip


class Sized(LightningDataModule):
    """With a batch size that can be found."""

    def __init__(self):
        super().__init__()
        self.batch_size, self.data = 16, Toys().train_dataloader().dataset

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size)


def test_the_tuner_is_refused_and_works_on_a_distillation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    controller, data = control(tmp_path / "run"), Sized()
    module = next(controller.rounds(data))
    module.lr = 1e-3
    with pytest.raises(UserError, match="without LearningRateFinder"):
        Tuner(make_trainer(controller)).lr_find(module, datamodule=data, num_training=4)
    module = Distillation(make_student(0), teacher=make_teacher(), lr=1e-3)
    found = Tuner(make_trainer(enable_checkpointing=False)).lr_find(module, datamodule=data, num_training=8)
    assert len(found.results["lr"]) >= 4
    Tuner(make_trainer(enable_checkpointing=False)).scale_batch_size(
        module, datamodule=data, max_trials=3, steps_per_trial=1
    )
    assert data.batch_size == 8


# ---- a Trainer of Lightning's that refuses the controller


@pytest.mark.parametrize("option", [{"enable_checkpointing": False}, {"barebones": True}])
def test_a_trainer_without_checkpoints_is_refused_with_the_reason(tmp_path, option, caplog):
    controller, data = control(tmp_path), Toys()

    def run():
        for module in controller.rounds(data):
            L.Trainer(callbacks=[controller], **option).fit(module, data)

    with pytest.raises(Exception, match="enable_checkpointing=False` but found"):
        run()
    assert "RoundController saves the round under way, so it needs `enable_checkpointing=True`" in caplog.text


def test_a_loop_that_is_left_after_its_fit_says_nothing(tmp_path, caplog):
    controller, data = control(tmp_path), Toys()
    for module in controller.rounds(data):
        make_trainer(controller).fit(module, data)
        break
    assert len(controller.ensemble) == 1
    assert "was not trained" not in caplog.text


def test_a_checkpoint_of_ones_own_beside_it(tmp_path):
    own = [ModelCheckpoint(tmp_path / f"own{number}", save_last=True) for number in range(ROUNDS)]
    left = iter(own)
    assert len(boost(tmp_path / "run", callbacks=lambda: [next(left)]).ensemble) == ROUNDS
    assert all((tmp_path / f"own{number}/last.ckpt").exists() for number in range(ROUNDS))


def test_weights_of_another_type_are_refused_before_the_teacher(refused):
    refused("`precision` of the Trainer to be '32-true', '16-mixed' or 'bf16-mixed', got '64-true'",
            trainer={"precision": "64-true"}, student=lambda round: nn.Linear(FEATURES, 4))  # fmt: skip


def pruning(module):
    return ModelPruning(
        "l1_unstructured", [(module.student.body[0], "weight")], amount=0.3, use_lottery_ticket_hypothesis=False
    )


def test_a_pruned_round_is_not_resumed(tmp_path):
    """The masks are in no checkpoint: what was pruned before the kill would be trained again."""

    def run(stop):
        controller, data = control(tmp_path, settings=settings_for(1)), Toys()
        for module in controller.rounds(data):
            hook = Hook(on_train_epoch_start=lambda trainer, _: kill() if trainer.current_epoch == stop else None)
            make_trainer(pruning(module), hook, controller).fit(module, data, ckpt_path=controller.ckpt_path)
        return controller

    with pytest.raises(Killed):
        run(stop=1)
    with pytest.raises(UserError, match=r"resumed fit without ModelPruning.*Delete .*last\.ckpt"):
        run(stop=None)
    next((tmp_path / "work").rglob("last.ckpt")).unlink()
    weights = run(stop=None).ensemble.students[0].body[0].weight
    assert float((weights == 0).float().mean()) > 0.4, "pruned twice"


def test_early_stopping_without_a_validation(refused):
    refused(
        r"Expected a Trainer that validates, as EarlyStopping monitors 'val_rms'", asked=8,
        callbacks=lambda: [EarlyStopping("val_rms")], trainer={"limit_val_batches": 0},
    )  # fmt: skip
