"""LossMixing in real fits: weights that tell flipped labels and survive a kill, in any module and in a boosting run."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from helpers.gaussians import Gaussians, mlp, trained_teacher
from helpers.toys import (
    Batches,
    Hook,
    Killed,
    Toys,
    boost,
    control,
    digests,
    make_student,
    make_teacher,
    make_trainer,
    settings_for,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from bdistil import RunError, Rung, UserError
from bdistil.callbacks import LossMixing, RoundController
from bdistil.callbacks.loss_mixing import _learning_rate
from bdistil.data.label_noise import LabelNoise, NoisyLabels, flip_labels
from bdistil.distillation import MixingSettings
from bdistil.distillation.loss_mixing import read_mix, save_mix
from bdistil.distillation.module import Distillation
from bdistil.functional.distillation import kd_terms
from bdistil.functional.loss_mixing import mixed_loss

SOON = MixingSettings(mode="convex", warmup=1, every=1, inner=2)


def fit(module, callback, data, *others, epochs=3, **options):
    trainer = make_trainer(callback, *others, epochs=epochs, limit_val_batches=0, enable_checkpointing=False, **options)
    trainer.fit(module, datamodule=data)
    return trainer


# ---- label noise


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_noise_makes_exactly_its_share_wrong(kind):
    labels = torch.arange(1000) % 5
    noisy, flipped = flip_labels(labels, 0.4, classes=5, seed=3, kind=kind)
    assert int(flipped.sum()) == 400
    assert torch.equal(noisy != labels, flipped)
    if kind == "asymmetric":
        assert torch.equal(noisy[flipped], (labels[flipped] + 1) % 5)
    else:  # each of the other classes, about as often
        shift = (noisy - labels)[flipped] % 5
        assert shift.bincount(minlength=5)[1:].min() > 70
    again, other = (flip_labels(labels, 0.4, classes=5, seed=seed, kind=kind)[0] for seed in (3, 4))
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)


def test_asymmetric_noise_takes_the_classes_that_are_given():
    labels = torch.arange(90) % 3
    noisy, flipped = flip_labels(labels, 1.0, classes=3, seed=0, kind="asymmetric", to={0: 2})
    assert torch.equal(flipped, labels == 0)
    assert torch.equal(noisy, torch.where(labels == 0, 2, labels))


def test_only_the_training_part_gets_noise():
    clean, data = Toys(), LabelNoise(Toys(), rate=0.5, seed=1)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader.dataset, NoisyLabels)
    assert (loader.dataset.seed, loader.dataset.rate) == (1, 0.5)
    assert int(loader.dataset.flipped.sum()) == 96
    x, y = loader.dataset[5]
    assert torch.equal(x, clean.parts["train"][0][5])
    assert bool(y != clean.parts["train"][1][5]) is bool(loader.dataset.flipped[5])
    assert torch.equal(data.train_dataloader().dataset.labels, loader.dataset.labels)
    for part in ("val", "test"):
        kept = torch.cat([y for _, y in getattr(data, f"{part}_dataloader")()])
        assert torch.equal(kept, clean.parts[part][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rate": 1.2}, "`rate` of wrong labels"), ({"rate": 0.1, "kind": "odd"}, "'symmetric' or 'asymmetric'")],
)
def test_noise_names_what_is_wrong(options, message):
    with pytest.raises(UserError, match=message):
        LabelNoise(Toys(), **options)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("unlabelled", [-100, -1, 255])
def test_samples_without_a_label_stay_without_one(kind, unlabelled):
    labels = torch.tensor([0, 1, 2, unlabelled] * 25)
    known = {"ignore_index": unlabelled} if unlabelled > 0 else {}
    data = LabelNoise(Toys(train=100), rate=0.4, kind=kind, **known)
    data.data.parts["train"] = (data.data.parts["train"][0], labels)
    noisy = data.train_dataloader().dataset
    assert torch.equal(noisy.labels == unlabelled, labels == unlabelled)
    assert noisy.labels.unique().tolist() == labels.unique().tolist()  # 255 adds no classes
    assert int(noisy.flipped.sum()) == 30  # of the 75 that have a label


def test_samples_of_which_none_has_a_label_are_named():
    dataset = TensorDataset(torch.zeros(3, 2), torch.tensor([-100, -1, 9]))
    with pytest.raises(
        UserError, match="Expected samples with a label, of which some are made wrong, got none among 3"
    ):
        NoisyLabels(dataset, 0.5, ignore_index=9)


class Remapped(TensorDataset):
    """Two classes of the four in the file."""

    def __init__(self, x, labels):
        super().__init__(x, labels)
        self.labels = labels

    def __getitem__(self, index):
        return self.tensors[0][index], int(self.labels[index]) % 2


class Half(Dataset):
    """Every other sample of a file, whose labels are an attribute."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x) // 2

    def __getitem__(self, index):
        return self.x[2 * index], self.labels[2 * index]


