"""Distillation without boosting: the loss by hand, in full and in mixed precision, and what is kept of it."""

import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.toys import Hook, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, WeightedRandomSampler

from bdistil.callbacks import GradientNoise, LossMixing
from bdistil.distillation.module import Distillation
from bdistil.errors import UserError
from bdistil.functional.distillation import kd_terms

TAU = 2.0


@pytest.fixture
def batch():
    return torch.randn(16, 6), torch.randint(0, 4, (16,))


def by_hand(logits, teachers, y, weight):
    """(1 - w) CE + w tau^2 KL(teacher || student), the KL of several teachers being their mean."""
    soft = (logits / TAU).log_softmax(-1)
    kl = [(((t / TAU).softmax(-1) * ((t / TAU).log_softmax(-1) - soft)).sum(-1) * TAU**2).mean() for t in teachers]
    return (1 - weight) * F.cross_entropy(logits, y) + weight * torch.stack(kl).mean()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2])
def test_the_loss_is_the_mix_of_labels_and_teachers(batch, weight, count):
    student, teachers = nn.Linear(6, 4), [nn.Linear(6, 4) for _ in range(count)]
    module = Distillation(student, teachers, distillation_weight=weight, temperature=TAU)
    expected = by_hand(student(batch[0]), [teacher(batch[0]) for teacher in teachers], batch[1], weight)
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_softmax_and_losses_are_float32_in_mixed_precision(batch):
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    module = Distillation(student, teacher, temperature=TAU)
    with torch.autocast("cpu", torch.bfloat16):
        logits, goal = student(batch[0]), teacher(batch[0])
        assert logits.dtype is torch.bfloat16
        loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, by_hand(logits.float(), [goal.float()], batch[1], 0.9), rtol=1e-6, atol=0)
    double = Distillation(nn.Linear(6, 4).double(), nn.Linear(6, 4).double())
    assert double(batch[0].double()).dtype is torch.float64


class Summed(nn.Linear):
    """Reads mappings."""

    def forward(self, x):
        return super().forward(x["a"] + x["b"])


@pytest.mark.parametrize("unbiased", [False, True])
def test_batches_may_be_mappings_with_a_key_for_the_labels(unbiased):
    torch.manual_seed(0)
    a, b, y = torch.randn(24, 6), torch.randn(24, 6), torch.randint(0, 4, (24,), dtype=torch.int32)
    student, teacher = Summed(6, 4), Summed(6, 4)
    module = Distillation(student, teacher, distillation_weight=0.3, temperature=TAU, unbiased=unbiased, labels="y")
    plain = Distillation(nn.Linear(6, 4), nn.Linear(6, 4), distillation_weight=0.3, temperature=TAU, unbiased=unbiased)
    plain.load_state_dict(module.state_dict())
    plain.teachers[0].module.load_state_dict(teacher.state_dict())
    pairs = [(row, number) for row, number in zip(a + b, y.long(), strict=True)]
    mappings = [{"a": a[n], "b": b[n], "y": y[n]} for n in range(24)]
    found = []
    for one, data in ((module, mappings), (plain, pairs)):
        trainer = make_trainer(enable_checkpointing=False)
        trainer.fit(one, DataLoader(data, 8), DataLoader(data, 8))
        found.append(trainer.callback_metrics)
    torch.testing.assert_close(module.student.weight, plain.student.weight)
    assert found[0] == found[1]
    assert set(found[0]) == {"val_accuracy", "val_loss"}


def test_teachers_that_answer_with_probabilities_are_told_once(batch):
    soft = nn.Sequential(nn.Linear(6, 4), nn.Softmax(-1))
    for teachers, told in ((soft, 1), ([nn.Linear(6, 4), soft], 1), (nn.Linear(6, 4), 0)):
        module = Distillation(nn.Linear(6, 4), teachers)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(2):
                module.training_step(batch, 0)
        assert sum("look like probabilities" in str(warning.message) for warning in found) == told


