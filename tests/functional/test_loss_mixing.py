"""Per-sample mixing: its arithmetic against autograd, its store, and what the callback learns."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from bdistil import UserError
from bdistil.functional import loss_mixing as bm
from bdistil.functional.distillation import kd_terms


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def problem(teachers, temperature=4.0, samples=12, outputs=5, width=7):
    """A last layer (L, D+1), what goes in, teachers, labels; and a clean validation part."""
    ones = torch.ones(samples, 1, dtype=torch.float64)
    a, layer = torch.cat((normal(samples, width), ones), 1), normal(outputs, width + 1)
    z = normal(teachers, samples, outputs) if teachers > 1 else normal(samples, outputs)
    y = torch.randint(outputs, (samples,))
    a_v = torch.cat((normal(9, width), torch.ones(9, 1, dtype=torch.float64)), 1)
    return a, layer, z, y, a_v, torch.randint(outputs, (9,)), temperature


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize(("mode", "teachers"), list(itertools.product(["convex", "independent"], [1, 2, 3])))
def test_meta_gradient_equals_autograd_through_the_step(mode, teachers, share):
    a, layer, z, y, a_v, y_v, tau = problem(teachers)
    step = 0.7
    mix = torch.rand(len(a), teachers + (mode == "independent"), dtype=torch.float64).requires_grad_()
    moving = layer.clone().requires_grad_()
    loss = bm.mixed_loss(kd_terms(a @ moving.T, z, y, temperature=tau), bm.loss_weights(mix, mode))
    (slope,) = torch.autograd.grad(loss, moving, create_graph=True)
    ahead = layer - step * slope
    entropy = (1 - share) * F.cross_entropy(a_v @ ahead.T, y_v) + share * F.cross_entropy(a @ ahead.T, y)
    (truth,) = torch.autograd.grad(entropy, mix)

    def outer(x, y):
        return bm.OuterLoss(x, x @ layer.T, y, torch.full((len(x),), 1 / len(x), dtype=torch.float64))

    residuals = bm.residuals_of(kd_terms(a @ layer.T, z, y, temperature=tau))
    loss_outside = bm.outer_loss(outer(a_v, y_v), outer(a, y), share)
    found = bm.meta_gradient(mix.detach(), residuals, a, loss_outside, mode=mode, step=step)
    assert float(truth.abs().max()) > 1e-4
    torch.testing.assert_close(found, truth, atol=1e-6 * float(truth.abs().max()), rtol=1e-6)


def test_meta_gradient_of_a_round_equals_autograd():
    """The outer loss of a round is that of the prefix, whose logits move by scale / t with the student's."""
    samples, outputs, rounds, scale, kappa, step = 10, 4, 3, 5.0, 1.0, 0.4
    a, layer = normal(samples, 6), normal(outputs, 6)
    g, S, y = normal(samples, outputs), normal(samples, outputs), torch.randint(outputs, (samples,))
    labels = bm.label_target(y, outputs).double()
    a_v, base, y_v = normal(8, 6), normal(8, outputs), torch.randint(outputs, (8,))
    mix = torch.rand(samples, 1, dtype=torch.float64).requires_grad_()
    moving = layer.clone().requires_grad_()
    target, error = bm.mixed_target(g, S, labels, mix[:, 0], rounds)
    loss = (a @ moving.T - (target - kappa * error)).square().mean()
    (slope,) = torch.autograd.grad(loss, moving, create_graph=True)
    prefix = base + scale / rounds * a_v @ (layer - step * slope).T
    (truth,) = torch.autograd.grad(F.cross_entropy(prefix, y_v), mix)
    logits = base + scale / rounds * a_v @ layer.T
    outer = bm.OuterLoss(a_v, logits, y_v, torch.full((8,), 1 / 8, dtype=torch.float64), scale / rounds)
    residuals = bm.round_residuals(a @ layer.T, g, S, labels, kappa=kappa, rounds=rounds)
    found = bm.meta_gradient(mix.detach(), residuals, a, outer, mode="convex", step=step)
    torch.testing.assert_close(found, truth, atol=1e-6 * float(truth.abs().max()), rtol=1e-6)


