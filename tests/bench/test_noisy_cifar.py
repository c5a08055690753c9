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


@pytest.mark.parametrize("rate", RATES)
def test_mixing_under_wrong_labels(parts, rate):
    bench = NoisyBench(
        RESULTS, parts, lambda: ConvStudent((16, 32, 64), in_channels=3).to(memory_format=torch.channels_last),
        lambda: StridedConvNet((64, 128, 256), in_channels=3).to(memory_format=torch.channels_last), epochs=EPOCHS,
        teacher_options={"epochs": 6, "lr": 3e-3}, mixing=MIXING, one_noise=True,
    )  # fmt: skip
    runs = [bench.figures(rate, seed) for seed in SEEDS]
    show(rate, runs)
    for name in MIXING:  # the claim of the table: mixing never costs a point
        assert statistics.mean(gains(runs, name)) > -1.0, (rate, name, gains(runs, name))
