"""Images of stripes, a model behind an API that knows them, and runs of MEKD on both."""

import os
import signal

import lightning as L
import torch
from helpers.toys import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import ApiTeacher
from bdistil.distillation.mekd.run import Emulation, Mekd

CLASSES, SHAPE, LOCAL, HELD_OUT = 3, (1, 8, 8), 24, 8
SMALL = {"queries": 60, "first_queries": 20, "width": 4, "critic_width": 2, "gan_epochs": 2, "gan_batch_size": 8,
         "epochs": 2, "batch_size": 16}  # fmt: skip


def images(count, seed):
    """One bright stripe an image; its place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = 0.1 * torch.randn(count, *SHAPE, generator=generator)
    x[torch.arange(count), 0, 2 * labels + 1] += 1
    return x, labels


def answer(batch):
    """The model behind the API: how bright each stripe is, 8 times."""
    return 8 * batch.reshape(len(batch), 8, 8)[:, [1, 3, 5]].mean(-1)


class Local(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*images(LOCAL, 1)), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*images(HELD_OUT, 2)), batch_size=8)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*images(200, 3)), batch_size=100)


class Model:
    """Answers, and keeps count, on the disk too where the process may be killed."""

    name = "stripes"

    def __init__(self, hard=False, log=None, kill_at=None):
        self.hard, self.log, self.kill_at, self.asked = hard, log, kill_at, []

    def __call__(self, batch):
        self.asked += [row.tobytes() for row in batch]
        if self.kill_at is not None and len(self.asked) >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.writelines(f"{row.tobytes().hex()}\n" for row in batch)
        logits = answer(batch)
        return logits.argmax(-1) if self.hard else logits


def teacher_of(folder, model):
    kind = "labels" if model.hard else "logits"
    return ApiTeacher(model, CLASSES, folder / "answers.sqlite", answers=kind, name="toy", batch_size=16)


def make_student(round=0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))


def emulate(folder, model=None, trainer=make_trainer, **settings):
    model = model or Model()
    settings = Mekd(**{**SMALL, **settings})
    return Emulation(
        settings, teacher_of(folder, model), Local(), folder / "mekd", seed=5,
        make_trainer=lambda max_epochs, callbacks, **options: trainer(*callbacks, epochs=max_epochs, **options),
    )  # fmt: skip


def unsaved(*callbacks, **options):
    return make_trainer(*callbacks, enable_checkpointing=False, **options)
