"""What MEKD trains on: samples with the teacher's answers, in memory and on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bdistil.boosting.ledger import rows as row_files
from bdistil.distillation.mekd.deprivatization import latents
from bdistil.distillation.mekd.networks import Generator
from bdistil.storage.files import atomic
from bdistil.teachers.api import ApiTeacher

# Samples that are made at once: fixed, for the last bits of a batched product depend on the batch, and with them the
# key under which an answer is remembered.
MADE_AT_ONCE = 256
Answered = tuple[Tensor, Tensor]  # x (N, ...) and the teacher's logits (N, L)


class AnsweredSamples(pl.LightningDataModule):
    """Training and validation samples with the teacher's answers, for stage 2: (x, logits).

    Args:
        train: of the training part.
        val: of the validation part.
        batch_size: of training.
    """

    def __init__(self, train: Answered, val: Answered, batch_size: int) -> None:
        super().__init__()
        self.parts = {name: TensorDataset(x, self.target(y)) for name, (x, y) in (("train", train), ("val", val))}
        self.batch_size = batch_size

    def target(self, answers: Tensor) -> Tensor:
        """What stands beside x."""
        return answers

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the training part, shuffled."""
        return DataLoader(self.parts["train"], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation part."""
        return DataLoader(self.parts["val"], batch_size=500)


class GeneratedSamples(AnsweredSamples):
    """The same for a boosting run, which asks the teacher itself: (x, the teacher's class), as labels there are none.

    Accuracies on the validation part are then agreement with the teacher.

    Args:
        train: of the training part: generated.
        val: of the validation part: local and held out.
        batch_size: of training.
        local: the data module that the local samples come from; its test part is the test part here.
    """

    def __init__(self, train: Answered, val: Answered, batch_size: int, local: pl.LightningDataModule) -> None:
        super().__init__(train, val, batch_size)
        self.local = local

    def target(self, answers: Tensor) -> Tensor:
        """The teacher's top-1 class."""
        return answers.argmax(-1)

    def setup(self, stage: str | None = None) -> None:
        """Sets up the test part."""
        if stage == "test":
            self.local.setup("test")

    def test_dataloader(self) -> Any:
        """The test part of the local data module, with its labels."""
        return self.local.test_dataloader()


def samples_of(loader: DataLoader[Any]) -> Tensor:
    """All x (N, ...) of a loader's dataset, in its order."""
    data: Any = loader.dataset
    return torch.cat([loader.collate_fn([data[number]])[0] for number in range(len(data))])


def repeated(samples: Tensor, others: int, share: float) -> Tensor:
    """Local samples (N, ...), as often as it takes to be a share of all beside so many others; at least once."""
    copies = max(1, round(share / (1 - share) * others / len(samples))) if share else 0
    return samples.repeat(copies, *[1] * (samples.ndim - 1))


@torch.no_grad()
def generate(generator: Generator, count: int, local: Tensor, folder: Path, seed: int) -> Tensor:
    """Training samples (N, ...): generated of `count` latents that are drawn once, then the local ones that are given.

    They are made once, then read from the disk.
    """
    path, shape = folder / "samples.f32", (count + len(local), int(torch.tensor(generator.shape).prod()))
    if not row_files.whole(path, shape):
        beside = folder / "samples.f32.tmp"
        rows = row_files.blank(beside, shape)
        z = latents(count, generator.outputs, seed, "pool")
        for low in range(0, count, MADE_AT_ONCE):
            some = z[low : low + MADE_AT_ONCE]
            rows[low : low + len(some)] = generator(some).flatten(1).numpy()
        if len(local):
            rows[count:] = local.flatten(1).numpy()
        row_files.name(beside, path)
    return torch.from_numpy(np.array(row_files.mapped(path, shape)[:])).view(-1, *generator.shape)


def keep_answers(folder: Path, answers: Tensor, held_out: Answered) -> None:
    """Writes the teacher's answers beside the generated samples, for those who have no teacher."""
    with atomic(folder / "answers.safetensors") as path:
        save_file({"answers": answers, "held_out": held_out[0].contiguous(), "held_out_answers": held_out[1]}, path)


def open_generated(folder: Path, local: pl.LightningDataModule) -> pl.LightningDataModule:
    """The data that a run of MEKD generated and kept in a folder; needs no teacher."""
    kept = load_file(folder / "answers.safetensors")
    answers, held_out = kept["answers"], kept["held_out"]
    shape = held_out.shape[1:]
    rows = row_files.mapped(folder / "samples.f32", (len(answers), int(shape.numel())))
    train = torch.from_numpy(np.array(rows[:])).view(-1, *shape), answers
    return GeneratedSamples(train, (held_out, kept["held_out_answers"]), 128, local)


def answers_of(teacher: ApiTeacher, x: Tensor, at_once: int = 4096) -> Tensor:
    """The teacher's logits (N, L) of samples; what it has answered before costs no query."""
    return torch.cat([teacher(some) for some in x.split(at_once)])
