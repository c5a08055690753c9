"""What the callbacks of distillation read: the x, the samples and the loss with which the student is trained."""

import lightning as L
import numpy as np
import pytest
import torch
from helpers.toys import TRAIN, Hook, Noisy, Toys, boost, make_teacher, make_trainer, settings_for
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from bdistil import Rung, UserError
from bdistil.callbacks import GradientNoise, LossMixing
from bdistil.distillation import Distillation, MixingSettings
from bdistil.distillation.gradient_noise import spread_batches
from bdistil.distillation.probes import RoundProbe
from bdistil.utils.modules import eval_mode

X, Y = torch.randn(96, 6, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 3
SOON = MixingSettings(warmup=0, every=1, inner=1)


class Data(L.LightningDataModule):
    """Parts and samplers of any kind."""

    def __init__(self, train=None, sampler=None, y=Y):
        super().__init__()
        self.train, self.sampler, self.whole = train, sampler, TensorDataset(X, y)

    def train_dataloader(self):
        data = self.train() if self.train else self.whole
        return DataLoader(data, batch_size=16, shuffle=self.sampler is None, sampler=self.sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(X, Y), batch_size=32)


def fit(data, *callbacks, module=None, **options):
    options = {"epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0, **options}
    module = module or Distillation(nn.Linear(6, 3), nn.Linear(6, 3))
    make_trainer(*callbacks, **options).fit(module, datamodule=data)
    return module


@pytest.fixture(params=["noise", "mixing"])
def callback(request, tmp_path):
    made = {"noise": GradientNoise(every=1, samples=96, folder=tmp_path), "mixing": LossMixing(SOON, folder=tmp_path)}
    return made[request.param]


# ---- a boosting run


@pytest.mark.parametrize("settings", [{"views": 2}, {"state": "recompute"}], ids=str)
def test_x_of_a_probe_is_the_one_that_its_target_and_error_are_of(tmp_path, settings):
    teacher, seen = make_teacher(), []

    def look(trainer, module):
        probe = RoundProbe(module)
        for validation, part in ((False, module.train_part), (True, module.val_part)):
            x, _, index = next(probe.batches([list(range(20))], validation=validation))
            with torch.no_grad():
                again = module.ledger.units.inward(teacher.eval()(x))
            torch.testing.assert_close(again, part.ledger.rows(index)[0], rtol=1e-4, atol=1e-5)
            seen.append(module.number)

    data = Toys(noisy=True)
    data.val_dataloader = lambda: DataLoader(Noisy(*data.parts["val"]), batch_size=32)
    boost(
        tmp_path,
        data,
        teacher=teacher,
        callbacks=lambda: [Hook(on_train_start=look)],
        settings=settings_for(2, **settings),
    )
    assert seen == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "settings",
    [{"loss": "prefix_kl"}, {"loss": "prefix_kl+game"}, {"loss": "residual"}, {"independent": True}],
    ids=str,
)
def test_the_noise_of_a_round_is_that_of_the_loss_it_is_trained_with(tmp_path, settings):
    seen = []

    def look(trainer, module):
        """By hand: gradients of the loss of a training step on all samples."""
        index = np.arange(TRAIN)
        x, _ = module.train_part.loader.dataset.tensors
        g, error = module.ledger.rows(index)
        with eval_mode(module), torch.no_grad():
            inputs = torch.cat([module.student.features(x), torch.ones(TRAIN, 1)], 1)
            deviation = module.answer(x, index, module.train_part) - g
        deviation.requires_grad_()
        error = torch.zeros_like(error) if module.settings.independent else error
        (slope,) = torch.autograd.grad(TRAIN * module.loss(deviation, error, g), deviation)
        seen.append(float((slope[:, :, None] * inputs[:, None]).flatten(1).var(0).sum()))

    noises = []

    def both():
        noises.append(GradientNoise(every=5, samples=TRAIN))
        return [Hook(on_train_end=look), noises[-1]]

    boost(tmp_path, callbacks=both, settings=settings_for(2, ladder=[Rung(0)], **settings), trainer={"epochs": 1})
    found = [noise.history[-1]["variance_game"] for noise in noises]
    assert found == pytest.approx(seen, rel=1e-3)


# ---- samples


def test_data_that_are_drawn_anew_are_refused(callback):
    data = Data(lambda: random_split(TensorDataset(X, Y), [80, 16])[0])
    with pytest.raises(UserError, match=r"`train_dataloader\(\)` to give the same samples at each call.*manual_seed"):
        fit(data, callback)
    seeded = Data(lambda: random_split(TensorDataset(X, Y), [80, 16], torch.Generator().manual_seed(0))[0])
    fit(seeded, callback)


def test_samples_are_those_that_the_training_sampler_gives(callback):
    chosen = list(range(0, 60, 2))
    fit(Data(sampler=SubsetRandomSampler(chosen)), callback)
    assert sorted(number for batch in spread_batches(callback.probe, 96) for number in batch[2]) == chosen
    if isinstance(callback, LossMixing):
        first = torch.tensor([0.1, 0.9])
        moved = (callback.mix != first).any(1).nonzero().flatten()
        assert set(moved.tolist()) <= set(chosen)
        assert len(moved) > 20
        assert callback.mix.shape == (96, 2)


@pytest.mark.parametrize(
    "sampler", [WeightedRandomSampler(torch.arange(96.0), 60), RandomSampler(X, num_samples=40)], ids=["some", "alike"]
)
def test_all_samples_count_where_the_sampler_chooses_anew(callback, sampler):
    fit(Data(sampler=sampler), callback)
    assert len(callback.probe.rows) == 96


# ---- what comes between loader and student


class Hooked(Data):
    def on_after_batch_transfer(self, batch, number):
        x, *rest = batch
        return [x / 10, *rest]


class HookedModule(Distillation):
    on_after_batch_transfer = Hooked.on_after_batch_transfer


def test_hooks_that_change_batches_are_refused(callback):
    with pytest.raises(UserError, match=r"`Hooked\.on_after_batch_transfer` changes batches"):
        fit(Hooked(), callback)
    with pytest.raises(UserError, match=r"`HookedModule\.on_after_batch_transfer` changes batches"):
        fit(Data(), callback, module=HookedModule(nn.Linear(6, 3), nn.Linear(6, 3)))


def test_hooks_that_change_nothing_get_the_batches_of_a_fit(tmp_path):
    class Unpacks(Data):
        def on_after_batch_transfer(self, batch, number):
            x, y = batch
            return x, y

    fit(Unpacks(), GradientNoise(folder=tmp_path))
    with pytest.raises(UserError, match=r"fails on a batch \(x, y, index\)"):
        fit(Unpacks(), LossMixing(SOON, folder=tmp_path))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_that_convert_weights_are_refused(callback, precision):
    with pytest.raises(UserError, match=f"`precision` of the Trainer.*got '{precision}'"):
        fit(Data(), callback, precision=precision)
    fit(Data(), callback, precision="bf16-mixed")


class Augmented(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + torch.randn(6), int(Y[index])


def test_a_look_draws_nothing_from_the_fit(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        return fit(Data(Augmented), *callbacks, epochs=2).student.weight

    assert torch.equal(weights(GradientNoise(every=1, folder=tmp_path)), weights())


def test_a_look_of_loss_mixing_draws_nothing_from_the_fit(tmp_path):
    states = []

    class Watched(LossMixing):
        def on_train_start(self, trainer, module):
            states.append(torch.get_rng_state())
            super().on_train_start(trainer, module)
            states.append(torch.get_rng_state())

        def on_train_epoch_start(self, trainer, module):
            states.append(torch.get_rng_state())
            super().on_train_epoch_start(trainer, module)
            states.append(torch.get_rng_state())

    fit(Data(Augmented), Watched(SOON, folder=tmp_path))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[3])


# ---- labels


class Mappings(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"a": X[index], "target": int(Y[index])}


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x["a"])


def test_labels_have_the_key_of_the_module(callback):
    data = Data(Mappings)
    data.val_dataloader = lambda: DataLoader(Mappings(), batch_size=32)
    fit(data, callback, module=Distillation(Read(), Read(), labels="target"))
    assert len(callback.probe.rows) == 96
    assert callback.history


def test_samples_without_a_label_have_no_label_gradient(tmp_path):
    y = torch.where(torch.arange(96) % 4 == 0, Y, -100)
    noise = GradientNoise(every=1, samples=96, folder=tmp_path)
    module = Distillation(nn.Linear(6, 3), nn.Linear(6, 3), lr=0.0, weight_decay=0.0)
    fit(Data(y=y), noise, module=module)
    with torch.no_grad():
        residual = (module(X).softmax(-1) - nn.functional.one_hot(Y, 3)) * (y >= 0)[:, None]
    gradients = (residual[:, :, None] * torch.cat([X, torch.ones(96, 1)], 1)[:, None]).flatten(1)
    assert noise.history[0]["v_gg"] == pytest.approx(float(gradients.var(0).sum()), rel=1e-4)
    with torch.no_grad():
        entropy = nn.functional.cross_entropy(module(X), y)  # of the labelled samples
    assert noise.history[0]["label_loss"] == pytest.approx(float(entropy), rel=1e-4)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.where(torch.arange(96) == 5, -100, Y), r"sample 5 of `train_dataloader\(\)` has none"),
        (nn.functional.one_hot(Y, 3).float(), r"class numbers in `train_dataloader\(\)` beside LossMixing"),
    ],
)
def test_labels_that_cannot_be_mixed_are_refused_before_training(tmp_path, y, message):
    steps = Hook(on_sanity_check_start=lambda *_: pytest.fail("it began"))
    with pytest.raises(UserError, match=message):
        fit(Data(y=y), LossMixing(SOON, folder=tmp_path), steps, limit_val_batches=1)


