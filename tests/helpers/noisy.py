"""Distillation methods under wrong labels, for the benches; each training keeps its figures in a file."""

import json
import statistics

import lightning.pytorch as pl
import torch
from helpers.toys import make_trainer
from torch.utils.data import DataLoader, TensorDataset

from bdistil.callbacks import LossMixing
from bdistil.data.label_noise import NoisyLabels
from bdistil.data.loaders import LOADERS, indexed_loaders
from bdistil.distillation import MixingSettings
from bdistil.distillation.module import Distillation


class NoisyParts(pl.LightningDataModule):
    """Three parts (x, y), of which the training part has wrong labels; `with_val` adds the clean validation part to it.

    `seed` is that of the wrong labels.
    """

    def __init__(self, parts, rate, seed, with_val=False):
        super().__init__()
        images, labels = parts["train"]
        noisy = NoisyLabels(TensorDataset(images, labels), rate, classes=10, seed=seed)
        self.flipped = noisy.flipped
        self.train = TensorDataset(images, noisy.labels)
        self.train.flipped = noisy.flipped
        self.val, self.test = TensorDataset(*parts["val"]), TensorDataset(*parts["test"])
        if with_val:
            pairs = zip(self.train.tensors, self.val.tensors, strict=True)
            self.train = TensorDataset(*(torch.cat(pair) for pair in pairs))

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


def train(student, teacher_answers, data, seed, *callbacks, epochs, weights=None, **options):
    """Fits a student; its accuracies at the last epoch and at the best on the validation part.

    `weights` (N, 2) of the label loss and the teacher loss of each sample replace those of the options.
    """
    module, best = Cached(student, torch.nn.Identity(), **options), Best()
    module.answers = teacher_answers
    if weights is not None:
        module.sample_weights = lambda index: weights[torch.from_numpy(index)]
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


def kept(file, make):
    """The figures of a training: read where they are, else made and kept."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


class NoisyBench:
    """Methods on the same parts: CE, KD of fixed weight, both also trained on the validation part, and LossMixing.

    Models are selected on the validation part, which is clean; the test part is read once a training. The teacher is
    trained on the noisy labels, as in the papers, unless `clean_teacher`.

    Args:
        folder: of the figures.
        parts: (x, y) of train, val and test.
        make_student: makes the student.
        make_teacher: makes the teacher.
        epochs: of students.
        teacher_options: of the teacher's training, with its epochs.
        mixing: of MixingSettings, by name of the method.
        known: weights of the two losses for samples with a right and with a wrong label, by name of the method; what
            nobody knows but the bench.
        grid: weights of KD that are tried.
        one_noise: wrong labels and teacher are the same for all seeds, and the weight of KD is chosen on seed 0.
    """

    def __init__(
        self, folder, parts, make_student, make_teacher, *, epochs, teacher_options, mixing, known=None,
        grid=(0.5, 0.9, 1.0), one_noise=False,
    ):  # fmt: skip
        self.known = known or {}
        self.folder, self.parts, self.make_student, self.make_teacher = folder, parts, make_student, make_teacher
        self.epochs, self.teacher_options, self.mixing, self.grid = epochs, teacher_options, mixing, grid
        self.one_noise = one_noise

    def data(self, rate, seed, with_val=False):
        return NoisyParts(self.parts, rate, 0 if self.one_noise else seed, with_val)

    def teacher(self, rate, seed):
        """Its answers to the training part and then the validation part, and its figures."""
        seed = 0 if self.one_noise else seed
        name, data = f"teacher-{rate:g}-{seed}", self.data(rate, seed)
        torch.manual_seed(seed)
        teacher, file = self.make_teacher(), self.folder / f"{name}.pt"

        def fit():
            figures = train(
                teacher, torch.zeros(len(data.train), 10), data, seed, distillation_weight=0.0, **self.teacher_options
            )
            torch.save(teacher.state_dict(), file)
            return figures

        figures = kept(self.folder / f"{name}.json", fit)
        teacher.load_state_dict(torch.load(file, weights_only=True))
        return torch.cat([answers(teacher, part) for part in (data.train, data.val)]), figures

    def method(self, name, rate, seed, logits):
        """Figures of one method."""

        def fit():
            torch.manual_seed(seed)
            student, data = self.make_student(), self.data(rate, seed, name.endswith("+val"))
            if name in self.mixing:
                settings = MixingSettings(**self.mixing[name])
                callback = LossMixing(settings, folder=self.folder / f"mixing-{name}-{rate:g}-{seed}", seed=seed)
                return train(student, logits, data, seed, callback, epochs=self.epochs)
            if name in self.known:
                right, wrong = map(torch.tensor, self.known[name])
                weights = torch.where(data.flipped[:, None], wrong, right)
                return train(student, logits, data, seed, epochs=self.epochs, weights=weights)
            weight = 0.0 if name.startswith("CE") else float(name.removeprefix("KD ").removesuffix("+val"))
            return train(student, logits, data, seed, epochs=self.epochs, distillation_weight=weight)

        return kept(self.folder / f"{name.replace(' ', '-')}-{rate:g}-{seed}.json", fit)

    def best_weight(self, rate, seed, logits):
        """The weight of fixed KD with the best accuracy on the validation part."""
        seed = 0 if self.one_noise else seed
        return max(self.grid, key=lambda weight: self.method(f"KD {weight}", rate, seed, logits)["val"])

    def figures(self, rate, seed, mixing=None):
        """Figures by method; of the mixing methods, all or those that are named."""
        logits, figures = self.teacher(rate, seed)
        weight = self.best_weight(rate, seed, logits)
        rows = {"CE": "CE", "KD, best weight": f"KD {weight}", **{name: name for name in mixing or self.mixing}}
        rows |= {"CE, also on val": "CE+val", "KD, also on val": f"KD {weight}+val"}
        found = {row: self.method(name, rate, seed, logits) for row, name in rows.items()}
        return {"teacher": figures, **found, "KD, best weight": found["KD, best weight"] | {"weight": weight}}


def cell(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def show(rate, runs):
    """Prints the figures of the seeds of one noise rate."""
    print(f"\nnoise {rate:.0%}: test accuracy in points, mean ± sd of {len(runs)} seeds")
    for name in runs[0]:
        last = cell([run[name]["last"] for run in runs])
        # Trained on the validation part, nothing can be selected on it.
        selected = "" if "also" in name else cell([run[name]["selected"] for run in runs])
        auc = [run[name]["auc"] for run in runs if "auc" in run[name]]
        print(f"  {name:<18} last {last:>11}  selected {selected:>11}" + (f"  auc {cell(auc)}" if auc else ""))


def gains(runs, name):
    """Of a method above the best fixed weight, in points, one per seed."""
    return [run[name]["selected"] - run["KD, best weight"]["selected"] for run in runs]
