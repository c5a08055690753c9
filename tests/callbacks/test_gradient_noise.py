"""GradientNoise in real fits: what it reports, that it leaves no trace, and that a run follows it."""

import hashlib
import json
import pickle
import random

import lightning as L
import numpy as np
import pytest
import torch
from helpers.gaussians import Gaussians, mlp, trained_teacher
from helpers.toys import Batches, Hook, Toys, boost, digests, make_student, make_trainer, settings_for
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from bdistil import UserError
from bdistil.callbacks import GradientNoise, LossMixing
from bdistil.distillation import MixingSettings
from bdistil.distillation.module import Distillation, generations
from bdistil.functional.distillation import kd_terms
from bdistil.functional.gradient_noise import gradient_moments, noise_to_signal, variance_at


@pytest.fixture(scope="module")
def noisy():
    data = Gaussians(rate=0.4, train=600)
    return data, trained_teacher(data, epochs=5)


def fit(module, data, *callbacks, epochs=2, **options):
    options = {"limit_val_batches": 0, "enable_checkpointing": False, **options}
    trainer = make_trainer(*callbacks, epochs=epochs, **options)
    trainer.fit(module, datamodule=data)
    return trainer


def state_hash(module):
    """Of all that a look must not change: weights, buffers, modes, and the state of every generator."""
    weights = [(name, value.numpy().tobytes()) for name, value in module.state_dict().items()]
    modes = [part.training for part in module.modules()]
    randomness = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    return hashlib.sha256(pickle.dumps((weights, modes, randomness))).hexdigest()


@pytest.mark.parametrize("full", [False, True])
def test_a_look_changes_nothing(noisy, full, tmp_path):
    hashes = []

    class Watched(GradientNoise):
        def measure(self, module):
            before = state_hash(module)
            found = super().measure(module)
            hashes.append((before, state_hash(module)))
            return found

    student = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 20))
    fit(Distillation(student, noisy[1]), noisy[0], Watched(every=1, full=full, samples=64, folder=tmp_path))
    assert len(hashes) == 3
    assert all(before == after for before, after in hashes)
    assert hashes[0][0] != hashes[1][0]  # training does change it


