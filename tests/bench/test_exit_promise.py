"""How often promised and naive thresholds lose more than they should, over 200 resampled splits of the digits.

`pytest -m slow -s tests/bench/test_exit_promise.py` prints the figures of docs/anytime.md and draws its picture to
runs/bench/exit-promise.png. The 1,500 samples of the validation and test part are the population: 500 are drawn from it
with replacement, thresholds are fitted on them, and what they lose is counted on all. A finished run of the recipe is
used where BDISTIL_DIGITS names one; else it is trained first, for some minutes.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from bdistil import ProgressiveEnsemble
from bdistil.cli.app import main
from bdistil.data.digits import Digits
from bdistil.ensemble.budget import confidence_of
from bdistil.evaluation.calibrate import fit_calibration, own_logits
from bdistil.evaluation.temperature import weighted_prefixes
from bdistil.evaluation.thresholds import ExitTarget, exit_outcome, exit_stages

pytestmark = pytest.mark.slow

SAMPLES, SPLITS, POINTS = 500, 200, 1.0
DELTAS = {"promise, δ = 0.1": 0.1, "naive fit": "none"}
PICTURE = Path(__file__).parents[2] / "runs" / "bench" / "exit-promise.png"


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    """Own logits (T, N, L) of the students, labels (N,), and cumulative MACs."""
    root = os.environ.get("BDISTIL_DIGITS")
    if root is None:
        root = str(tmp_path_factory.mktemp("digits") / "run")
        options = ["--tracking.mode", "disabled", "--trainer.enable_progress_bar", "false"]
        assert main(["fit", "--config", "digits", "--run_dir", root, *options]) == 0
    ensemble, data = ProgressiveEnsemble.load(root, calibration=False), Digits()
    data.setup()
    parts = [data.parts[part].tensors for part in ("val", "test")]
    return *own_logits(ensemble, parts, torch.device("cpu")), ensemble.macs


def on_all(calibration, own, labels, macs):
    """Points that the exits lose on the population, and the share of MACs that they save."""
    prefixes = weighted_prefixes(own, torch.ones(len(own)))
    pairs = zip(prefixes, calibration.temperatures, strict=True)
    confidence = torch.stack([confidence_of(logits, "max_prob", t) for logits, t in pairs]).numpy()
    right = (prefixes.argmax(-1) == labels).numpy()
    result = exit_outcome(exit_stages(confidence, np.array(calibration.exits.thresholds)), right, np.array(macs))
    return 100 * (right[-1].mean() - result.right / len(labels)), 1 - result.macs / len(labels) / macs[-1]


def test_a_promise_is_kept_where_a_naive_fit_is_not(population):
    own, labels, macs = population
    found = {}
    for name, delta in DELTAS.items():
        rows = []
        for seed in range(SPLITS):
            drawn = torch.from_numpy(np.random.default_rng(seed).integers(len(labels), size=SAMPLES))
            target = ExitTarget(max_loss=POINTS, delta=delta)
            rows.append(on_all(fit_calibration(own[:, drawn], labels[drawn], macs, target), own, labels, macs))
        found[name] = np.array(rows)
        lost, saved = found[name].T
        print(f"\n{name}: {(lost > POINTS).mean():.1%} of {SPLITS} splits lose more than {POINTS:g} points (mean "
              f"{lost.mean():.2f}, worst {lost.max():.2f}); {saved.mean():.0%} of the MACs are saved on average "
              f"({np.quantile(saved, 0.1):.0%} to {np.quantile(saved, 0.9):.0%} in 8 splits of 10)")  # fmt: skip
    draw(found)
    promised = found["promise, δ = 0.1"]
    assert (promised[:, 0] > POINTS).sum() <= 0.1 * SPLITS + 3.1 * math.sqrt(SPLITS * 0.1 * 0.9)
    assert promised[:, 1].mean() > 0.1


def draw(found):
    """Points lost against MACs saved, a dot per split."""
    figure = Figure((7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, rows), colour in zip(found.items(), ("#0072b2", "#d55e00"), strict=True):
        axes.plot(
            100 * rows[:, 1], rows[:, 0], "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0, label=name
        )
    axes.axhline(POINTS, color="#59636e", linewidth=1.2, linestyle="--")
    axes.annotate("1 point: what may be lost", (0.01, POINTS), (0, 4), ("axes fraction", "data"), "offset points")
    axes.set_xlabel("multiply-adds saved, %")
    axes.set_ylabel("accuracy lost on new samples, points")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d8dee4", linewidth=0.7)
    axes.legend(frameon=False, loc="center left", title="200 splits each, fitted by")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=90)