def test_mixed_target_is_the_error_to_the_mixed_target():
    answers, g = normal(3, 6, 4), normal(6, 4)
    labels, share = bm.label_target(torch.randint(4, (6,)), 4).double(), torch.rand(6, dtype=torch.float64)
    target, error = bm.mixed_target(g, (answers - g).sum(0), labels, share, 3)
    torch.testing.assert_close(target, share[:, None] * g + (1 - share[:, None]) * labels)
    torch.testing.assert_close(error, (answers - target).sum(0))


@pytest.mark.parametrize("outputs", [2, 10])
def test_label_target_is_centred_and_of_unit_rms(outputs):
    target = bm.label_target(torch.tensor([0, 1]), outputs)
    torch.testing.assert_close(target.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(target.square().mean(1), torch.ones(2))
    assert target.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["convex", "independent"])
def test_a_learned_mix_lowers_the_outer_loss_of_the_step(mode):
    a, layer, z, y, a_v, y_v, tau = problem(2, samples=40)
    settings = bm.MixingSettings(mode=mode, rate=0.02)
    outer = bm.OuterLoss(a_v, a_v @ layer.T, y_v, torch.full((9,), 1 / 9, dtype=torch.float64))
    residuals = bm.residuals_of(kd_terms(a @ layer.T, z, y, temperature=tau))
    mix = bm.start_mix(40, 2, mode, seed=0).double()

    def after(mix):
        pull = (bm.loss_weights(mix, mode).T[..., None] * residuals).sum(0)
        return F.cross_entropy(a_v @ (layer - 0.3 / 40 * pull.T @ a).T, y_v)

    learned = bm.learn_mix(mix, residuals, a, outer, settings, 0.3)
    assert after(learned) < after(mix) - 1e-4
    assert learned.min() >= 0
    assert learned.max() <= bm.HIGHEST[mode]


def test_moves_are_of_the_same_size_for_any_network_unless_asked_otherwise():
    gradient, mix = normal(8, 2), torch.full((8, 2), 1.0, dtype=torch.float64)
    normalised, plain = bm.MixingSettings(rate=0.01), bm.MixingSettings(rate=0.01, normalise=False)
    torch.testing.assert_close(bm.move_mix(mix, gradient, normalised), bm.move_mix(mix, 1e-6 * gradient, normalised))
    torch.testing.assert_close(bm.move_mix(mix, gradient, plain), mix - 0.01 * 8 * gradient)
    torch.testing.assert_close(bm.move_mix(mix, 0 * gradient, normalised), mix)


def test_weights_of_both_modes():
    mix = torch.tensor([[0.2, 0.7], [0.9, 0.1]])
    torch.testing.assert_close(bm.loss_weights(mix, "convex"), torch.tensor([[0.3, 0.2, 0.7], [0.1, 0.9, 0.1]]))
    assert bm.loss_weights(mix, "independent") is mix
    terms = kd_terms(normal(2, 3), normal(2, 2, 3), torch.tensor([0, 2]), temperature=2.0)
    loss = bm.mixed_loss(terms, torch.tensor([[0.3, 0.2, 0.7], [0.1, 0.9, 0.1]], dtype=torch.float64))
    by_hand = 0.3 * terms.ce[0] + 0.2 * terms.kl[0, 0] + 0.7 * terms.kl[1, 0]
    by_hand = by_hand + 0.1 * terms.ce[1] + 0.9 * terms.kl[0, 1] + 0.1 * terms.kl[1, 1]
    torch.testing.assert_close(loss, by_hand / 2)


def test_updates_come_after_the_warmup():
    settings = bm.MixingSettings(warmup=3, every=2)
    assert [epoch for epoch in range(8) if settings.due(epoch)] == [3, 5, 7]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("mode", "both", "'convex' or 'independent'"),
        ("every", 0, ">= 1"),
        ("inner", 0, ">= 1"),
        ("rate", 0.0, "> 0"),
        ("look_ahead", "step", "> 0, or 'lr'"),
        ("look_ahead", 0.0, "> 0, or 'lr'"),
        ("train_share", 1.0, r"in \[0, 1\)"),
    ],
)
def test_settings_name_what_is_wrong(name, value, allowed):
    with pytest.raises(UserError, match=f"`{name}` of the mixing settings to be {allowed}, got {value!r}"):
        bm.MixingSettings(**{name: value})
