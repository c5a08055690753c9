"""Softmax regression on 5,000 digits: where SGD settles with a perfect, a good and a poor teacher, and the prediction.

`pytest -m slow -s tests/bench/test_softmax_noise.py` prints the table of docs/gradient-noise.md and draws it to
runs/bench/softmax-noise.png. Digits are pooled to 7x7 and whitened to 10 components, so that a linear model does not
fit all of them. A run starts where the loss of its weight is lowest, and draws its batches with replacement: the theory
is of where SGD settles, and in flat directions it takes longer than these epochs to come there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from bdistil.data.digits import read_digits
from bdistil.functional.gradient_noise import best_weight, last_layer_moments, neighbourhood, pull_curvature

pytestmark = pytest.mark.slow

STEP, BATCH, EPOCHS, SEEDS = 0.05, 10, 100, 3
WEIGHTS = torch.linspace(0, 1, 11)
SEEN = {"perfect": 5000, "good": 4500, "poor": 3000}  # digits that a teacher is trained on
PICTURE = Path(__file__).parents[2] / "runs" / "bench" / "softmax-noise.png"


def digits():
    """Inputs (5000, 11) with a column of ones, and labels, one-hot (5000, 10)."""
    images, y = read_digits()
    x = F.avg_pool2d(images, 4).flatten(1)
    components = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :10]
    return torch.cat((components * len(x) ** 0.5, torch.ones(len(x), 1)), 1), F.one_hot(y, 10).float()


def optimum(x, target, start):
    """Softmax regression (10, 11) by L-BFGS."""
    layer = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [layer], max_iter=3000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ layer.T, target)
        value.backward()
        return value

    optimizer.step(loss)
    return layer.detach()


def settled(x, y, teacher, best):
    """Mean excess loss over the last three quarters of training, (weights, seeds), all runs side by side."""
    generator, q = torch.Generator().manual_seed(0), (x @ teacher.T).softmax(-1)
    starts = torch.stack([optimum(x, (1 - weight) * y + weight * q, best) for weight in WEIGHTS])
    layers, goal = starts.repeat_interleave(SEEDS, 0), WEIGHTS.repeat_interleave(SEEDS)[:, None, None]
    lowest, total, looks, steps = F.cross_entropy(x @ best.T, y), torch.zeros(len(layers)), 0, EPOCHS * len(x) // BATCH
    for step in range(steps):
        rows = torch.randint(len(x), (SEEDS, BATCH), generator=generator).repeat(len(WEIGHTS), 1)
        a = x[rows]
        target = (1 - goal) * y[rows] + goal * q[rows]
        layers -= STEP / BATCH * ((a @ layers.mT).softmax(-1) - target).mT @ a
        if step >= steps // 4 and step % 200 == 0:
            total += torch.stack([F.cross_entropy(x @ layer.T, y) for layer in layers]) - lowest
            looks += 1
    return (total / looks).view(len(WEIGHTS), SEEDS)


def test_sgd_settles_about_where_it_is_predicted():
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    best = optimum(x, y, torch.zeros(10, x.shape[1]))
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (name, seen) in zip(figure.subplots(1, 3), SEEN.items(), strict=True):
        rows = order[:seen]
        teacher = optimum(x[rows], y[rows], best)
        logits = x @ best.T
        g, k = logits.softmax(-1) - y, logits.softmax(-1) - (x @ teacher.T).softmax(-1)
        moments = last_layer_moments(x, g, k, len(x))
        step = STEP / BATCH * pull_curvature(x, logits, g, k, iterations=300) if name != "perfect" else 1.0
        losses = settled(x, y, teacher, best)
        ratios = losses / losses[:1]
        theory, mean = torch.tensor([neighbourhood(moments, float(w), step) for w in WEIGHTS]), ratios.mean(1)
        chosen, excess = best_weight(moments, step), F.cross_entropy(x @ teacher.T, y) - F.cross_entropy(logits, y)
        at = round(10 * chosen)
        print(f"\n{name}: excess loss of the teacher {excess:.5f}, alpha mu / B {step:.2e}")
        labels = STEP / (4 * BATCH) * moments.gg
        print(f"  labels alone: predicted {labels:.5f}, measured {losses[0].mean():.5f} ± {losses[0].std():.5f}")
        print(f"  best weight: predicted {chosen:.2f}, measured {WEIGHTS[int(mean.argmin())]:.1f}")
        for place in (at, -1):
            found = f"{mean[place]:.2f} ± {ratios[place].std():.2f}"
            print(f"  ratio at {WEIGHTS[place]:.1f}: predicted {theory[place]:.2f}, measured {found}")
        assert float(losses[0].mean()) == pytest.approx(labels, rel=0.1)
        assert abs(float(WEIGHTS[int(mean.argmin())]) - chosen) <= 0.1
        assert float(mean[at]) == pytest.approx(float(theory[at]), abs=0.05)
        torch.testing.assert_close(mean, theory, atol=0.05, rtol=0.15)  # far off, CE is no parabola
        axes.errorbar(WEIGHTS, mean, ratios.std(1), fmt="o", markersize=3, label="measured")
        axes.plot(WEIGHTS, theory, label="predicted")
        axes.set(xlabel="λ", title=f"{name} teacher", ylim=(0, max(1.2, 1.3 * float(mean.max()))))
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
