"""Length of a schedule, by epochs or steps, and when a step may be fused."""

from types import SimpleNamespace

import pytest
import torch
from helpers.toys import Toys, make_trainer

from bdistil.distillation import Distillation
from bdistil.utils.optimizers import may_fuse, schedule_length


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_epochs": 4, "max_steps": -1}, (4, "epoch")),
        ({"max_epochs": -1, "max_steps": 60}, (60, "step")),
        ({"max_epochs": 10, "max_steps": 60, "estimated_stepping_batches": 60}, (60, "step")),
        ({"max_epochs": 10, "max_steps": 99, "estimated_stepping_batches": 60}, (10, "epoch")),  # epochs end it
    ],
)
def test_the_length_is_that_of_what_ends_the_fit(options, length):
    assert schedule_length(SimpleNamespace(**options)) == length


def test_a_fit_without_an_end_is_told():
    with pytest.warns(UserWarning, match=r"stays constant.*Give it `max_epochs` or `max_steps`"):
        assert schedule_length(SimpleNamespace(max_epochs=-1, max_steps=-1)) == (0, "epoch")


@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [
        ("32-true", None, True),
        ("32-true", 1.0, True),
        ("bf16-mixed", None, True),
        ("bf16-mixed", 1.0, False),
        ("16-mixed", None, False),
    ],
)
def test_a_step_is_fused_where_nothing_looks_at_its_gradients(precision, clip, fused):
    trainer = SimpleNamespace(precision=precision, gradient_clip_val=clip)
    assert bool(may_fuse(trainer, torch.nn.Linear(1, 1))) is fused
    assert not may_fuse(trainer, torch.nn.Linear(1, 1, dtype=torch.complex64))  # torch fuses steps of real numbers


@pytest.mark.parametrize("epochs", [-1, 9])
def test_distillation_of_one_student_follows_the_steps_too(epochs):
    module = Distillation(torch.nn.Linear(8, 4), teacher=torch.nn.Linear(8, 4), lr=0.4)
    trainer = make_trainer(epochs=epochs, max_steps=8, enable_checkpointing=False)
    trainer.fit(module, Toys())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