@pytest.mark.parametrize("kind", [Remapped, Half])
def test_labels_are_those_of_the_items(kind):
    dataset = kind(*Toys().parts["train"])
    noisy = NoisyLabels(dataset, 0.0)
    assert len(noisy) == len(dataset)
    assert noisy.labels.tolist() == [int(dataset[index][1]) for index in range(len(dataset))]


class Hooked(Toys):
    """Normalises on the device, and knows its classes."""

    labels, closed = ["a", "b", "c", "d"], False

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - 3, *batch[1:])

    def teardown(self, stage):
        self.closed = True

    def state_dict(self):
        return {"drawn": 3}

    def load_state_dict(self, state_dict):
        self.drawn = state_dict["drawn"]


class Untested(L.LightningDataModule):
    """Has no test part."""

    def train_dataloader(self):
        return Toys().train_dataloader()

    def val_dataloader(self):
        return Toys().val_dataloader()


def test_hooks_and_attributes_are_those_of_the_data_module(tmp_path):
    data = LabelNoise(Hooked(), rate=0.3)
    with pytest.raises(UserError, match="on_after_batch_transfer` changes batches"):
        boost(tmp_path / "hooked", data, settings=settings_for(1))
    data.teardown("fit")
    assert data.data.closed
    data.load_state_dict(data.state_dict())  # of a checkpoint
    assert data.data.drawn == 3
    assert data.labels == Hooked.labels
    assert not hasattr(data, "normalisation")
    assert copy.deepcopy(data).labels == Hooked.labels
    assert len(boost(tmp_path / "untested", LabelNoise(Untested(), rate=0.3), settings=settings_for(1)).ensemble) == 1


# ---- files


def test_a_round_starts_from_the_numbers_of_the_round_before(tmp_path):
    mix = torch.rand(5, 2)
    assert read_mix(tmp_path / "mixing.000.f32") is None
    save_mix(tmp_path / "mixing.000.f32", mix)
    assert read_mix(tmp_path / "mixing.000.f32") is None  # a fit that begins anew
    save_mix(tmp_path / "mixing.001.f32", mix + 1)
    assert torch.equal(read_mix(tmp_path / "mixing.001.f32"), mix.flatten())  # a round that is tried again
    assert torch.equal(read_mix(tmp_path / "mixing.002.f32"), mix.flatten() + 1)


# ---- anyone's module


