"""Softmax regression on digits: where SGD settles with a perfect, a good and a poor teacher, and the prediction.

`pytest -m slow -s tests/bench/test_softmax_noise.py` prints the tables of docs/gradient-noise.md and draws them to
runs/bench/softmax-noise-*.png. The data are 5,000 digits, and all of MNIST where BDISTIL_DATA holds the folder `mnist`.
Digits are pooled to 7x7 and whitened to 10 components, so that a linear model does not fit all of them. A run starts
where the loss of its weight is lowest, and draws its batches with replacement: the theory is of where SGD settles, and
in flat directions it takes longer than these steps to come there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from bdistil.data.digits import read_digits
from bdistil.data.mnist import read_mnist
from bdistil.functional.gradient_noise import best_weight, last_layer_moments, neighbourhood, pull_curvature

pytestmark = pytest.mark.slow

STEP, BATCH, SEEDS = 0.05, 10, 3
STEPS = {"digits": 50_000, "mnist": 60_000}  # 100 epochs, and 10
LOOKS = 100  # the loss is looked at so many times
WEIGHTS = torch.linspace(0, 1, 11)
SEEN = {  # digits that a teacher is trained on
    "digits": {"perfect": 5_000, "good": 4_500, "poor": 3_000},
    "mnist": {"perfect": 60_000, "good": 30_000, "poor": 6_000},
}
PICTURES = Path(__file__).parents[2] / "runs" / "bench"


def read(data):
    if data == "digits":
        return read_digits()
    if "BDISTIL_DATA" not in os.environ:
        pytest.skip("BDISTIL_DATA names no folder with the files of MNIST")
    return read_mnist(os.environ["BDISTIL_DATA"], "train")


def whitened(images, y):
    """Inputs (N, 11) with a column of ones, and labels, one-hot (N, 10)."""
    x = F.avg_pool2d(images, 4).flatten(1)
    components = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :10]
    return torch.cat((components * len(x) ** 0.5, torch.ones(len(x), 1)), 1), F.one_hot(y, 10).float()


def optimum(x, target, start):
    """Softmax regression (10, 11) by Newton's method, with halved steps where a whole one does not help."""
    x, target, layer = x.double(), target.double(), start.double()
    products = (x[:, :, None] * x[:, None]).flatten(1)
    loss = F.cross_entropy(x @ layer.T, target)
    for _ in range(50):
        p = (x @ layer.T).softmax(-1)
        gradient = ((p - target).T @ x / len(x)).flatten()
        curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).flatten(1).T @ products / len(x)
        curvature = curvature.view(10, 10, 11, 11).transpose(1, 2).reshape(110, 110)
        # One vector added to all rows changes nothing: without the ridge the curvature has no inverse.
        step, scale = torch.linalg.solve(curvature + 1e-9 * torch.eye(110), gradient).view(10, 11), 1.0
        while scale > 1e-3 and F.cross_entropy(x @ (layer - scale * step).T, target) > loss:
            scale /= 2
        layer = layer - scale * step
        loss = F.cross_entropy(x @ layer.T, target)
        if gradient.norm() < 1e-9:
            break
    return layer.float()


def settled(x, y, teacher, best, steps):
    """Mean excess loss over the last three quarters of training, (weights, seeds), all runs side by side."""
    generator, q = torch.Generator().manual_seed(0), (x @ teacher.T).softmax(-1)
    starts = torch.stack([optimum(x, (1 - weight) * y + weight * q, best) for weight in WEIGHTS])
    layers, goal = starts.repeat_interleave(SEEDS, 0), WEIGHTS.repeat_interleave(SEEDS)[:, None, None]
    lowest, total, looks = F.cross_entropy(x @ best.T, y), torch.zeros(len(layers)), 0
    for step in range(steps):
        rows = torch.randint(len(x), (SEEDS, BATCH), generator=generator).repeat(len(WEIGHTS), 1)
        a = x[rows]
        target = (1 - goal) * y[rows] + goal * q[rows]
        layers -= STEP / BATCH * ((a @ layers.mT).softmax(-1) - target).mT @ a
        if step >= steps // 4 and step % (steps // LOOKS) == 0:
            total += torch.stack([F.cross_entropy(x @ layer.T, y) for layer in layers]) - lowest
            looks += 1
    return (total / looks).view(len(WEIGHTS), SEEDS)


@pytest.mark.parametrize("data", SEEN)
def test_sgd_settles_about_where_it_is_predicted(data):
    x, y = whitened(*read(data))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    best = optimum(x, y, torch.zeros(10, x.shape[1]))
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (name, seen) in zip(figure.subplots(1, 3), SEEN[data].items(), strict=True):
        rows = order[:seen]
        teacher = optimum(x[rows], y[rows], best)
        logits = x @ best.T
        g, k = logits.softmax(-1) - y, logits.softmax(-1) - (x @ teacher.T).softmax(-1)
        moments = last_layer_moments(x, g, k, len(x))
        step = STEP / BATCH * pull_curvature(x, logits, g, k, iterations=300) if name != "perfect" else 1.0
        losses = settled(x, y, teacher, best, STEPS[data])
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
    figure.axes[0].set_ylabel("excess loss, labels alone = 1")
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"softmax-noise-{data}.png", dpi=80)
