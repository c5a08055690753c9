"""MEKD on MNIST: students from an API and a tenth of the training images, unlabelled, against plain distillation.

    python tests/bench/mnist_mekd.py --data DATA --out runs/bench-mnist-mekd          # the table of docs/mekd.md
    python tests/bench/mnist_mekd.py --data DATA --out runs/bench-mnist-mekd --levers # what was tried, on seed 0
    python tests/bench/mnist_mekd.py --data DATA --paper_width 10000 --sizes large --kinds soft   # width 128

Every result is one line of OUT/results.jsonl and is not computed again; an interrupted training goes on. Settings were
chosen on seed 0 by the student's agreement with the API on the held-out images; the test part is read once a training.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from pathlib import Path

import lightning as L
import torch

from bdistil import ApiTeacher
from bdistil.data.loaders import indexed_loaders
from bdistil.data.mnist import LocalMnist, Mnist
from bdistil.distillation.mekd import MappingEmulation
from bdistil.distillation.mekd.run import Emulation, Mekd
from bdistil.distillation.mekd.samples import AnsweredSamples, answers_of, distinct_local, repeated
from bdistil.distillation.mekd.stage import run_stage
from bdistil.models.convnets import ConvStudent, StridedConvNet
from bdistil.storage.weights import load_weights, save_weights
from bdistil.teachers.training import TeacherSpec, TeacherTraining
from bdistil.utils.seeding import seed_of

SEEDS, KINDS, QUERIES = (0, 1, 2), ("soft", "hard"), (10_000, 100_000)
FIRST, LOCAL, HELD_OUT = 500, 4_800, 1_200  # queries of stage 1; local images for training, and held out
BATCH, STEPS = 64, 3_000  # of every student, whatever it learns from
STUDENTS = {"small": (3, 6), "large": (16, 32)}  # channels; 13 and 256 thousand MACs
GAN = {"width": 32, "gan_epochs": 80, "gan_lr": 1e-3, "average": 0.99, "shift": 0}  # 75 steps an epoch
ADAMW = {"optimizer": "adamw", "lr": 0.03}
# One change each from the row before them all, on seed 0.
STAGE_1 = {
    "width 16, 37 epochs": {"width": 16, "gan_epochs": 37},
    "width 32, 80 epochs": {},
    "width 64, 80 epochs": {"width": 64},
    "shift 2": {"shift": 2},
    "no teacher term": {"share": 0.0},
}
STAGE_2 = {"image loss x 4": {"kl": 0.25}, "image loss / 4": {"kl": 4.0}, "58 % local": {"local_share": 0.58}}


class ChannelsLast(L.Callback):
    """Convolutions on a CPU are faster with the channels last."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.to(memory_format=torch.channels_last)


def make_trainer(callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, precision="bf16-mixed", callbacks=[*callbacks, ChannelsLast()],
                     **quiet, **options)  # fmt: skip


def epochs_of(samples):
    """About as many steps for all."""
    return max(1, round(STEPS / math.ceil(samples / BATCH)))