# ---- all parameters


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.net(x.view(len(x), 3, 2))[0][:, -1])


def test_what_torch_cannot_vectorise_is_refused_before_training(tmp_path):
    steps = Hook(on_train_batch_start=lambda *_: pytest.fail("it began"))
    with pytest.raises(UserError, match="`full` and `cosine` of GradientNoise to be off"):
        fit(Data(), GradientNoise(full=True, folder=tmp_path), steps, module=Distillation(Recurrent(), Recurrent()))


def test_frozen_parameters_do_not_count_and_x_may_be_a_mapping(tmp_path):
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x["a"]).tanh())

    data = Data(Mappings)
    last, full = (GradientNoise(full=full, every=1, samples=96, folder=tmp_path) for full in (False, True))
    fit(data, last, full, module=Distillation(Body(), Read(), labels="target"))
    assert full.history[0]["v_gg"] == pytest.approx(last.history[0]["v_gg"], rel=1e-4)


def test_a_cosine_of_a_student_that_is_frozen_in_part(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    student = net()
    student[0].requires_grad_(False)
    noise = GradientNoise(cosine=True, folder=tmp_path)
    fit(Data(), noise, module=Distillation(student, net()))
    assert -1 <= noise.history[0]["cosine"] <= 1


def test_a_compiled_student_is_measured(callback):
    """Code compiled by the validation, for batches of the same size, does not see a hook that comes later."""
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    student.compile(backend="eager")
    fit(Data(), callback, module=Distillation(student, nn.Linear(6, 3)), epochs=2, limit_val_batches=1.0)
    assert len(callback.history) >= 2
