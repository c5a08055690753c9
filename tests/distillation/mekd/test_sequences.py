"""MEKD on sequences: both stages on waves, and what its discriminator and its distance must tell apart."""

import json
import math

import lightning as L
import pytest
import torch
from helpers.toys import Hook, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import ApiTeacher
from bdistil.distillation.mekd.networks import Discriminator, Generator
from bdistil.distillation.mekd.run import Emulation, Mekd
from bdistil.functional.mekd import discriminator_loss, kernel_distance, narrow_distance

KINDS, STEPS, CHANNELS = 3, 16, 2
TURNS = torch.tensor([1, 2, 4])  # of the waves of each kind in a sample
SETTINGS = Mekd(
    queries=1_300, first_queries=100, width=16, critic_width=8, gan_epochs=60, gan_batch_size=16, gan_lr=2e-3,
    average=0.9, epochs=10, batch_size=32, optimizer="adamw", lr=0.01,
)  # fmt: skip


def waves(count, seed):
    """Sines that begin anywhere, the second channel a quarter ahead, with noise; (x, y)."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(KINDS, (count,), generator=random)
    places = torch.arange(STEPS)[:, None] / STEPS * TURNS[y].view(-1, 1, 1) + torch.arange(CHANNELS) / 4
    x = torch.sin(2 * math.pi * (places + torch.rand(count, 1, 1, generator=random)))
    return x + 0.2 * torch.randn(x.shape, generator=random), y


def answer(batch):
    """The model behind the API: which share of the power each kind has, 8 times."""
    power = torch.fft.rfft(torch.as_tensor(batch), dim=1)[:, TURNS].abs().square().sum(-1)
    return 8 * power / power.sum(-1, keepdim=True)


class Waves(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*waves(240, 1)), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*waves(100, 2)), batch_size=100)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*waves(500, 3)), batch_size=500)


class Student(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv1d(CHANNELS, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 5, padding=2, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * STEPS // 2, KINDS),
        )  # fmt: skip

    def forward(self, x):
        return super().forward(x.mT)


def test_both_stages_learn_from_waves(tmp_path):
    distances = []

    def look(trainer, module):
        if "mekd/distance" in trainer.callback_metrics:
            distances.append(float(trainer.callback_metrics["mekd/distance"]))

    def trainer_of(max_epochs, callbacks, **options):
        look_at = Hook(on_validation_end=look)
        return make_trainer(look_at, *callbacks, epochs=max_epochs, num_sanity_val_steps=1, **options)

    teacher = ApiTeacher(answer, KINDS, tmp_path / "answers.sqlite", batch_size=300)
    run = Emulation(SETTINGS, teacher, Waves(), tmp_path / "mekd", seed=0, make_trainer=trainer_of)
    run.run(lambda _: Student())
    untrained, *trained = distances  # the first is before any step
    assert len(trained) == SETTINGS.gan_epochs
    figures = json.loads((tmp_path / "mekd" / "student.json").read_text())
    assert min(trained) < 0.15 * untrained
    assert figures["test_accuracy"] > 0.55  # chance is 1/3


@pytest.mark.parametrize("shape", [(16, 2), (1, 16, 16)], ids=str)
def test_the_discriminator_is_not_blind_where_one_place_is_left(shape):
    critic = Discriminator(shape, 4)
    adam = torch.optim.Adam(critic.parameters(), 5e-3)
    for _ in range(80):
        loss = discriminator_loss(critic(torch.randn(32, *shape)), critic(torch.rand(32, *shape)))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 1  # two batches with one mean logit have no less than 2 log 2, which is 1.39


def test_narrow_distance_by_hand():
    x, y = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64) + 0.3
    pairs = sorted(float((y[i] - y[j]).square().sum()) for i in range(4) for j in range(i))

    def k(a, b):
        return math.exp(-4 * float((a - b).square().sum()) / pairs[2])  # the lower one of the two in the middle of 6

    own = [sum(k(a, b) for a in s for b in s if a is not b) for s in ([*x], [*y])]
    cross = sum(k(a, b) for a in x for b in y) / 20
    expected = own[0] / 20 + own[1] / 12 - 2 * cross
    assert float(narrow_distance(x, y)) == pytest.approx(expected, rel=1e-10)
    assert float(narrow_distance(100 * x, 100 * y)) == pytest.approx(expected, rel=1e-10)


def test_each_kind_of_wave_that_is_made_brings_the_narrow_distance_down():
    (x, y), (held_out, _) = waves(600, 4), waves(200, 2)
    flat = 0.2 * torch.randn(200, STEPS, CHANNELS)
    makers = [flat, x[y == 0], x[y < 2], x]
    found = [float(narrow_distance(made, held_out)) for made in makers]
    assert found == sorted(found, reverse=True)
    assert abs(found[-1]) < 0.02 < 0.1 * found[0]
    assert kernel_distance(flat, held_out) < kernel_distance(x[y == 0], held_out)  # why sequences have another


def test_channels_of_a_sequence_stand_last_outside_the_networks():
    generator, critic = Generator(KINDS, (STEPS, CHANNELS), 4), Discriminator((STEPS, CHANNELS), 4)
    nn.init.zeros_(generator.layers[-2].weight)
    generator.layers[-2].bias.data = torch.tensor([0.5, -0.5])
    made = generator(torch.randn(5, KINDS))
    assert torch.allclose(made, torch.tensor([0.5, -0.5]).tanh().expand(5, STEPS, CHANNELS))
    x, seen = waves(5, 0)[0], []
    critic.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    critic(x)
    assert torch.allclose(seen[0], x.mT, atol=1e-6)
