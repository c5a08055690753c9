"""The packages that people would use instead, on the same digits, student, epochs and teacher.

    pip install 'bdistil[bench]'
    python -m pytest -m slow -s tests/bench/test_peers.py      # prints the table of docs/peers.md

torchdistill distils one student; Ensemble-PyTorch (`torchensemble`) boosts, votes and takes snapshots. Every training
leaves its figures in runs/bench/peers (BDISTIL_BENCH_DIR) and is not repeated.
"""

import os
import statistics
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.noisy import kept
from torch.utils.data import DataLoader, TensorDataset

from bdistil.cli.app import main
from bdistil.data.digits import Digits
from bdistil.metrics.cost import measure_cost
from bdistil.models.convnets import ConvStudent, StridedConvNet
from bdistil.storage.run_directory import RunDirectory
from bdistil.storage.weights import load_weights

# Warnings of other packages are theirs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RESULTS = Path(os.environ.get("BDISTIL_BENCH_DIR", "runs/bench")) / "peers"
SEEDS, ROUNDS, EPOCHS, LR = (0, 1, 2), 6, 20, 0.03
STUDENT = {"channels": (3, 6)}
LARGE = {"channels": (9, 17)}  # costs what six students cost
WEIGHT, TEMPERATURE = 0.9, 4.0
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Clock:
    """CPU seconds since it was made, and at each lap."""

    def __init__(self):
        self.started, self.laps = time.process_time(), []

    def lap(self):
        self.laps.append(time.process_time() - self.started - sum(self.laps))

    def figures(self, accuracies, macs):
        self.lap()
        return {"accuracy": accuracies, "macs": macs, "seconds": sum(self.laps), "laps": self.laps}


class LapLoader(DataLoader):
    """A validation loader; torchensemble reads it after each student that it has boosted."""

    clock = None

    def __iter__(self):
        self.clock.lap()
        return super().__iter__()


def parts():
    data = Digits()
    data.setup()
    return data.parts


def loader(dataset, **options):
    return DataLoader(dataset, batch_size=128, shuffle=True, **options)


def macs_of(options):
    return measure_cost(ConvStudent(**options), (torch.zeros(1, 1, 28, 28),)).macs


@torch.no_grad()
def prefix_accuracies(students, test, *, probabilities):
    """Test accuracy in points of the first 1 … T students: sums of logits, or means of probabilities."""
    x, y = test.tensors
    answers = torch.stack([student.eval()(x) for student in students])
    answers = answers.softmax(-1) if probabilities else answers
    return [100 * float((total.argmax(-1) == y).double().mean()) for total in answers.cumsum(0)]


# ---- bdistil


def bdistil(seed):
    """The recipe `digits`, 20 epochs a student; trains the teacher that all methods use."""
    folder = RESULTS / f"run-{seed}"
    args = ["fit", "--config", "digits", "--run_dir", str(folder), "--seed_everything", str(seed)]
    args += ["--tracking.mode", "disabled", "--trainer.enable_progress_bar", "false"]
    teacher = folder / "teacher.safetensors"
    if not teacher.exists():
        options = ["--model.boosting.rounds", "1", "--trainer.max_epochs", "1"]
        assert main([*args[:4], str(RESULTS / f"teacher-{seed}"), *args[5:], *options]) == 0
        teacher = RESULTS / f"teacher-{seed}" / "teacher.safetensors"
    options = ["--model.teacher.checkpoint", str(teacher), "--trainer.max_epochs", str(EPOCHS)]
    clock = Clock()
    assert main([*args, *options]) == 0
    rows = RunDirectory(folder).read_curve()[1:]
    return clock.figures([100 * float(r["test_accuracy"]) for r in rows], [int(r["macs"]) for r in rows])


def teacher_of(seed):
    net = StridedConvNet((48, 64, 128), dropout=0.3)
    load_weights(net, RESULTS / f"teacher-{seed}" / "teacher.safetensors", "teacher")
    return net.requires_grad_(False).eval()


# ---- one student: Lightning and torchdistill