class Own(L.LightningModule):
    """Somebody's module: nothing of bdistil but the loss."""

    def __init__(self, teacher):
        super().__init__()
        self.body, self.last_layer = nn.Sequential(nn.Linear(10, 32), nn.ReLU()), nn.Linear(32, 20)
        self.temperature = 4.0
        self.teachers, self.indices = [teacher], []

    def forward(self, x):
        return self.last_layer(self.body(x))

    @torch.no_grad()
    def teacher_logits(self, x, index):
        return self.teachers[0](x)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.indices += index.tolist()
        terms = kd_terms(self(x), self.teacher_logits(x, index), y, temperature=self.temperature)
        return mixed_loss(terms, self.sample_weights(index))

    def validation_step(self, batch, batch_idx):
        """Lightning asks for one where there is validation data."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.fixture(scope="module")
def noisy():
    data = Gaussians(rate=0.4)
    return data, trained_teacher(data)


@pytest.mark.parametrize("mode", ["convex", "independent"])
def test_weights_find_the_flipped_labels_in_a_module_of_anyones(noisy, mode, tmp_path):
    data, teacher = noisy
    module, callback = Own(teacher), LossMixing(MixingSettings(mode=mode, warmup=4, every=4), folder=tmp_path)
    fit(module, callback, data, epochs=13)
    assert sorted(module.indices[:2000]) == list(range(2000))
    assert [row["epoch"] for row in callback.history] == [4, 8, 12]
    last = callback.history[-1]
    assert last["auc"] >= 0.8
    assert last["clean"] > last["flipped"] + 0.2
    assert (tmp_path / "mixing.png").stat().st_size > 1000
    assert next(iter(data.train_dataloader()))[0].shape == (128, 10)  # the loader is the user's again
    assert len(next(iter(data.train_dataloader()))) == 2


def test_several_teachers_have_a_weight_each(noisy, tmp_path):
    data, teacher = noisy
    module = Distillation(mlp(16), [teacher, mlp(8), teacher])
    callback = LossMixing(MixingSettings(mode="independent", warmup=1, every=1), folder=tmp_path)
    fit(module, callback, data, epochs=4)
    weights = callback.weights().mean(0)
    assert weights.shape == (4,)
    assert min(weights[1], weights[3]) > weights[2] + 0.05  # the one that knows nothing


def test_a_fit_that_goes_on_is_the_one_that_was_not_stopped(noisy, tmp_path):
    data, teacher = noisy

    def run(folder, epochs, **options):
        torch.manual_seed(0)
        module, callback = Distillation(mlp(16), teacher), LossMixing(SOON, folder=tmp_path / folder)
        module.configure_optimizers = lambda: torch.optim.SGD(module.student.parameters(), 0.1)
        trainer = make_trainer(callback, epochs=epochs, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(module, datamodule=data, **options)
        return trainer, module, callback

    _, whole, all_along = run("whole", 4)
    trainer, _, _ = run("parts", 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    run("parts", 3, ckpt_path=tmp_path / "last.ckpt", weights_only=True)  # one more update, and then a kill
    _, resumed, callback = run("parts", 4, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(callback.weights(), all_along.weights(), rtol=0, atol=0)
    assert [row["epoch"] for row in callback.history] == [1, 2, 3]
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_of_other_data_are_refused(noisy, tmp_path):
    callback = LossMixing(SOON, folder=tmp_path)
    fit(Own(noisy[1]), callback, Gaussians(train=600), epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(LossMixing(SOON, folder=tmp_path), epochs=3, limit_val_batches=0)
    options = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    with pytest.raises(RunError, match="learned weights of 2000 samples with 1 columns, got 600 numbers"):
        trainer.fit(Own(noisy[1]), datamodule=noisy[0], **options)


def test_weights_of_other_samples_or_another_mode_are_refused(noisy, tmp_path):
    """Their number is the same."""
    callback, path = LossMixing(SOON, folder=tmp_path), tmp_path / "last.ckpt"
    fit(Own(noisy[1]), callback, Gaussians(train=600), epochs=2).save_checkpoint(path)

    def go_on(data, mode="convex"):
        settings = MixingSettings(mode=mode, warmup=1, every=1, inner=2)
        options = {"epochs": 3, "limit_val_batches": 0, "enable_checkpointing": False}
        trainer = make_trainer(LossMixing(settings, folder=tmp_path / "new"), **options)
        trainer.fit(Own(noisy[1]), datamodule=data, ckpt_path=path, weights_only=True)

    with pytest.raises(RunError, match="samples that LossMixing has learned weights of, got another sample 0"):
        go_on(Gaussians(train=600, rate=0.1))
    with pytest.raises(RunError, match="of mode 'independent' of LossMixing, got one of 'convex'"):
        go_on(Gaussians(train=600), "independent")


def test_samples_that_change_between_epochs_are_refused(noisy, tmp_path):
    data = Gaussians(train=600)
    train_dataloader = data.train_dataloader

    def changing():
        loader = train_dataloader()
        if data.trainer is not None and data.trainer.current_epoch:
            loader = DataLoader([(x + 1, y) for x, y in loader.dataset], 128)
        return loader

    data.train_dataloader = changing
    with pytest.raises(RunError, match="A dataset must not change between epochs"):
        fit(Own(noisy[1]), LossMixing(SOON, folder=tmp_path), data, reload_dataloaders_every_n_epochs=1)


def test_a_fit_that_a_trainer_goes_on_with_keeps_its_weights(noisy, tmp_path):
    callback, module, seen = LossMixing(SOON, folder=tmp_path), Own(noisy[1]), []
    trainer = fit(module, callback, noisy[0], Hook(on_train_start=lambda *_: seen.append(callback.mix.clone())))
    learned = callback.mix.clone()
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, datamodule=noisy[0])
    assert torch.equal(seen[1], learned)
    assert [row["epoch"] for row in callback.history] == [1, 2, 3]


def test_a_rehearsal_writes_nothing_and_a_validation_changes_nothing(noisy, tmp_path):
    fit(Own(noisy[1]), LossMixing(SOON, folder=tmp_path), noisy[0], fast_dev_run=True)
    assert not list(tmp_path.iterdir())
    callback, module = LossMixing(SOON, folder=tmp_path), Own(noisy[1])
    trainer = fit(module, callback, noisy[0], epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback.mix += 1
    learned = callback.mix.clone()
    trainer.validate(module, noisy[0], ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(callback.mix, learned)


def test_the_look_ahead_has_the_rate_of_the_last_layer(noisy):
    module = Own(noisy[1])
    others = [p for p in module.parameters() if p is not module.last_layer.weight]
    groups = [{"params": others, "lr": 1e-3}, {"params": [module.last_layer.weight], "lr": 0.5}]
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(groups)])
    assert _learning_rate(trainer, module) == 0.5
    assert _learning_rate(SimpleNamespace(optimizers=[torch.optim.SGD(others, 0.1)]), module) == 0.1


@pytest.mark.filterwarnings("ignore:LossMixing learns no weights")
@pytest.mark.parametrize("own", [{}, {"sample_weights": None}], ids=str)
@pytest.mark.parametrize("ends", [True, False])
def test_weights_end_with_their_fit(noisy, tmp_path, own, ends):
    """They are those of its samples, and the next fit may have others."""
    module, seen = Own(noisy[1]), []
    vars(module).update(own)

    def look(_, module):
        seen.append(module.sample_weights([0]))
        if not ends:
            raise ZeroDivisionError

    with nullcontext() if ends else pytest.raises(ZeroDivisionError):
        fit(module, LossMixing(SOON, folder=tmp_path), noisy[0], Hook(on_train_batch_start=look), epochs=1)
    assert seen
    assert {key: value for key, value in vars(module).items() if key == "sample_weights"} == own


def test_a_second_fit_of_an_instance_starts_anew(noisy, tmp_path):
    callback, starts = LossMixing(SOON, folder=tmp_path), []
    look = Hook(on_train_start=lambda *_: starts.append(callback.mix.clone()))
    for _ in range(2):
        fit(Own(noisy[1]), callback, noisy[0], look, epochs=2)
        assert [row["epoch"] for row in callback.history] == [1]
    assert torch.equal(*starts)


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ({"last_layer": None}, "`Own.last_layer` to be the nn.Linear that outputs the logits, got NoneType"),
        ({"teacher_logits": None}, r"to define `teacher_logits\(x, index\)`"),
        ({"temperature": 0}, "`Own.temperature` to be > 0, got 0"),
        ({"forward": lambda x: torch.zeros(len(x), 20)}, "to be the student's logits"),
    ],
)
def test_a_module_that_lacks_something_is_told_before_training(noisy, tmp_path, lacks, message):
    module = Own(noisy[1])
    for name, value in lacks.items():
        object.__setattr__(module, name, value) if name != "last_layer" else setattr(module, name, value)
    with pytest.raises(UserError, match=message):
        fit(module, LossMixing(SOON, folder=tmp_path), noisy[0])
    assert len(next(iter(noisy[0].train_dataloader()))) == 2
    assert not module.indices


def test_loaders_without_a_data_module_are_refused(noisy, tmp_path):
    loader = DataLoader(TensorDataset(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(UserError, match="expects a data module, got loaders"):
        make_trainer(LossMixing(SOON, folder=tmp_path)).fit(Own(noisy[1]), loader, loader)


# ---- a boosting run


def test_a_boosting_run_mixes_labels_into_its_targets(tmp_path):
    seen = []

    def look(trainer, module):
        mixing = next(c for c in trainer.callbacks if isinstance(c, LossMixing))
        index = np.arange(6)
        g, s = module.ledger.rows(index)
        y = mixing._labels[:6]
        target, error = module.mix(g, s, y, index)
        share = mixing.mix[index]
        labels = torch.nn.functional.one_hot(y, 4) * (4 / 3**0.5) - 1 / 3**0.5
        torch.testing.assert_close(target, share * g + (1 - share) * labels)
        torch.testing.assert_close(error, s + module.number * (g - target))
        total = torch.cat([module.mix(*module.ledger.rows(i), mixing._labels[i], i)[1] for i in [np.arange(192)]])
        scaled = module.settings.eta * total.double()
        torch.testing.assert_close(module.game.log_z, (scaled.exp() + (-scaled).exp()).sum(0).log().float())
        seen.append((module.number, mixing.history[-1]["label_weight"], share[:, 0].tolist()))

    def callbacks():
        return [LossMixing(SOON), Hook(on_train_end=look)]

    data = LabelNoise(Toys(), rate=0.3)
    controller = boost(tmp_path / "run", data, callbacks=callbacks, settings=settings_for(2), trainer={"epochs": 3})
    assert [number for number, _, _ in seen] == [0, 1]
    assert seen[0][2] != seen[1][2]
    assert len(controller.ensemble) == 2
    assert list((tmp_path / "run/mixing").glob("mixing.001.*"))
    plain = boost(tmp_path / "plain", LabelNoise(Toys(), rate=0.3), settings=settings_for(2), trainer={"epochs": 3})
    assert digests(plain.run.root)["000"] != digests(controller.run.root)["000"]
    record = json.loads((tmp_path / "run/rounds/001/round.json").read_text())
    assert record["curve"]["val_accuracy"] > 0.3


def test_a_run_that_goes_on_between_rounds_learns_the_same_weights(tmp_path):
    """More samples than a group has: the order of groups counts."""

    def run(folder, stop=False):
        controller, data, callback = control(tmp_path / folder, settings=settings_for(2)), Toys(train=600), None
        for module in controller.rounds(data):
            if stop and module.number == 1:
                break
            callback = callback or LossMixing(SOON)  # one for all rounds
            make_trainer(callback, controller).fit(module, data, ckpt_path=controller.ckpt_path)

    run("whole")
    run("parts", stop=True)
    run("parts")
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


def test_a_run_cut_after_the_last_epoch_of_a_round_learns_the_same_weights(tmp_path):
    def run(folder, cut=False):
        def leave(trainer, module):
            if cut and module.number == 0:
                raise Killed

        callbacks = lambda: [Hook(on_train_end=leave), LossMixing(SOON)]  # noqa: E731
        boost(tmp_path / folder, Toys(), settings=settings_for(2), callbacks=callbacks, trainer={"epochs": 3})
        return {file.name: file.read_bytes() for file in (tmp_path / folder / "mixing").glob("*.f32")}

    whole = run("whole")
    with pytest.raises(Killed):
        run("cut", cut=True)
    assert run("cut") == whole
    assert sorted(whole) == ["mixing.000.f32", "mixing.001.f32"]
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_boosting_run_takes_weights_that_sum_to_one(tmp_path):
    controller = RoundController(tmp_path, teacher=make_teacher(), student=make_student, settings=settings_for(1))
    module = next(iter(controller.rounds(data := Toys())))
    with pytest.raises(UserError, match="'convex' in a boosting run"):
        make_trainer(LossMixing(MixingSettings()), controller).fit(module, data)


def test_independent_students_have_no_error_to_mix_labels_into(tmp_path):
    settings = settings_for(1, ladder=[Rung(0)], independent=True)
    with pytest.raises(UserError, match="got independent=True"):
        boost(tmp_path, settings=settings, callbacks=lambda: [LossMixing(SOON)])


def test_a_first_sample_without_a_label_is_named_at_the_start(tmp_path):
    data = Toys()
    data.parts["train"] = (data.parts["train"][0], torch.where(torch.arange(192) == 0, -100, data.parts["train"][1]))
    with pytest.raises(UserError, match=r"sample 0 of `train_dataloader\(\)` has none"):
        boost(tmp_path, data, settings=settings_for(1), callbacks=lambda: [LossMixing(SOON)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: torch.where(torch.arange(len(y)) == 3, -100, y), r"sample 3 of `val_dataloader\(\)` has none"),
        (lambda y: nn.functional.one_hot(y, 4).float(), r"Expected class numbers in `val_dataloader\(\)`"),
    ],
)
def test_validation_labels_that_cannot_be_mixed_are_named_at_the_start(tmp_path, change, message):
    data = Toys()
    data.parts["val"] = (data.parts["val"][0], change(data.parts["val"][1]))
    with pytest.raises(UserError, match=message):
        boost(tmp_path, data, settings=settings_for(1), callbacks=lambda: [LossMixing(SOON)])
    assert not list(digests(tmp_path))


def test_a_sampler_draws_other_samples_in_each_epoch(tmp_path):
    class Data(Toys):
        def train_dataloader(self):
            dataset = TensorDataset(*self.parts["train"])
            sampler = WeightedRandomSampler(torch.ones(192), 64, generator=torch.Generator().manual_seed(0))
            return DataLoader(dataset, batch_size=64, sampler=sampler)

    batches = Batches()
    fit(Distillation(make_student(0), make_teacher()), LossMixing(SOON, folder=tmp_path), Data(), batches)
    assert len({tuple(index.tolist()) for *_, index in batches.seen}) == 3


def test_figures_are_of_the_samples_that_are_trained_on(tmp_path):
    data = Gaussians(rate=0.4, train=400)
    rows = torch.arange(0, 400, 4)
    data.train_dataloader = lambda: DataLoader(data.train, batch_size=50, sampler=SubsetRandomSampler(rows.tolist()))
    callback = LossMixing(SOON, folder=tmp_path)
    fit(Distillation(mlp(16), trained_teacher(data, epochs=2)), callback, data)
    weights, flipped = callback.weights()[rows, 0], data.train.flipped[rows]
    last = callback.history[-1]
    assert last["label_weight"] == pytest.approx(float(weights.mean()))
    assert last["clean"] == pytest.approx(float(weights[~flipped].mean()))
    assert last["flipped"] == pytest.approx(float(weights[flipped].mean()))


@pytest.mark.parametrize(("warmup", "warned"), [(3, True), (2, False)])
def test_a_fit_that_ends_before_the_first_update_is_warned_of(tmp_path, warmup, warned):
    callback = LossMixing(MixingSettings(mode="convex", warmup=warmup, every=1, inner=2), folder=tmp_path)
    with (
        pytest.warns(UserWarning, match=r"learns no weights in this fit \(max_epochs=3\)") if warned else nullcontext()
    ):
        fit(Distillation(make_student(0), make_teacher()), callback, Toys())
    assert bool(callback.history) is not warned


class Unweighted(Distillation):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return nn.functional.cross_entropy(self(x), y)


class Late(Distillation):
    """Uses the weights from the second epoch on, in which they are learned."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return (
            super().training_step(batch, batch_idx) if self.current_epoch else nn.functional.cross_entropy(self(x), y)
        )


def test_a_module_may_use_the_weights_once_they_are_learned(tmp_path):
    mixing = LossMixing(SOON, folder=tmp_path)
    fit(Late(nn.Linear(8, 4), teacher=make_teacher()), mixing, Toys())
    assert [row["epoch"] for row in mixing.history] == [1, 2]


def test_a_module_that_does_not_use_the_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"step of Unweighted to weight its losses by `self\.sample_weights\(index\)`"):
        fit(Unweighted(nn.Linear(8, 4), teacher=make_teacher()), LossMixing(SOON, folder=tmp_path), Toys())
