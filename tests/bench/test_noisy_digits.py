"""Distillation under wrong labels: 5,000 digits, 0, 20 and 40 % symmetric noise in the training part, 3 seeds.

`pytest -m slow -s tests/bench/test_noisy_digits.py` prints the table of docs/noisy-labels.md. Each training leaves its
figures in runs/bench/noisy-digits, and one that is there is not trained again.

Models and distillation weights are selected on the validation part, which is clean; the test part is read once a
training. The teacher is trained on the noisy labels, as in the papers.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.gaussians import Gaussians, mlp, trained_teacher
from helpers.toys import make_trainer
from torch.utils.data import DataLoader, TensorDataset

from bdistil.callbacks import GradientNoise, LossMixing
from bdistil.data.digits import read_digits, stratified_split
from bdistil.data.label_noise import NoisyLabels
from bdistil.data.loaders import LOADERS, indexed_loaders
from bdistil.distillation import MixingSettings
from bdistil.distillation.module import Distillation
from bdistil.models.convnets import ConvStudent, StridedConvNet

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "runs" / "bench" / "noisy-digits"
SEEDS, RATES, GRID, EPOCHS = (0, 1, 2), (0.0, 0.2, 0.4), (0.5, 0.9, 1.0), 20
MIXING = {"ALM-KD": "convex", "AMAL": "independent"}


class NoisyDigits(pl.LightningDataModule):
    """3,500 training, 500 validation and 1,000 test digits; `with_val` adds the clean validation part to training."""

    def __init__(self, rate, seed, with_val=False):
        super().__init__()
        images, labels = read_digits()
        train, val, test = stratified_split(labels, (500, 1000), 0)
        noisy = NoisyLabels(TensorDataset(images[train], labels[train]), rate, classes=10, seed=seed)
        self.flipped = noisy.flipped
        self.train = TensorDataset(images[train], noisy.labels)
        self.train.flipped = noisy.flipped
        self.val, self.test = TensorDataset(images[val], labels[val]), TensorDataset(images[test], labels[test])
        if with_val:
            parts = zip(self.train.tensors, self.val.tensors, strict=True)
            self.train = TensorDataset(*(torch.cat(pair) for pair in parts))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=128, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=500)


class Cached(Distillation):
    """The teacher's answers are looked up by index: it is asked once for every image."""

    answers: torch.Tensor

    def teacher_logits(self, x, index=None):
        return self.answers[torch.from_numpy(index)]


class Best(pl.Callback):
    """Keeps the weights of the epoch with the best accuracy on the validation part."""

    best, state = -1.0, None

    def on_validation_epoch_end(self, trainer, pl_module):
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        if not trainer.sanity_checking and accuracy > self.best:
            self.best, self.state = accuracy, {k: v.clone() for k, v in pl_module.student.state_dict().items()}


@torch.no_grad()
def accuracy(student, part):
    """In points."""
    x, y = part.tensors
    return 100 * float((student.eval()(x).argmax(-1) == y).double().mean())


@torch.no_grad()
def answers(teacher, part):
    return torch.cat([teacher.eval()(x) for x in part.tensors[0].split(500)])


def train(student, teacher_answers, data, seed, *callbacks, epochs=EPOCHS, **options):
    """Fits a student; its accuracies at the last epoch and at the best on the validation part."""
    module, best = Cached(student, torch.nn.Identity(), **options), Best()
    module.answers = teacher_answers
    mixing = [callback for callback in callbacks if isinstance(callback, LossMixing)]
    trainer = make_trainer(best, *callbacks, epochs=epochs, enable_checkpointing=False, num_sanity_val_steps=0)
    if mixing:
        trainer.fit(module, datamodule=data)
    else:
        with indexed_loaders(data, seed, names=LOADERS[:1]):
            trainer.fit(module, datamodule=data)
    figures = {"last": accuracy(student, data.test), "val": best.best}
    student.load_state_dict(best.state)
    return figures | {"selected": accuracy(student, data.test), **(mixing[0].history[-1] if mixing else {})}