class PlainKD(L.LightningModule):
    """The distillation that people write by hand."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, goal = self.student(x), self.teacher.eval()(x)
        soft = F.kl_div((logits / TEMPERATURE).log_softmax(-1), (goal / TEMPERATURE).softmax(-1), reduction="batchmean")
        return (1 - WEIGHT) * F.cross_entropy(logits, y) + WEIGHT * TEMPERATURE**2 * soft

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.student.parameters(), LR)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def lightning_kd(seed, options):
    data, student = parts(), ConvStudent(**options)
    clock = Clock()
    L.Trainer(accelerator="cpu", max_epochs=EPOCHS, **QUIET).fit(
        PlainKD(student, teacher_of(seed)), loader(data["train"])
    )
    return clock.figures(prefix_accuracies([student], data["test"], probabilities=False), [macs_of(options)])


def torchdistill_kd(seed, options):
    box_of = pytest.importorskip("torchdistill.core.distillation").get_distillation_box
    data, student = parts(), ConvStudent(**options)
    paths = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    kd = {"key": "KDLoss", "kwargs": {**paths, "temperature": TEMPERATURE, "alpha": 1 - WEIGHT}}
    config = {
        "num_epochs": EPOCHS,
        "train_data_loader": {
            "dataset_id": "train", "kwargs": {"batch_size": 128},
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LR}},
        "scheduler": {"key": "CosineAnnealingLR", "kwargs": {"T_max": EPOCHS}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }  # fmt: skip
    clock = Clock()
    box = box_of(teacher_of(seed), student, {"train": data["train"]}, config, torch.device("cpu"), None, False, 1.0)
    for epoch in range(EPOCHS):
        box.pre_epoch_process(epoch=epoch)
        for x, y, more in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(x, targets=y, supp_dict=more)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    return clock.figures(prefix_accuracies([student], data["test"], probabilities=False), [macs_of(options)])


# ---- T students: Ensemble-PyTorch


def ensemble(name, students=ROUNDS):
    made = getattr(pytest.importorskip("torchensemble"), name)
    model = made(estimator=ConvStudent, n_estimators=students, estimator_args=STUDENT, cuda=False)
    model.set_optimizer("AdamW", lr=LR)
    if name != "SnapshotEnsembleClassifier":  # sets its own
        model.set_scheduler("CosineAnnealingLR", T_max=EPOCHS)
    return model


def fitted(name, train, seed, *, probabilities, val=None, epochs=EPOCHS, **options):
    """A test_loader is what makes torchensemble stop early, and here what times its students; it never stops."""
    model, test, clock = ensemble(name), parts()["test"], Clock()
    if val is not None:
        looks = LapLoader(val, batch_size=500)
        looks.clock = clock
        options |= {"test_loader": looks, "early_stopping_rounds": ROUNDS + 1}
    model.fit(loader(train), epochs=epochs, save_model=False, **options)
    clock.laps = clock.laps[:ROUNDS]
    figures = {"seconds": time.process_time() - clock.started, "laps": clock.laps}
    accuracies = prefix_accuracies(list(model), test, probabilities=probabilities)
    return {"accuracy": accuracies, "macs": [macs_of(STUDENT) * n for n in range(1, len(model) + 1)], **figures}


def with_logits(part, seed):
    """The teacher's logits of a part as regression targets, centred, with rms 1."""
    x = part.tensors[0]
    logits = torch.cat([*map(teacher_of(seed), x.split(500))])
    logits = logits - logits.mean(1, keepdim=True)
    return TensorDataset(x, logits / logits.square().mean().sqrt())


def boosted_labels(seed):
    data = parts()
    return fitted("GradientBoostingClassifier", data["train"], seed, probabilities=False, val=data["val"])


def boosted_logits(seed):
    train, val = (with_logits(parts()[name], seed) for name in ("train", "val"))
    return fitted("GradientBoostingRegressor", train, seed, probabilities=False, val=val)


def voting(seed):
    return fitted("VotingClassifier", parts()["train"], seed, probabilities=True)


def snapshot(seed):
    return fitted("SnapshotEnsembleClassifier", parts()["train"], seed, probabilities=True, epochs=ROUNDS * EPOCHS)


METHODS = {
    "bdistil, recipe `digits`": bdistil,
    "Lightning, KD by hand": lambda seed: lightning_kd(seed, STUDENT),
    "… a student of six times the cost": lambda seed: lightning_kd(seed, LARGE),
    "torchdistill, KD": lambda seed: torchdistill_kd(seed, STUDENT),
    "… a student of six times the cost ": lambda seed: torchdistill_kd(seed, LARGE),
    "torchensemble, gradient boosting on labels": boosted_labels,
    "… on the teacher's logits": boosted_logits,
    "torchensemble, voting": voting,
    "torchensemble, snapshots": snapshot,
}


def figures(name, seed):
    def fit():
        L.seed_everything(seed, verbose=False)
        return METHODS[name](seed)

    file = "".join(letter if letter.isalnum() else "_" for letter in name)
    return kept(RESULTS / f"{file}-{seed}.json", fit)


def cell(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_peers():
    torch.set_num_threads(1)
    runs = {name: [figures(name, seed) for seed in SEEDS] for name in METHODS}
    print("\n| | MACs of all | accuracy, 1 student | 2 | 4 | 6 | training, CPU s | last student's seconds / first's |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in runs.items():
        curve = [cell(values) for values in zip(*(run["accuracy"] for run in found), strict=True)]
        shown = [curve[t - 1] if t <= len(curve) else "" for t in (1, 2, 4, 6)]
        laps = [run["laps"][-1] / run["laps"][0] for run in found if len(run["laps"]) == ROUNDS]
        growth = cell(laps) if laps else ""
        seconds = cell([run["seconds"] for run in found])
        print(f"| {name} | {found[0]['macs'][-1] / 1000:.0f}k | {' | '.join(shown)} | {seconds} | {growth} |")
    last = {name: statistics.mean(run["accuracy"][-1] for run in found) for name, found in runs.items()}
    ours = last["bdistil, recipe `digits`"]
    assert ours > last["torchensemble, voting"]
    assert ours > last["torchensemble, gradient boosting on labels"]
