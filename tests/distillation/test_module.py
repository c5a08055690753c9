"""Distillation without boosting: the loss by hand, in full and in mixed precision, and what is kept of it."""

import pytest
import torch
import torch.nn.functional as F
from helpers.toys import make_trainer
from torch import nn
from torch.utils.data import DataLoader

from bdistil.distillation.module import Distillation
from bdistil.errors import UserError

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
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        Distillation(nn.Linear(6, 4), nn.Linear(6, 4), **options)