def kept(name, make):
    """The figures of a training: read where they are, else made and kept."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def student_of(seed):
    torch.manual_seed(seed)
    return ConvStudent(channels=(8, 16))


def teacher_of(rate, seed):
    """A wider network, trained on the noisy labels; the epoch that is best on the validation part."""
    data, file = NoisyDigits(rate, seed), RESULTS / f"teacher-{rate:g}-{seed}.pt"
    torch.manual_seed(seed)
    teacher = StridedConvNet(channels=(32, 64, 128))

    def fit():
        figures = train(
            teacher, torch.zeros(len(data.train), 10), data, seed, epochs=8, distillation_weight=0.0, lr=3e-3
        )
        torch.save(teacher.state_dict(), file)
        return figures

    figures = kept(f"teacher-{rate:g}-{seed}", fit)
    teacher.load_state_dict(torch.load(file, weights_only=True))
    return teacher, figures


def method(name, rate, seed, teacher):
    """Figures of one method."""
    with_val = name.endswith("+val")
    data = NoisyDigits(rate, seed, with_val)
    logits = answers(teacher, data.train)
    fixed = {f"KD {weight}": weight for weight in GRID} | {"CE": 0.0}
    if name in MIXING:
        settings = MixingSettings(mode=MIXING[name], warmup=3, every=3)
        callback = LossMixing(settings, folder=RESULTS / f"mixing-{name}-{rate:g}-{seed}", seed=seed)
        return train(student_of(seed), logits, data, seed, callback)
    weight = fixed[name.removesuffix("+val")]
    return train(student_of(seed), logits, data, seed, distillation_weight=weight)


def all_methods(rate, seed):
    """Figures by method; the weight of fixed KD is the best of the grid on the validation part."""
    teacher, figures = teacher_of(rate, seed)
    found = {"teacher": figures}

    def run(name):
        file = f"{name.replace(' ', '-')}-{rate:g}-{seed}"
        return kept(file, lambda: method(name, rate, seed, teacher))

    grid = {weight: run(f"KD {weight}") for weight in GRID}
    best = max(grid, key=lambda weight: grid[weight]["val"])
    found |= {"CE": run("CE"), "KD, best weight": grid[best] | {"weight": best}}
    found |= {"CE, also on val": run("CE+val"), "KD, also on val": run(f"KD {best}+val")}
    return found | {name: run(name) for name in MIXING}


def cell(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_mixing_under_wrong_labels():
    table = {rate: [all_methods(rate, seed) for seed in SEEDS] for rate in RATES}
    for rate, runs in table.items():
        print(f"\nnoise {rate:.0%}: test accuracy in points, mean ± sd of {len(SEEDS)} seeds")
        for name in runs[0]:
            last = cell([run[name]["last"] for run in runs])
            # Trained on the validation part, nothing can be selected on it.
            selected = "" if "also" in name else cell([run[name]["selected"] for run in runs])
            auc = [run[name]["auc"] for run in runs if "auc" in run[name]]
            print(f"  {name:<18} last {last:>11}  selected {selected:>11}" + (f"  auc {cell(auc)}" if auc else ""))
    for rate, runs in table.items():
        for name in MIXING:  # the claim of the table: mixing never costs a point
            gain = [run[name]["selected"] - run["KD, best weight"]["selected"] for run in runs]
            assert statistics.mean(gain) > -1.0, (rate, name, gain)


@pytest.mark.parametrize("mode", ["convex", "independent"])
def test_weights_tell_flipped_from_clean_labels(mode, tmp_path):
    areas = []
    for seed in SEEDS:
        data = Gaussians(rate=0.4, seed=seed)
        torch.manual_seed(seed)
        callback = LossMixing(MixingSettings(mode=mode, warmup=5, every=5), folder=tmp_path / str(seed), seed=seed)
        module = Distillation(mlp(32), trained_teacher(data, seed))
        make_trainer(callback, epochs=30, enable_checkpointing=False, limit_val_batches=0).fit(module, datamodule=data)
        areas.append(callback.history[-1]["auc"])
    print(f"\n{mode}: area under the ROC curve {statistics.mean(areas):.3f} ± {statistics.stdev(areas):.3f}")
    assert statistics.mean(areas) >= 0.8


@pytest.mark.parametrize(("name", "bound"), [("mixing", 0.15), ("noise", 0.05)])
def test_callbacks_cost_little_at_their_default_period(name, bound, tmp_path):
    """CPU time of 20 epochs: two updates of the weights, or five looks; interleaved, the smallest of three."""
    data = NoisyDigits(0.4, 0)
    logits, times = torch.randn(len(data.train), 10), {"plain": [], name: []}
    for turn in range(3):
        folder = tmp_path / str(turn)
        made = {"plain": [], "mixing": [LossMixing(MixingSettings(warmup=0), folder=folder)],
                "noise": [GradientNoise(folder=folder)]}  # fmt: skip
        for kind in times:
            started = time.process_time()
            train(student_of(0), logits, data, 0, *made[kind], epochs=20)
            times[kind].append(time.process_time() - started)
    overhead = min(times[name]) / min(times["plain"]) - 1
    print(f"\n{name} costs {overhead:.1%} of the training (bound {bound:.0%})")
    assert overhead <= bound