def test_a_fit_with_looks_is_the_one_without(noisy, tmp_path):
    def run(*callbacks):
        torch.manual_seed(0)
        module = Distillation(nn.Sequential(nn.Dropout(0.2), *mlp(8)), noisy[1])
        fit(module, noisy[0], *callbacks)
        return module

    with_looks, without = run(GradientNoise(every=1, folder=tmp_path)), run()
    for mine, theirs in zip(with_looks.parameters(), without.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_figures_equal_one_backward_a_sample(noisy, tmp_path):
    data, teacher = noisy
    module, callback = Distillation(nn.Linear(10, 20), teacher, temperature=2.0), GradientNoise(folder=tmp_path)
    full = GradientNoise(folder=tmp_path / "full", full=True, samples=600)
    callback.samples = 600
    fit(module, data, callback, full)
    x, y = data.train.dataset.tensors[0], data.train.labels
    g, k = [], []
    for row in range(600):
        terms = kd_terms(module(x[row : row + 1]), teacher(x[row : row + 1]), y[row : row + 1], temperature=2.0)
        for loss, found in ((terms.ce, g), (terms.kl, k)):
            gradients = torch.autograd.grad(loss.sum(), list(module.student.parameters()), retain_graph=True)
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    truth = gradient_moments(torch.stack(g), torch.stack(k), 600)
    for last in (callback.history[-1], full.history[-1]):
        assert last["v_gg"] == pytest.approx(truth.variance[0], rel=1e-5)
        assert last["v_gk"] == pytest.approx(truth.variance[2], rel=1e-5)
        assert last["nsr_teacher"] == pytest.approx(noise_to_signal(truth, 1.0), rel=1e-4)
    assert json.loads((tmp_path / "noise.json").read_text()) == callback.history
    assert (tmp_path / "noise.png").stat().st_size > 1000


def test_two_of_one_fit_keep_their_figures_apart(noisy, tmp_path):
    both = GradientNoise(folder=tmp_path, samples=64), GradientNoise(folder=tmp_path, samples=64, full=True)
    fit(Distillation(nn.Linear(10, 20), noisy[1]), noisy[0], *both)
    for callback, name in zip(both, ("noise", "noise_full"), strict=True):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == callback.history


def test_a_sampler_with_a_generator_of_the_data_module_draws_as_without_looks(noisy, tmp_path):
    class Data(Gaussians):
        generator = torch.Generator().manual_seed(0)

        def train_dataloader(self):
            sampler = WeightedRandomSampler(torch.ones(600), 64, generator=self.generator)
            return DataLoader(self.train, batch_size=32, sampler=sampler)

    def drawn(*callbacks):
        batches = Batches()
        Data.generator.manual_seed(0)
        fit(Distillation(nn.Linear(10, 20), noisy[1]), Data(train=600), batches, *callbacks)
        return torch.cat([x for x, _ in batches.seen])

    assert torch.equal(drawn(GradientNoise(every=1, samples=64, folder=tmp_path)), drawn())


def test_it_stands_beside_loss_mixing(noisy, tmp_path):
    data, teacher = noisy
    mixing = LossMixing(MixingSettings(warmup=1, every=1), folder=tmp_path / "mixing")
    noise = GradientNoise(every=1, folder=tmp_path)
    fit(Distillation(mlp(8), teacher), data, mixing, noise)
    assert [row["epoch"] for row in noise.history] == [0, 1, 2]


def test_auto_follows_the_suggestion(noisy, tmp_path, capsys, caplog):
    data, teacher = noisy
    module = Distillation(mlp(16), teacher, distillation_weight="auto")
    callback, used = GradientNoise(every=1, lowest=0.2, highest=0.6, folder=tmp_path), []
    fit(module, data, callback, Hook(on_train_batch_end=lambda trainer, module: used.append(module.weight)))
    followed = [row["suggested_weight"] for row in callback.history]
    assert used == [weight for weight in followed[:2] for _ in range(5)]
    assert all(0.2 <= weight <= 0.6 for weight in followed)
    assert "the teacher explains" in callback.history[0]["reason"]
    assert "GradientNoise sets distillation weight" in caplog.text + capsys.readouterr().err
    with pytest.raises(UserError, match="follows the GradientNoise callback, which this Trainer lacks"):
        fit(Distillation(mlp(16), teacher, distillation_weight="auto"), data)


@pytest.mark.parametrize(("lowest", "highest", "expected"), [(0.0, 0.05, 0.05), (0.9, 0.95, 0.9)])
def test_a_followed_weight_is_clipped(noisy, tmp_path, lowest, highest, expected):
    module = Distillation(mlp(16), noisy[1], distillation_weight="auto")
    callback = GradientNoise(every=1, lowest=lowest, highest=highest, folder=tmp_path)
    fit(module, noisy[0], callback, epochs=1)
    assert [row["suggested_weight"] for row in callback.history] == [expected, expected]
    assert module.weight == expected


def test_weight_grows_by_a_factor_an_epoch(noisy):
    used = []
    module = Distillation(mlp(8), noisy[1], distillation_weight=0.2, weight_factor=2.0)
    fit(module, noisy[0], Hook(on_train_epoch_end=lambda trainer, module: used.append(module.weight)), epochs=3)
    assert used == pytest.approx([0.2, 0.4, 0.8])


def test_unbiased_distillation_has_the_labels_gradient_on_average(noisy):
    """SVRG: over the whole training part the teacher's pull and its correction cancel, whatever the weight."""
    data, teacher = noisy
    x, y = data.train.dataset.tensors[0], data.train.labels
    found = {}

    def look(trainer, module):
        loss = module.training_step((x, y), 0)
        gradients = torch.autograd.grad(loss, list(module.student.parameters()))
        terms = kd_terms(module(x), teacher(x), y, temperature=module.temperature)
        labels = torch.autograd.grad(terms.ce.mean(), list(module.student.parameters()))
        found[module.unbiased] = [float((a - b).abs().max()) for a, b in zip(gradients, labels, strict=True)]

    for unbiased in (True, False):
        module = Distillation(mlp(8), teacher, distillation_weight=0.9, unbiased=unbiased)
        fit(module, data, Hook(on_train_batch_start=look), epochs=2, limit_train_batches=1)  # a snapshot an epoch
    assert max(found[True]) < 1e-5
    assert max(found[False]) > 1e-2


def test_repeated_self_distillation_learns_from_the_student_before(noisy):
    data, first = noisy
    teachers = []
    for module in generations(lambda: mlp(8), first, 3, distillation_weight=0.5):
        teachers.append(module.teachers[0].module)
        fit(module, data, epochs=1)
    assert teachers[0] is first
    assert [len(teacher[0].weight) for teacher in teachers] == [128, 8, 8]
    assert not any(p.requires_grad for p in teachers[2].parameters())


def test_a_sparse_student_is_one_of_lightnings_pruning(noisy, tmp_path):
    module, callback = Distillation(mlp(32), noisy[1]), GradientNoise(every=1, folder=tmp_path)
    pruning = ModelPruning(
        "l1_unstructured", [(module.student[0], "weight")], amount=0.9, use_lottery_ticket_hypothesis=False
    )
    fit(module, noisy[0], pruning, callback, epochs=1)
    assert float((module.student[0].weight == 0).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert callback.history[-1]["v_gg"] > 0


def test_cosine_of_a_teacher_of_the_same_architecture(noisy, tmp_path):
    module = Distillation(nn.Linear(10, 20), nn.Linear(10, 20), temperature=1.0)
    callback = GradientNoise(cosine=True, folder=tmp_path)
    fit(module, noisy[0], callback, epochs=1)
    assert callback.history[-1]["cosine"] == pytest.approx(1.0, abs=1e-4)


def test_cosine_of_a_module_without_a_teacher_of_its_own_is_refused(noisy, tmp_path):
    class Own(L.LightningModule):
        """Has all that the other figures need."""

        def __init__(self):
            super().__init__()
            self.last_layer, self.temperature = nn.Linear(10, 20), 4.0

        def forward(self, x):
            return self.last_layer(x)

        def teacher_logits(self, x, index):
            return noisy[1](x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            """Lightning asks for one where there is validation data."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(UserError, match=r"`cosine` of GradientNoise to be off, or a .*Distillation.*, got a Own"):
        fit(Own(), noisy[0], GradientNoise(cosine=True, folder=tmp_path), epochs=1)
    fit(Own(), noisy[0], GradientNoise(folder=tmp_path), epochs=1)


@pytest.mark.parametrize("options", [{"every": 0}, {"samples": 1}, {"lowest": 0.5, "highest": 0.4}, {"step": 0.0}])
def test_arguments_are_checked(options):
    with pytest.raises(UserError, match="`samples` >= 2, 0 <= `lowest` <= `highest` <= 1 and `step` > 0"):
        GradientNoise(**options)


# ---- a boosting run


def test_a_round_reports_its_noise_without_and_with_the_game(tmp_path):
    seen = []

    def look(trainer, module):
        """By hand, of the head and the link: per-sample gradients of the squared error, and of the game's share."""
        index = np.arange(192)
        x, _ = module.train_part.loader.dataset.tensors
        g, error = module.ledger.rows(index)
        with torch.no_grad():
            module.student.eval()
            inputs = [module.student.features(x), torch.ones(192, 1)]
            inputs += module.train_part.linked(module._linked, index, module.device) if module.number else []
            deviation = module.answer(x, index, module.train_part) - g
            module.student.train()
        deviation.requires_grad_()
        (game,) = torch.autograd.grad(module.game.loss(deviation, error), deviation)
        a, plain = torch.cat(inputs, 1), 2 * deviation.detach() / 4
        outer = [(r[:, :, None] * a[:, None, :]).flatten(1) for r in (plain, 192 * game)]
        seen.append(gradient_moments(*outer, 192))

    callbacks = []

    def both():
        callbacks.append(GradientNoise(every=5, samples=192))
        return [Hook(on_train_end=look), callbacks[-1]]

    boost(tmp_path / "run", callbacks=both, settings=settings_for(2))
    for moments, callback in zip(seen, callbacks, strict=True):
        last = callback.history[-1]
        for name, weight in (("plain", 0.0), ("game", 1.0)):
            assert last[f"variance_{name}"] == pytest.approx(variance_at(moments, weight), rel=1e-4)
            assert last[f"nsr_{name}"] == pytest.approx(noise_to_signal(moments, weight), rel=1e-3)
    assert callbacks[1].history[-1]["variance_plain"] != callbacks[1].history[-1]["variance_game"]
    assert {path.name for path in (tmp_path / "run/noise").iterdir()} == {
        "noise.000.json", "noise.000.png", "noise.001.json", "noise.001.png"
    }  # fmt: skip
    boost(tmp_path / "plain", settings=settings_for(2))
    assert digests(tmp_path / "run") == digests(tmp_path / "plain")


def test_one_instance_for_all_rounds_reports_each_by_itself(tmp_path):
    noise = GradientNoise(every=5, samples=32)
    boost(tmp_path, callbacks=lambda: [noise], settings=settings_for(2), trainer={"epochs": 1})
    for number in range(2):
        rows = json.loads((tmp_path / f"noise/noise.{number:03d}.json").read_text())
        assert [row["epoch"] for row in rows] == [0, 1]


class Unlabelled(Toys):
    """x alone."""

    def train_dataloader(self):
        return DataLoader(self.parts["train"][0], batch_size=32)

    def val_dataloader(self):
        return DataLoader(self.parts["val"][0], batch_size=32)

    def test_dataloader(self):
        return DataLoader(self.parts["test"][0], batch_size=32)


def test_the_file_is_json_also_where_a_figure_is_undefined(tmp_path):
    """Without labels there is no loss against them; Python alone reads NaN."""
    noise = GradientNoise(every=5, samples=32)
    boost(
        tmp_path, Unlabelled(), callbacks=lambda: [noise], settings=settings_for(1, labels=None), trainer={"epochs": 1}
    )
    assert noise.history[0]["label_loss"] != noise.history[0]["label_loss"]

    def refuse(name):
        raise AssertionError(name)

    rows = json.loads((tmp_path / "noise/noise.000.json").read_text(), parse_constant=refuse)
    assert rows[0]["label_loss"] is None


class Curriculum(Toys):
    """From the second epoch on, x is ten times as large."""

    def train_dataloader(self):
        (x, y), epoch = self.parts["train"], self.trainer.current_epoch if self.trainer else 0
        return DataLoader(TensorDataset(x * (10 if epoch >= 1 else 1), y), 32)


def test_loaders_that_are_made_anew_give_the_samples_of_the_epoch(tmp_path):
    """Those of the first epoch were measured in all of them."""
    noise, module = GradientNoise(every=2, samples=64, folder=tmp_path), Distillation(nn.Linear(8, 4), nn.Linear(8, 4))
    fit(module, Curriculum(), noise, epochs=3, reload_dataloaders_every_n_epochs=1)
    x, y = Curriculum().parts["train"]
    losses = [nn.functional.cross_entropy(module(scale * x[::3]), y[::3]).item() for scale in (1, 10)]
    assert noise.history[-1]["label_loss"] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-2)


def test_a_boosting_run_has_the_last_layer_only(tmp_path):
    with pytest.raises(UserError, match="`full` and `cosine` of GradientNoise to be off in a boosting run"):
        boost(tmp_path, Toys(), callbacks=lambda: [GradientNoise(full=True)], student=make_student)


@pytest.mark.filterwarnings("ignore:.*checkpoint")
def test_figures_of_a_fit_that_is_resumed_after_its_end_are_written(noisy, tmp_path):
    def run(folder):
        saved, noise = ModelCheckpoint(tmp_path, save_last=True), GradientNoise(every=1, samples=64, folder=folder)
        last = tmp_path / "last.ckpt"
        trainer = make_trainer(noise, saved, epochs=2, limit_val_batches=0)
        trainer.fit(Distillation(nn.Linear(10, 20), noisy[1]), noisy[0], ckpt_path=last if last.exists() else None)
        return json.loads((folder / "noise.json").read_text())

    first, again = run(tmp_path / "first"), run(tmp_path / "again")
    assert again == first[:-1]  # the checkpoint was saved before the measurement at the end


class Nobody(Toys):
    """No sample has a label."""

    def train_dataloader(self):
        x, y = self.parts["train"]
        return DataLoader(TensorDataset(x, torch.full_like(y, -100)), 32)


def test_without_labels_there_is_no_weight(tmp_path):
    """It would be 0, with which nothing is trained."""
    module = Distillation(nn.Linear(8, 4), nn.Linear(8, 4), distillation_weight="auto")
    with pytest.raises(UserError, match=r"got none in the samples that GradientNoise measures\. Give"):
        fit(module, Nobody(), GradientNoise(every=1, samples=64, folder=tmp_path), epochs=1)