@pytest.mark.parametrize("weights", [torch.ones(16), np.ones(16)], ids=["tensor", "array"])
def test_weights_of_samples_are_refused_and_an_index_is_not(batch, weights):
    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4))
    with pytest.raises(UserError, match="third part of real numbers"):
        module.training_step((*batch, weights), 0)
    for index in (np.arange(16), [f"{number}.png" for number in range(16)]):
        torch.testing.assert_close(module.training_step((*batch, index), 0), module.training_step(batch, 0))


def test_batches_of_three_tensors_are_a_warning(batch):
    """Of (x, lengths, y), the lengths are taken for the labels."""
    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4))
    with pytest.warns(
        UserWarning, match=r"takes the second of 3 parts of a batch for the labels.*\(\(x, lengths\), y\)"
    ):
        module.training_step((*batch, torch.arange(16)), 0)
    module.training_step((*batch, torch.arange(16)), 1)  # said once


def test_teachers_are_frozen_and_in_no_checkpoint():
    teacher = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    module = Distillation(nn.Linear(6, 4), teacher).train()
    assert {name.split(".")[0] for name in module.state_dict()} <= {"student", "last_layer"}
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_weight_that_auto_has_come_to_is_kept():
    module, again = (Distillation(nn.Linear(6, 4), nn.Linear(6, 4), distillation_weight="auto") for _ in range(2))
    module.weight, checkpoint = 0.37, {}
    module.on_save_checkpoint(checkpoint)
    again.on_load_checkpoint(checkpoint)
    assert again.weight == 0.37


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_weight": 1.1}, r"`distillation_weight` to be in 0 … 1, or 'auto', got 1\.1"),
        ({"distillation_weight": "much"}, "got 'much'"),
        ({"temperature": 0.0}, r"`temperature` > 0, got 1\.0 and 0\.0"),
        ({"weight_factor": -1.0}, r"`weight_factor` .*got -1\.0"),
        ({"weight_factor": 2.0, "distillation_weight": "auto"}, r"`weight_factor` = 1 with .*got 2\.0"),
        ({"teacher": []}, "got an empty list"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        Distillation(nn.Linear(6, 4), **{"teacher": nn.Linear(6, 4), **options})


# ---- the mean control variate


def data_of(count=24):
    torch.manual_seed(0)
    return [(row, int(number)) for row, number in zip(3 + torch.randn(count, 6), torch.arange(count) % 4, strict=True)]


def unbiased_fit(student, loader, *callbacks, **options):
    module = Distillation(student, nn.Linear(6, 4), temperature=TAU, unbiased=True, lr=1e-9)
    trainer = make_trainer(*callbacks, epochs=1, enable_checkpointing=False, limit_val_batches=0, **options)
    trainer.fit(module, loader, DataLoader(data_of(), 24))
    return module


@pytest.mark.parametrize(
    "loader",
    [
        lambda data: DataLoader(data, 8, sampler=WeightedRandomSampler(torch.arange(1.0, 25.0), 24)),
        lambda data: DataLoader(data, 8, sampler=SubsetRandomSampler(range(10))),
    ],
)
def test_a_mean_over_samples_that_are_not_drawn_alike_is_refused(loader):
    with pytest.raises(UserError, match=r"to read each sample once an epoch.*unbiased"):
        unbiased_fit(nn.Linear(6, 4), loader(data_of()))


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"limit_train_batches": 2}])
def test_a_mean_over_samples_that_an_epoch_leaves_out_is_refused(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}=2"):
        unbiased_fit(nn.Linear(6, 4), DataLoader(data_of(), 8), **options)


@pytest.mark.filterwarnings("ignore:.*`ckpt_path`", "ignore:You're resuming")
def test_a_fit_resumed_within_an_epoch_has_its_control_variate(tmp_path):
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4), unbiased=True)
    loader, val = DataLoader(data_of(), 8), DataLoader(data_of(), 24)
    make_trainer(saved, epochs=1).fit(module, loader, val)
    again, seen = Distillation(nn.Linear(6, 4), nn.Linear(6, 4), unbiased=True), []
    look = Hook(on_train_batch_end=lambda trainer, module, *_: seen.append(len(module._control)))
    trainer = make_trainer(look, epochs=1, enable_checkpointing=False)
    trainer.fit(again, loader, val, ckpt_path=tmp_path / "step=1.ckpt")
    assert seen == [2, 2]


