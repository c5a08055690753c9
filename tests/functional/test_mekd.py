"""Losses of MEKD against formulas written out by hand in NumPy, and the traps that they are corrected for."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from bdistil import UserError
from bdistil.distillation.mekd.networks import Discriminator, Generator, shifted
from bdistil.functional.mekd import (
    balance,
    confidence,
    discriminator_loss,
    generator_loss,
    hard_emulation,
    hard_latent,
    kernel_distance,
    soft_emulation,
    soft_latent,
    statistics,
)

M, L = 6, 4


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture
def logits():
    return torch.randn(M, L, dtype=torch.float64) * 3, torch.randn(M, L, dtype=torch.float64) * 3


def test_discriminator_loss():
    real, made = torch.randn(2, M, dtype=torch.float64)
    expected = -np.log(sigmoid(real.numpy())).mean() - np.log(1 - sigmoid(made.numpy())).mean()
    assert float(discriminator_loss(real, made)) == pytest.approx(expected, rel=1e-12)
    assert torch.isfinite(discriminator_loss(torch.tensor([-1e4]), torch.tensor([1e4])))


def test_generator_loss_by_hand():
    made, weight = torch.randn(M, dtype=torch.float64), torch.rand(M, dtype=torch.float64)
    d = sigmoid(made.numpy())
    expected = -np.log(d).mean() + 0.5 * np.mean([-w * np.log(p) for w, p in zip(weight.tolist(), d, strict=True)])
    assert float(generator_loss(made, weight)) == pytest.approx(expected, rel=1e-12)


def test_shapes_that_would_broadcast_are_refused():
    made = torch.randn(M, 1)
    with pytest.raises(AssertionError, match=r"\(6, 1\), \(6,\)"):
        generator_loss(made, torch.rand(M))
    with pytest.raises(AssertionError):
        soft_emulation(nn.Identity(), torch.zeros(M, L), torch.zeros(M, 1), torch.zeros(L), torch.ones(L), tau=1.0)


def test_no_gradient_goes_through_the_weight():
    made, weight = torch.randn(M, requires_grad=True), torch.rand(M, requires_grad=True)
    generator_loss(made, weight).backward()
    assert weight.grad is None
    assert made.grad.abs().min() > 0


def test_confidence_is_the_probability_and_not_the_class(logits):
    g, _ = logits
    assert np.allclose(confidence(g), softmax(g.numpy()).max(-1), rtol=1e-12)
    # The class as a weight would tell apart what a permutation of the classes makes.
    assert torch.allclose(confidence(g), confidence(g.roll(1, -1)))
    assert float(confidence(torch.zeros(1, L))) == 1 / L


def test_balance_gives_each_class_the_same_weight_in_all():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    counts = labels.bincount(minlength=L)
    weights = balance(labels, counts)
    assert weights.tolist() == pytest.approx([8 / (4 * n) for n in (3, 3, 3, 2, 2, 1, 2, 2)])
    sums = [float(weights[labels == label].sum()) for label in range(L)]
    assert sums == pytest.approx([2.0] * L)
    assert balance(torch.tensor([3]), torch.tensor([100, 100, 100, 1])).tolist() == [10.0]
    assert balance(torch.tensor([1, 2]), torch.full((L,), 7)).tolist() == [1.0, 1.0]


def test_standardised_answers_look_standard_normal():
    answers = torch.randn(5000, L, dtype=torch.float64) * torch.tensor([1.0, 5, 9, 2]) + torch.tensor([4.0, -3, 0, 20])
    mean, sd = statistics(answers)
    z = soft_latent(answers, mean, sd)
    assert torch.allclose(z.mean(0), torch.zeros(L, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(z.std(0), torch.ones(L, dtype=torch.float64))
    assert torch.allclose(soft_latent(answers + 7.5, mean, sd), z)  # softmax sees no shift, and so does G


def test_hard_latents_have_the_norm_of_a_standard_normal():
    sure = 1e4 * torch.eye(L)
    assert torch.allclose(hard_latent(sure), torch.eye(L) * L**0.5)


def test_soft_emulation_by_hand(logits):
    student, teacher = logits
    matrix = torch.randn(L, 9, dtype=torch.float64)
    mean, sd, tau = torch.randn(L, dtype=torch.float64), torch.rand(L, dtype=torch.float64) + 0.5, 5.0
    images, answers = soft_emulation(lambda z: torch.tanh(z @ matrix), student, teacher, mean, sd, tau=tau, kl=0.7)

    def z(y):
        return (y - y.mean(-1, keepdims=True) - mean.numpy()) / sd.numpy()

    made, goal = (np.tanh(z(y.numpy()) @ matrix.numpy()) for y in (student, teacher))
    assert float(images) == pytest.approx(np.abs(made - goal).mean(), rel=1e-10)
    p, q = softmax(teacher.numpy() / tau), softmax(student.numpy() / tau)
    assert float(answers) == pytest.approx(0.7 * tau * (p * np.log(p / q)).sum(-1).mean(), rel=1e-10)


def test_hard_emulation_by_hand(logits):
    student, _ = logits
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    matrix = torch.randn(L, 9, dtype=torch.float64)
    images, answers = hard_emulation(lambda z: torch.tanh(z @ matrix), student, labels, kl=0.7)
    one_hot = np.eye(L)[labels.numpy()]
    q = softmax(student.numpy())
    made, goal = np.tanh(np.sqrt(L) * q @ matrix.numpy()), np.tanh(np.sqrt(L) * one_hot @ matrix.numpy())
    assert float(images) == pytest.approx(np.abs(made - goal).mean(), rel=1e-10)
    assert float(answers) == pytest.approx(-0.7 * np.log((q * one_hot).sum(-1)).mean(), rel=1e-10)


def test_emulation_of_16_bit_logits_is_that_of_float32():
    student, labels = torch.randn(6, 10).bfloat16(), torch.arange(6)
    teacher = (student + 0.02 * torch.randn(6, 10)).bfloat16()
    mean, sd = torch.zeros(10), torch.ones(10)
    with torch.autocast("cpu", torch.bfloat16):
        soft = soft_emulation(nn.Identity(), student, teacher, mean, sd, tau=4.0)
        hard = hard_emulation(nn.Identity(), student, labels)
    right = soft_emulation(nn.Identity(), student.float(), teacher.float(), mean, sd, tau=4.0)
    torch.testing.assert_close(soft[1], right[1])
    torch.testing.assert_close(hard[1], hard_emulation(nn.Identity(), student.float(), labels)[1])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_that_answers_like_the_teacher_has_no_loss_and_others_get_a_gradient(kind, logits):
    other, teacher = logits
    generator = nn.Sequential(nn.Linear(L, 9), nn.Tanh()).double()
    mean, sd = statistics(teacher)
    for answer, zero in ((teacher, True), (other, False)):
        student = answer.clone().requires_grad_()
        if kind == "soft":
            parts = soft_emulation(generator, student, teacher, mean, sd, tau=5.0)
        else:
            student = (1e3 * answer.detach()).requires_grad_()
            parts = hard_emulation(generator, student, teacher.argmax(-1))
        assert [float(part.detach()) == pytest.approx(0, abs=1e-6) for part in parts] == [zero, zero]
        if not zero:
            (gradient,) = torch.autograd.grad(parts[0] if kind == "soft" else parts[1], student)
            assert gradient.abs().max() > 0


def test_kernel_distance_by_hand():
    x, y = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64) + 0.3

    def k(a, b):
        return (float((a * b).sum()) / 6 + 1) ** 3

    own = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    cross = np.mean([k(a, b) for a in x for b in y])
    assert float(kernel_distance(x, y)) == pytest.approx(own[0] + own[1] - 2 * cross, rel=1e-10)


def test_kernel_distance_grows_with_the_difference():
    x, y, z = torch.randn(400, 8), torch.randn(400, 8), torch.randn(400, 8) + 1
    assert abs(float(kernel_distance(x, y))) < 0.05 < float(kernel_distance(x, z))


# ---- networks


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 30, 33), (50, 6), (29, 12)], ids=str)
def test_shapes_of_the_networks(shape):
    generator, discriminator = Generator(L, shape, width=8), Discriminator(shape, width=4)
    x = generator(torch.randn(5, L))
    assert x.shape == (5, *shape)
    assert x.abs().max() <= 1
    assert discriminator(x).shape == (5,)


def test_the_generator_is_the_one_of_the_paper():
    generator = Generator(10, (1, 28, 28))
    convolutions = [layer for layer in generator.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(128, 128), (128, 64), (64, 1)]
    assert generator.linear.out_features == 128 * 7 * 7
    discriminator = Discriminator((1, 28, 28))
    convolutions = [layer for layer in discriminator.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(1, 16), (16, 32), (32, 64), (64, 128)]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in discriminator.modules()) == 3


@pytest.mark.parametrize("shape", [(2, 8, 8), (16, 3)], ids=str)
def test_what_is_made_is_in_the_range_of_the_data_channel_by_channel(shape):
    data = torch.rand(50, *shape)
    last = len(shape) == 2
    (data[..., 0] if last else data[:, 0]).mul_(100).sub_(40)
    generator = Generator(L, shape, width=4)
    generator.fit_range(data)
    generator.layers[-2].weight.data.mul_(100)  # so that tanh reaches its ends
    made = generator(torch.randn(200, L) * 50)
    axes = (0, 1) if last else (0, 2, 3)
    assert torch.all(made.amin(axes) >= data.amin(axes) - 1e-4)
    assert torch.all(made.amax(axes) <= data.amax(axes) + 1e-4)
    assert torch.all(made.amax(axes) - made.amin(axes) > 0.5 * (data.amax(axes) - data.amin(axes)))


@pytest.mark.parametrize("shape", [(28,), (1, 3, 28), (1, 28, 28, 2), (0, 28, 28), (3, 6)], ids=str)
def test_shapes_that_cannot_be(shape):
    for kind in (lambda: Generator(L, shape), lambda: Discriminator(shape)):
        with pytest.raises(UserError, match=r"Expected `shape` of an image \(C, H, W\) or a sequence"):
            kind()


@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 7)], ids=str)
def test_the_discriminator_sees_shifted_samples_in_training(shape):
    x, limit = torch.randn(200, *shape), 2
    moved = shifted(x, limit)
    sides = shape[1:]
    offsets = set()
    for before, after in zip(x, moved, strict=True):
        places = [[(torch.arange(side) + d).clamp(0, side - 1) for d in range(-limit, limit + 1)] for side in sides]
        options = {
            numbers: before[
                (slice(None), *torch.meshgrid(*(p[n] for p, n in zip(places, numbers, strict=True)), indexing="ij"))
            ]
            for numbers in itertools.product(range(2 * limit + 1), repeat=len(sides))
        }
        found = {numbers for numbers, option in options.items() if torch.equal(option, after)}
        assert len(found) == 1
        offsets |= found
    assert len(offsets) == (2 * limit + 1) ** len(sides)


def test_the_discriminator_shifts_in_training_only():
    x = torch.randn(8, 1, 8, 8)
    critic = Discriminator((1, 8, 8), 2, shift=3)
    for layer in critic.modules():
        layer.p = 0.0  # no dropout
    assert not torch.equal(critic(x), critic(x))
    critic.eval()
    assert torch.equal(critic(x), critic(x))
    for shift in (-1, 8):
        with pytest.raises(UserError, match=rf"Expected `shift` of a discriminator to be in 0 … 7, got {shift}"):
            Discriminator((1, 8, 8), 2, shift=shift)