class Bench:
    """The data, the API and the results of one folder."""

    def __init__(self, data, out):
        self.data, self.out, self.lines = data, out, out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self.local = LocalMnist(data, held_out=HELD_OUT / (LOCAL + HELD_OUT))
        self.local.setup("fit")
        self.images, self.held_out = (self.local.parts[name].tensors[0] for name in ("train", "val"))
        self.net = self.network()

    def network(self):
        """The network behind the API: trained once, on the 55,000 training images of `Mnist`."""
        net, path = StridedConvNet((32, 64, 128), dropout=0.3), self.out / "teacher.safetensors"
        if not path.exists():
            L.seed_everything(0, verbose=False)
            data = Mnist(self.data)
            with indexed_loaders(data, 0):
                make_trainer(max_epochs=4, enable_checkpointing=False).fit(
                    TeacherTraining(TeacherSpec(net, epochs=4)), data
                )
            save_weights(net.cpu(), path)
        load_weights(net, path, "teacher")
        return net.requires_grad_(False).eval()

    def api(self, kind, folder):
        def ask(batch):
            logits = self.net(torch.from_numpy(batch))
            return logits.softmax(-1) if kind == "soft" else logits.argmax(-1)

        answers = "probabilities" if kind == "soft" else "labels"
        return ApiTeacher(ask, 10, folder / "answers.sqlite", answers=answers, name="mnist", batch_size=512)

    def once(self, name, make):
        """The result of a training, made once."""
        known = [json.loads(line) for line in self.lines.read_text().splitlines()] if self.lines.exists() else []
        found = next((line for line in known if line["name"] == name), None)
        if found is None:
            started, cpu = time.time(), time.process_time()
            found = {"name": name, **make()}
            found |= {"seconds": round(time.time() - started), "cpu_seconds": round(time.process_time() - cpu)}
            with self.lines.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(found, flush=True)
        return found

    def accuracy(self, student):
        x, y = self.local.parts["test"].tensors
        with torch.no_grad():
            return float((torch.cat([*map(student.cpu().eval(), x.split(500))]).argmax(-1) == y).float().mean())

    def emulation(self, kind, seed, queries, name="", **changes):
        """A run of MEKD; those with equal stage 1 share it."""
        share = changes.get("local_share", 0.0)
        left = queries - FIRST - HELD_OUT
        generated = left - distinct_local(left, LOCAL, share)
        samples = generated + len(repeated(torch.empty(LOCAL, 1), generated, share))
        common = {"first_queries": FIRST, "batch_size": BATCH, **GAN, **ADAMW, **changes}
        settings = Mekd(queries=queries, epochs=epochs_of(samples), **common)
        stage_1 = {k: v for k, v in changes.items() if k not in ("kl", "local_share", "tau")}
        key = "-".join([kind, str(seed), *(f"{k}={v}" for k, v in sorted(stage_1.items()))])
        first, folder = self.out / f"first-{key}", self.out / f"run-{key}-{queries}-{name.replace(' ', '_')}"
        if not (first / "stage1" / "done.json").exists():
            once = Mekd(queries=10_000, epochs=1, **{**common, "kl": 1.0, "local_share": 0.0})
            Emulation(once, self.api(kind, first), self.local, first, seed=seed, make_trainer=make_trainer).generator()
        if not (folder / "stage1").exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(first / "answers.sqlite", folder)
            shutil.copytree(first / "stage1", folder / "stage1")
        return Emulation(settings, self.api(kind, folder), self.local, folder, seed=seed, make_trainer=make_trainer)

    def mekd(self, size, kind, seed, queries, label="", **changes):
        """Figures of MEKD, and of plain distillation on its samples (no image loss)."""
        name = f"mekd {size} {kind} {seed} {queries} {label}".strip()

        def make():
            run = self.emulation(kind, seed, queries, f"{size} {label}", **changes)
            train, val = run.answered(generator := run.generator())
            figures = run.student(self.student(size, seed), generator, train, val)
            best = json.loads((run.folder / "stage2" / "done.json").read_text())
            samples = looks(train[1][: run.pool], kind)
            return {"accuracy": figures["test_accuracy"], "agreement": -best["score"], "queries": figures["queries"],
                    **samples}  # fmt: skip

        return self.once(name, make)

    def student(self, size, seed):
        torch.manual_seed(seed_of(seed, "student"))
        return ConvStudent(STUDENTS[size])

    def plain(self, size, kind, seed, label, x):
        """Plain distillation on images x, its best epoch chosen by the same held-out images."""

        def make():
            folder = self.out / f"plain-{size}-{label.replace(' ', '_')}-{kind}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            teacher = self.api(kind, folder)
            train, val = (x, answers_of(teacher, x)), (self.held_out, answers_of(teacher, self.held_out))
            stage = MappingEmulation(self.student(size, seed), None, hard=kind == "hard", seed=seed, **ADAMW)
            best = run_stage(stage, AnsweredSamples(train, val, BATCH), folder / "stage2", epochs=epochs_of(len(x)),
                             seed=seed, make_trainer=make_trainer)  # fmt: skip
            return {"accuracy": self.accuracy(stage.student), "agreement": -best["score"], "queries": teacher.queries,
                    **looks(train[1], kind)}  # fmt: skip

        return self.once(f"plain {size} {kind} {seed} {label}", make)

    def on_local(self, size, kind, seed):
        return self.plain(size, kind, seed, "local", self.images)

    def on_generated(self, size, kind, seed, queries, **changes):
        """Plain distillation on MEKD's samples: what the samples alone are worth."""
        run = self.emulation(kind, seed, queries, f"{size} ", **changes)
        (x, _), _ = run.answered(run.generator())
        return self.plain(size, kind, seed, f"generated {queries}", x)


def looks(answers, kind):
    """How sure the API is of samples, and the share near its decision boundary (margin of the top two below 0.5)."""
    top = answers.softmax(-1).topk(2, -1).values
    classes = answers.argmax(-1).bincount(minlength=answers.shape[1]).tolist()
    return {"sure": float(top[:, 0].mean()), "near": float((top[:, 0] - top[:, 1] < 0.5).float().mean()),
            "classes": classes} if kind == "soft" else {"classes": classes}  # fmt: skip


def levers(bench, size):
    """Each lever on seed 0, soft answers."""
    bench.on_local(size, "soft", 0)
    for label, changes in STAGE_1.items():
        bench.mekd(size, "soft", 0, 10_000, label, **changes)
    for label, changes in STAGE_2.items():
        bench.mekd(size, "soft", 0, 10_000, label, **changes)


def shown(results):
    """Mean ± sd in points."""
    values = [100 * line["accuracy"] for line in results]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def table(bench, sizes, kinds, seeds):
    """The rows of docs/mekd.md."""
    for size in sizes:
        for kind in kinds:
            rows = {"plain, local": [bench.on_local(size, kind, seed) for seed in seeds]}
            for queries in QUERIES:
                rows[f"MEKD {queries}"] = [bench.mekd(size, kind, seed, queries) for seed in seeds]
            mixed = [bench.mekd(size, kind, seed, QUERIES[0], "58 % local", local_share=0.58) for seed in seeds]
            rows[f"MEKD {QUERIES[0]}, 58 % of the samples local"] = mixed
            for name, results in rows.items():
                print(f"| {size} | {kind} | {name} | {shown(results)} |", flush=True)


def paper_width(bench, sizes, kinds, seeds, numbers=QUERIES):
    """MEKD with a generator and a discriminator as wide as the paper's; a training takes an hour or more."""
    for size in sizes:
        for kind in kinds:
            for queries in numbers:
                rows = [bench.mekd(size, kind, seed, queries, "width 128", width=128) for seed in seeds]
                print(f"| {size} | {kind} | MEKD {queries}, width 128 | {shown(rows)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-mnist-mekd"))
    parser.add_argument("--levers", action="store_true")
    parser.add_argument("--paper_width", nargs="*", type=int, choices=QUERIES, help="numbers of queries")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--sizes", nargs="+", default=[*STUDENTS], choices=STUDENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(chosen.data, chosen.out)
    if chosen.levers:
        for size in chosen.sizes:
            levers(bench, size)
    elif chosen.paper_width is not None:
        paper_width(bench, chosen.sizes, chosen.kinds, chosen.seeds, chosen.paper_width or QUERIES)
    else:
        table(bench, chosen.sizes, chosen.kinds, chosen.seeds)


if __name__ == "__main__":
    main()