def test_students_and_teachers_of_other_classes_are_refused():
    with pytest.raises(UserError, match="as many logits of the student as of the teacher, got 1 and 3"):
        kd_terms(torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), temperature=1.0)


def test_the_control_variate_is_the_mean_of_training_steps():
    """In train mode, in which batch norm uses the batch; it leaves no trace in buffers and random state."""
    student, seen = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), []
    data, buffers = data_of(), [buffer.clone() for buffer in student.buffers()]

    def look(trainer, module):
        assert module.student.training
        assert all(torch.equal(a, b) for a, b in zip(module.student.buffers(), buffers, strict=True))
        x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
        terms = module._terms(x, y)
        expected = torch.autograd.grad((terms.ce - terms.kl).mean(), list(module.student.parameters()))
        for mine, theirs in zip(module._control, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        seen.append(True)

    unbiased_fit(student, DataLoader(data, 24, shuffle=True), Hook(on_train_batch_start=look))
    assert seen


def test_the_control_variate_draws_nothing_from_the_fit():
    states = []

    class Watched(Distillation):
        def control_variate(self):
            before = torch.get_rng_state()
            found = super().control_variate()
            states.append(torch.equal(before, torch.get_rng_state()))
            return found

    module = Watched(nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)), nn.Linear(6, 4), unbiased=True)
    trainer = make_trainer(epochs=2, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, DataLoader(data_of(), 8, shuffle=True), DataLoader(data_of(), 24))
    assert states == [True, True]


def test_frozen_parameters_need_no_control_variate():
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    student[0].requires_grad_(False)
    before = student[0].weight.clone()
    module = unbiased_fit(student, DataLoader(data_of(), 8, shuffle=True))
    assert [tuple(part.shape) for part in module._control] == [(4, 8), (4,)]
    assert torch.equal(student[0].weight, before)


def test_precisions_that_convert_weights_have_no_control_variate():
    with pytest.raises(UserError, match=r"`precision` of the Trainer.*got 'bf16-true'"):
        unbiased_fit(nn.Linear(6, 4), DataLoader(data_of(), 8, shuffle=True), precision="bf16-true")


@pytest.mark.filterwarnings("ignore:LossMixing learns no weights")
@pytest.mark.parametrize("options", [{"unbiased": True}, {"distillation_weight": "auto"}], ids=str)
def test_options_that_loss_mixing_replaces_are_refused(options, tmp_path):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(data_of(), 8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(data_of(), 8)

    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4), **options)
    callbacks = LossMixing(folder=tmp_path / "mixing"), GradientNoise(folder=tmp_path / "noise")
    with pytest.raises(UserError, match="`unbiased` and `distillation_weight: auto` to be off beside LossMixing"):
        make_trainer(*callbacks, epochs=1, enable_checkpointing=False).fit(module, datamodule=Data())


# ---- labels


