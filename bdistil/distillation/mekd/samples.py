"""Training data of MEKD: local and generated samples with the teacher's answers, in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bdistil.data.loaders import check_dataset, only_given, paired, same_x
from bdistil.data.loaders.fingerprints import spread
from bdistil.distillation.mekd.deprivatization import latents
from bdistil.distillation.mekd.networks import Generator
from bdistil.errors import UserError
from bdistil.storage.files import atomic, disk_errors
from bdistil.teachers.api import ApiTeacher

# Fixed, as the last bits of a generated sample depend on the batch size, and answers are cached by the exact bits of
# the sample.
GENERATED_AT_ONCE = 256
Answered = tuple[Tensor, Tensor]  # x (N, ...) and the teacher's logits (N, L)


class AnsweredSamples(pl.LightningDataModule):
    """Training and validation samples, (x, y) each, in memory; for stage 2, y are the teacher's logits."""

    def __init__(self, train: Answered, val: Answered, batch_size: int) -> None:
        super().__init__()
        self.parts, self.batch_size = {"train": TensorDataset(*train), "val": TensorDataset(*val)}, batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches of the training part; none has a single sample, for which batch norm has no variance."""
        samples, size = len(self.parts["train"]), self.batch_size
        alone = samples > size and samples % size == 1
        return DataLoader(self.parts["train"], batch_size=size, shuffle=True, drop_last=alone)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the validation part."""
        return DataLoader(self.parts["val"], batch_size=500)


class GeneratedSamples(AnsweredSamples):
    """Answered samples for a boosting run: y is the teacher's top-1 class, as there are no labels.

    Accuracy on the validation part is therefore agreement with the teacher.

    Args:
        train: generated samples and the teacher's logits.
        val: held-out local samples and the teacher's logits.
        batch_size: batch size of training.
        local: data module of the local samples; its test part, if it has one, is the test part here.
    """

    def __init__(self, train: Answered, val: Answered, batch_size: int, local: pl.LightningDataModule) -> None:
        (x, y), (held_out, answers) = train, val
        super().__init__((x, y.argmax(-1)), (held_out, answers.argmax(-1)), batch_size)
        self.local = local
        if is_overridden("test_dataloader", local, pl.LightningDataModule):
            vars(self)["test_dataloader"] = local.test_dataloader

    def setup(self, stage: str | None = None) -> None:
        """Sets up the test part."""
        if stage == "test":
            self.local.setup("test")


def samples_of(loader: DataLoader[Any], name: str) -> Tensor:
    """Reads all x (N, ...) of a loader of local samples, in the order of its dataset.

    Args:
        loader: loader whose batches are x or begin with x.
        name: name of the user's method that returned it.

    Raises:
        UserError: batches have another form, or x changes between two readings.
    """
    check_dataset(paired(loader, labels=None), name)
    loader = only_given(loader, name)
    data: Any = loader.dataset
    rows = [_x_of(loader.collate_fn([data[number]]), name) for number in range(len(data))]
    if not all(same_x(rows[n], _x_of(loader.collate_fn([data[n]]), name)) for n in spread(len(rows))):
        raise UserError(
            f"Expected x of `{name}()` to be the same at each reading, as a restart would query the API about it "
            "again, got random augmentation. Leave it out of the local samples."
        )
    return torch.cat(rows)


def _x_of(batch: Any, name: str) -> Tensor:
    x = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(x, Tensor):
        raise UserError(
            f"Expected batches of `{name}()` to be x (B, ...), or to begin with it, got a {type(x).__name__}. Give the "
            "loader of the local samples a collate function that returns such batches."
        )
    return x


def distinct_local(queries: int, samples: int, share: float) -> int:
    """Number of the local samples that are queried, if local ones make up `share` of the training samples.

    >>> distinct_local(1000, 280, 0.25), distinct_local(1000, 280, 0.5)  # fewer than all, or all, which are repeated
    (250, 280)
    """
    return min(samples, max(1, round(share * queries))) if share else 0


def repeated(samples: Tensor, others: int, share: float) -> Tensor:
    """Repeats local samples (N, ...) to make up `share` of the total, beside `others` other samples; none for 0."""
    return samples[torch.arange(round(share / (1 - share) * others)) % max(1, len(samples))]


@torch.no_grad()
def generate(generator: Generator, count: int, local: Tensor, folder: Path, seed: int) -> Tensor:
    """Training samples (N, ...): `count` generated ones, then the local ones (n, ...), if any.

    They are written to ``samples.f32`` in the folder of the run, and read from there if it exists. The generator must
    be on the CPU and in eval mode.
    """
    path = folder / "samples.f32"
    if not path.exists():
        z = latents(count, generator.outputs, seed, "pool")
        samples = torch.cat([*map(generator, z.split(GENERATED_AT_ONCE)), local])
        with disk_errors("the generated samples", folder), atomic(path) as temporary:
            samples.float().numpy().tofile(temporary)
    return torch.from_numpy(np.fromfile(path, np.float32)).view(-1, *generator.shape)


def save_answers(folder: Path, answers: Tensor, held_out: Answered) -> None:
    """Writes the teacher's answers beside the generated samples, so that the data can be read without a teacher."""
    values = {"answers": answers, "held_out": held_out[0].contiguous(), "held_out_answers": held_out[1]}
    with disk_errors("the teacher's answers", folder), atomic(folder / "answers.safetensors") as temporary:
        save_file(values, temporary)


def open_generated(folder: Path, local: pl.LightningDataModule) -> GeneratedSamples:
    """Reads the data generated by a run of MEKD from its folder; needs no teacher."""
    values = load_file(folder / "answers.safetensors")
    held_out = values["held_out"]
    samples = torch.from_numpy(np.fromfile(folder / "samples.f32", np.float32)).view(-1, *held_out.shape[1:])
    return GeneratedSamples((samples, values["answers"]), (held_out, values["held_out_answers"]), 128, local)


def answers_of(teacher: ApiTeacher, x: Tensor, batch_size: int = 4096) -> Tensor:
    """The teacher's logits (N, L) for samples; cached answers cost no query."""
    return torch.cat([teacher(batch) for batch in x.split(batch_size)])
