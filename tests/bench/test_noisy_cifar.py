"""Distillation under wrong labels: all of CIFAR-10, 0, 20 and 40 % symmetric noise in the training part, 3 seeds.

`BDISTIL_DATA=DATA pytest -m slow -s tests/bench/test_noisy_cifar.py` prints the table of docs/noisy-labels.md; DATA
holds the folder `cifar-10-batches-py`. Each training leaves its figures in runs/bench/noisy-cifar (BDISTIL_BENCH_DIR),
and one that is there is not trained again. Student and teacher are what fits on a core, 0.7 and 10 million MACs, and
images are not augmented.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
import torch
from helpers.noisy import NoisyBench, gains, show

from bdistil.data.cifar import Cifar10
from bdistil.data.readers import validation_split
from bdistil.models.convnets import ConvStudent, StridedConvNet

pytestmark = pytest.mark.slow

RESULTS = Path(os.environ.get("BDISTIL_BENCH_DIR", "runs/bench")) / "noisy-cifar"
SEEDS, RATES, EPOCHS = (0, 1, 2), (0.4, 0.2, 0.0), 10
MIXING = {
    "ALM-KD": {"mode": "convex", "warmup": 2, "every": 2},
    "AMAL": {"mode": "independent", "warmup": 2, "every": 2},
}
# What might be why mixing is not better: each a change of one choice.
VARIANTS = {
    "ALM-KD, outer loss on val alone": {**MIXING["ALM-KD"], "train_share": 0.0},
    "ALM-KD, the same, rate 0.2": {**MIXING["ALM-KD"], "train_share": 0.0, "rate": 0.2},
    "AMAL, rate 0.2": {**MIXING["AMAL"], "rate": 0.2},
    "AMAL, every epoch": {"mode": "independent", "warmup": 1, "every": 1},
    "AMAL, the authors' step": {**MIXING["AMAL"], "look_ahead": "lr", "normalise": False, "rate": 1.0},
}
KNOWN = {
    "right labels and teacher, else teacher": ((0.5, 0.5), (0.0, 1.0)),
    "right labels, else teacher": ((1.0, 0.0), (0.0, 1.0)),
    "right labels alone": ((1.0, 0.0), (0.0, 0.0)),
}


@pytest.fixture(scope="module")
def parts():
    """45,000 training, 5,000 validation and 10,000 test images, in memory."""
    if "BDISTIL_DATA" not in os.environ:
        pytest.skip("BDISTIL_DATA names no folder with the files of CIFAR-10")
    torch.set_num_threads(1)
    source = Cifar10(os.environ["BDISTIL_DATA"])
    (images, labels), (test, test_labels) = source.read()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (source.MEAN, source.STD))
    train, val = validation_split(labels, 5000, 0)
    found = {"train": (images[train], labels[train]), "val": (images[val], labels[val]), "test": (test, test_labels)}
    return {name: ((x / 255 - mean) / std, y) for name, (x, y) in found.items()}


@pytest.fixture(scope="module")
def bench(parts):
    return NoisyBench(
        RESULTS, parts, lambda: ConvStudent((16, 32, 64), in_channels=3).to(memory_format=torch.channels_last),
        lambda: StridedConvNet((64, 128, 256), in_channels=3).to(memory_format=torch.channels_last), epochs=EPOCHS,
        teacher_options={"epochs": 6, "lr": 3e-3}, mixing={**MIXING, **VARIANTS}, known=KNOWN, one_noise=True,
    )  # fmt: skip


@pytest.mark.parametrize("rate", RATES)
def test_mixing_under_wrong_labels(bench, rate):
    runs = [bench.figures(rate, seed, MIXING) for seed in SEEDS]
    show(rate, runs)
    assert statistics.mean(gains(runs, "AMAL")) > -1.0  # it never costs a point; ALM-KD does


def test_what_limits_it(bench):
    """Seed 0 at 40 %: who knew the wrong labels would be better."""
    logits, _ = bench.teacher(0.4, 0)
    found = {name: bench.method(name, 0.4, 0, logits) for name in (*VARIANTS, *KNOWN)}
    for name, figures in found.items():
        auc = f", auc {figures['auc']:.2f}" if "auc" in figures else ""
        print(f"{name}: last {figures['last']:.1f}, selected {figures['selected']:.1f}{auc}")
    best = "right labels and teacher, else teacher"
    assert found[best]["selected"] > max(found[name]["selected"] for name in VARIANTS) + 1.0