def test_accuracy_is_that_of_the_labelled_samples():
    data = [(row, number if place % 4 == 0 else -100) for place, (row, number) in enumerate(data_of(22))]
    data += [(row, -100) for row, _ in data_of(5)]  # a batch without any label
    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4))
    (scores,) = make_trainer().validate(module, DataLoader(data, 5), verbose=False)
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    with torch.no_grad():
        logits = module(x)[y >= 0]
    assert scores["val_accuracy"] == pytest.approx(float((logits.argmax(-1) == y[y >= 0]).float().mean()))
    assert scores["val_loss"] == pytest.approx(float(F.cross_entropy(logits, y[y >= 0])), rel=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_residuals_are_the_gradients_of_the_losses(soft):
    z, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    y = torch.rand(5, 4).softmax(-1) if soft else torch.tensor([1, -100, 0, 3, -100])
    terms = kd_terms(z, teacher, y, temperature=TAU)
    for loss, residual in ((terms.ce, terms.label_residual), (terms.kl, terms.teacher_residual)):
        (truth,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
        torch.testing.assert_close(residual, truth)


@pytest.mark.parametrize(
    ("outputs", "y", "told"),
    [
        (1, torch.randn(24, 1), "L >= 2 classes for Distillation, whose loss is 0 for a single output, got L=1"),
        (4, torch.randn(24, 4), "a class number, or soft labels: 4 numbers >= 0 that sum to 1"),
        (4, torch.ones(24, 4), "got float32 numbers of shape .* and sum 4 for sample 0 of the first batch"),
    ],
    ids=["one output", "real outputs", "several labels"],
)
def test_labels_of_other_tasks_are_refused(outputs, y, told):
    """With one output the loss was 0 and the accuracy 1; the others were trained as soft labels of a softmax."""
    module = Distillation(nn.Linear(6, outputs), nn.Linear(6, outputs))
    data = DataLoader([(row, label) for (row, _), label in zip(data_of(), y, strict=True)], 8)
    with pytest.raises(UserError, match=told):
        make_trainer(enable_checkpointing=False, num_sanity_val_steps=0).fit(module, data, data)


# ---- a fit that goes on


class Constant(Distillation):
    """Has an optimizer of its own."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), 0.1)


@pytest.mark.parametrize("kind", [Distillation, Constant])
def test_a_fit_goes_on_with_the_length_of_its_cosine(tmp_path, kind):
    """A longer one had a rate that rose from 0 to `lr`."""
    data, path, options = DataLoader(data_of(), 8), tmp_path / "fit.ckpt", {"enable_checkpointing": False}
    trainer = make_trainer(epochs=2, **options)
    trainer.fit(kind(nn.Linear(6, 4), nn.Linear(6, 4)), data, data)
    trainer.save_checkpoint(path)
    module, longer = kind(nn.Linear(6, 4), nn.Linear(6, 4)), make_trainer(epochs=4, **options)
    if kind is Constant:
        longer.fit(module, data, data, ckpt_path=path)
        assert longer.global_step == 4 * len(data)
        return
    with pytest.raises(UserError, match="started with a cosine over 2 epochs or steps, now the Trainer ends after 4"):
        longer.fit(module, data, data, ckpt_path=path)
    make_trainer(epochs=4, **options).validate(module, data, ckpt_path=path, verbose=False)
    make_trainer(epochs=2, **options).fit(module, data, data, ckpt_path=path)


# ---- layers of the teacher


def test_a_student_that_holds_layers_of_the_teacher_is_refused():
    """They were frozen with the teacher, and went into eval mode with it."""
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    with pytest.raises(UserError, match=r"got `0\.0\.weight` that the teacher holds, too.*copy\.deepcopy\(layer\)"):
        Distillation(nn.Sequential(teacher[:2], nn.Linear(8, 4)), teacher)
    assert teacher[0].weight.requires_grad
    frozen = teacher[:2].requires_grad_(False)
    Distillation(nn.Sequential(frozen, nn.Linear(8, 4)), teacher)


LABELS = {
    "floats": (torch.arange(8) % 4).float(),
    "from one": torch.arange(8) % 4 + 1,
    "negative": torch.arange(8) % 4 - 1,
    "several": torch.ones(8, 4, dtype=torch.int64),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_checked_before_the_first_validation(name):
    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4))
    loader = DataLoader(list(zip(torch.randn(8, 6), LABELS[name], strict=True)), batch_size=4)
    with pytest.raises(UserError, match=r"Expected the label y of a sample to be .* of the first batch"):
        make_trainer().fit(module, loader, loader)


def test_one_hot_integers_are_labels(batch):
    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4))
    one_hot = F.one_hot(batch[1], 4)
    torch.testing.assert_close(module.training_step((batch[0], one_hot), 0), module.training_step(batch, 0))


def test_logits_of_each_step_of_a_sequence_are_refused():
    module = Distillation(nn.Linear(6, 4), nn.Linear(6, 4))
    with pytest.raises(UserError, match=r"Expected logits \(B, L\) of the student of a Distillation, got \(5, 3, 4\)"):
        module.training_step((torch.randn(5, 3, 6), torch.zeros(5, dtype=torch.int64)), 0)
