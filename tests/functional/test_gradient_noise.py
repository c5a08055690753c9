"""Gradient noise: three scalars against per-sample gradients, the curves over lambda, and the least-squares table."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdistil import UserError
from bdistil.functional import gradient_noise as bv
from bdistil.functional.distillation import kd_terms
from bdistil.functional.sample_gradients import control_cosine, sample_gradients


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def linear_case(bias=True, samples=30):
    student = nn.Linear(6, 4, bias=bias).double()
    return student, normal(samples, 6), torch.randint(4, (samples,)), 2 * normal(samples, 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_last_layer_scalars_equal_the_full_version_on_a_linear_model(bias, temperature):
    student, x, y, z = linear_case(bias)
    terms = kd_terms(student(x), z, y, temperature=temperature)
    inputs = torch.cat((x, torch.ones(len(x), 1)), 1) if bias else x
    found = bv.last_layer_moments(inputs, terms.label_residual.detach(), terms.teacher_residual.detach())
    full = bv.gradient_moments(*sample_gradients(student, x, y, z, temperature=temperature, chunk=7))
    for name in ("gg", "kk", "gk", "mean_gg", "mean_kk", "mean_gk"):
        assert getattr(found, name) == pytest.approx(getattr(full, name), rel=1e-12), name


class Tied(nn.Module):
    """Two layers of one weight, one of which has two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.second.weight, self.again = self.first.weight, self.first

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.second(torch.tanh(self.first(x)))))))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), Tied])
def test_sample_gradients_equal_one_backward_a_sample(make):
    student = make().double()
    x, y, z = normal(5, 6), torch.randint(4, (5,)), normal(5, 4)
    found = sample_gradients(student, x, y, z, temperature=3.0, chunk=2)
    for row in range(5):
        part = slice(row, row + 1)
        terms = kd_terms(student(x[part]), z[part], y[part], temperature=3.0)
        for loss, gradients in zip((terms.ce, terms.kl), found, strict=True):
            truth = torch.autograd.grad(loss.sum(), list(student.parameters()), retain_graph=True)
            torch.testing.assert_close(gradients[row], torch.cat([t.flatten() for t in truth]))


def test_curves_over_lambda_equal_those_of_the_mixed_gradients():
    g, k = normal(50, 8) + 1.0, normal(50, 8) + 0.5
    k = 0.5 * g + k
    moments = bv.gradient_moments(g, k)
    for weight in (0.0, 0.3, 1.0):
        mixed = (1 - weight) * g + weight * k
        variance = float(mixed.var(0).sum())
        signal = float(mixed.mean(0).square().sum()) - variance / 50
        assert bv.variance_at(moments, weight) == pytest.approx(variance, rel=1e-10)
        assert bv.noise_to_signal(moments, weight) == pytest.approx(variance / signal, rel=1e-9)
    grid = torch.linspace(0, 1, 2001).tolist()
    best = min(grid, key=lambda weight: bv.variance_at(moments, weight))
    assert bv.least_variance_weight(moments) == pytest.approx(best, abs=1e-3)
    h = g - k
    gh, hh = ((g - g.mean(0)) * (h - h.mean(0))).sum() / 49, h.var(0).sum()
    assert bv.explained_share(moments) == pytest.approx(float(gh**2 / (g.var(0).sum() * hh)), rel=1e-10)


def test_a_gradient_that_is_all_noise_has_no_signal():
    g = normal(20, 3)
    moments = bv.gradient_moments(g - g.mean(0), g - g.mean(0))
    assert bv.noise_to_signal(moments, 0.5) == math.inf
    assert bv.least_variance_weight(moments) == 0.0  # h = 0: there is nothing to choose
    with pytest.raises(UserError, match="two samples or more"):
        bv.gradient_moments(g[:1], g[:1])


# Distance of the teacher from the optimum, and what the theory says of it: best weight and noise ratio.
TABLE = [(0.108, 0.824, 0.174), (0.216, 0.542, 0.456), (0.432, 0.230, 0.768)]
STEP, SAMPLES, WIDTH = 0.01, 400, 10


def least_squares():
    """Whitened inputs (400, 10), noisy targets, and their optimum: (<x, w> - y)^2 grows by |w - w*|^2 around it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / SAMPLES)).T
    y = x.sum(1) + 0.78 * torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    return x, y, x.T @ y / SAMPLES


def settled(x, y, teacher, weight, optimum, chains=600, steps=1200, burn=300):
    """Mean squared distance from the optimum of SGD on (<x, w> - y)^2, one sample a step, reshuffled each epoch."""
    generator = torch.Generator().manual_seed(7)
    goal = (1 - weight) * y + weight * (x @ teacher)
    at, total = optimum.repeat(chains, 1), 0.0
    for step in range(steps):
        if step % SAMPLES == 0:
            order = torch.rand(SAMPLES, chains, generator=generator).argsort(0)
        rows = order[step % SAMPLES]
        a = x[rows]
        at = at - 2 * STEP * ((a * at).sum(1) - goal[rows])[:, None] * a
        total += float((at - optimum).square().sum(1).mean()) if step >= burn else 0.0
    return total / (steps - burn)


@pytest.fixture(scope="module")
def plain():
    """Where the labels alone settle."""
    x, y, optimum = least_squares()
    return settled(x, y, optimum, 0.0, optimum)


@pytest.mark.parametrize(("distance", "weight", "ratio"), TABLE)
def test_least_squares_settles_where_the_theory_says(distance, weight, ratio, plain):
    x, y, optimum = least_squares()
    away = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher = optimum + distance * away / away.norm()
    residual = (x @ optimum - y)[:, None]
    moments = bv.last_layer_moments(x, residual, (x @ (optimum - teacher))[:, None], SAMPLES)
    best, predicted = bv.best_weight(moments, STEP), bv.neighbourhood(moments, bv.best_weight(moments, STEP), STEP)
    assert best == pytest.approx(weight, abs=0.05)
    assert predicted == pytest.approx(ratio, abs=0.05)
    assert settled(x, y, teacher, best, optimum) / plain == pytest.approx(predicted, abs=0.05)


@pytest.mark.parametrize("step", [1e-3, 1e-1])
def test_neighbourhood_is_least_at_the_best_weight_and_the_papers_there(step):
    g, k = normal(60, 5) + 0.3, normal(60, 5)
    moments = bv.gradient_moments(g, g - 0.7 * g + k, 60)
    best, h = bv.best_weight(moments, step), 0.7 * g - k
    share = (g * h).sum(1).mean() ** 2 / (g.square().sum(1).mean() * h.square().sum(1).mean())
    beta = h.mean(0).square().sum() / (step * h.square().sum(1).mean())
    assert 0.01 < best < 0.99
    assert bv.neighbourhood(moments, best, step) == pytest.approx(float(1 - share / (1 + beta)))
    assert bv.neighbourhood(moments, 0.0, step) == 1.0
    assert all(bv.neighbourhood(moments, best + by, step) > 1 - share / (1 + beta) for by in (-0.01, 0.01))


@pytest.mark.parametrize("labelled", [200, 60])
def test_pull_curvature_is_that_of_the_hessian_in_the_direction_of_the_pull(labelled):
    """Of the loss in training: the mean over all samples, those without a label having none."""
    student, x, y, z = linear_case(samples=200)
    y[labelled:] = -100
    inputs, logits = torch.cat((x, torch.ones(200, 1)), 1), student(x).detach()
    terms = kd_terms(logits, z, y, temperature=1.0)
    g, k = terms.label_residual, terms.teacher_residual
    hessian = torch.autograd.functional.hessian(
        lambda layer: F.cross_entropy(inputs @ layer.view(4, 7).T, y, reduction="none").mean(),
        torch.cat((student.weight, student.bias[:, None]), 1).detach().flatten(),
    )
    pull = ((g - k).T @ inputs / 200).flatten()
    truth = float(pull @ pull / (2 * pull @ torch.linalg.pinv(hessian, rtol=1e-10) @ pull))
    assert bv.pull_curvature(inputs, logits, g, k) == pytest.approx(truth, rel=1e-4)
    assert bv.pull_curvature(inputs, logits, g, k, iterations=1) > truth  # flat directions come late
    assert bv.pull_curvature(inputs, logits, g, g) == 0.0


def test_suggestion_follows_the_theory_and_says_why():
    student, x, y, _ = linear_case(samples=200)
    with torch.no_grad():
        for _ in range(3000):
            terms = kd_terms(student(x), student(x), y, temperature=1.0)
            student.weight -= 0.3 * terms.label_residual.T @ x / 200
            student.bias -= 0.3 * terms.label_residual.mean(0)
        inputs, loss = torch.cat((x, torch.ones(200, 1)), 1), float(F.cross_entropy(student(x), y))
        found = {}
        for name, fault in (("perfect", 0.0), ("good", 0.25), ("poor", 2.0)):
            z = student(x) + fault * x @ normal(6, 4)
            terms = kd_terms(student(x), z, y, temperature=1.0)
            moments = bv.last_layer_moments(inputs, terms.label_residual, terms.teacher_residual, 200)
            found[name] = bv.suggest(moments, label_loss=loss)
    assert found["perfect"].weight == pytest.approx(0.9)  # 1, less what is never suggested
    assert 0.9 > found["good"].weight > found["poor"].weight
    assert found["poor"].weight < 0.15
    assert "explains 100%" in found["perfect"].reason
    assert "explains" in found["good"].reason
    assert "at 0.01" in found["good"].reason
    fitted = bv.suggest(moments, label_loss=1e-3)
    assert fitted.weight == 0
    assert "fits its labels" in fitted.reason


@pytest.mark.parametrize(("factor", "expected"), [(0.5, [0.8, 0.4, 0.2]), (1.2, [0.8, 0.96, 1.0]), (1.0, [0.8] * 3)])
def test_weight_decays_and_grows(factor, expected):
    assert [bv.scheduled_weight(0.8, factor, epoch) for epoch in range(3)] == pytest.approx(expected)


def test_cosine_is_one_on_linear_models_at_temperature_one():
    student, x, y, _ = linear_case()
    teacher = nn.Linear(6, 4).double()
    assert control_cosine(student, teacher, x, y, temperature=1.0) == pytest.approx(1.0, abs=1e-9)
    deep = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double() for _ in range(2)]
    assert 0.0 < control_cosine(*deep, x, y, temperature=1.0) < 0.99
    with pytest.raises(UserError, match="architecture"):
        control_cosine(student, deep[0], x, y, temperature=1.0)
