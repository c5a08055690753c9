"""Validation of the data and of the teacher before training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler

from bdistil.boosting.checks.batches import check_hooks, close
from bdistil.boosting.settings import RECOMPUTE, BoostingSettings
from bdistil.data.loaders import LOADERS, Views, is_random, paired, same_x, single_loader, with_trainer
from bdistil.errors import UserError
from bdistil.metrics.cost import as_written
from bdistil.metrics.quality import Task
from bdistil.teachers.api import ApiTeacher
from bdistil.teachers.checks import warn_of_probabilities
from bdistil.teachers.offline import table_of
from bdistil.teachers.wrappers import AdaptedTeacher, AveragedTeacher
from bdistil.utils import distributed
from bdistil.utils.modules import module_device
from bdistil.utils.trees import device_of, take_rows

TEST = "test_dataloader"
# Largest change of a sample's logits by another sample of its batch, relative to the largest logit, that goes untold:
# teachers with dynamic int8 ranges differ by a little.
BATCH_EFFECT = 0.05


def loaders_of(datamodule: pl.LightningDataModule, settings: BoostingSettings | None = None) -> tuple[Any, Any]:
    """Sets up a data module and returns its training and validation loader, converted to batches (x, y).

    Raises:
        UserError: a loader is missing, or a hook changes batches.
    """
    if not isinstance(datamodule, pl.LightningDataModule):
        raise UserError(f"Expected `datamodule` to be a LightningDataModule, got a {type(datamodule).__name__}.")
    for method in ("train_dataloader", "val_dataloader"):
        if not is_overridden(method, datamodule, pl.LightningDataModule):
            raise UserError(
                f"Expected `{type(datamodule).__name__}` to define `{method}()`. Students are accepted by their error "
                "on the validation part; split one off the training part."
            )
    with with_trainer(datamodule), _data_errors(datamodule):
        rank_zero_only(datamodule.prepare_data)()
        datamodule.setup("fit")
        loaders = [single_loader(getattr(datamodule, name)()) for name in LOADERS]
        train, val = (as_pairs(loader, name, settings) for loader, name in zip(loaders, LOADERS, strict=True))
        check_hooks(datamodule, train)
    return check_batches(train), val


@contextmanager
def _data_errors(datamodule: pl.LightningDataModule) -> Iterator[None]:
    """Context that explains errors raised by torch's samplers in the user's methods."""
    kind = type(datamodule).__name__
    try:
        yield
    except OSError as error:
        if distributed.early_rank() == 0:
            raise
        raise UserError(
            f"`{kind}` cannot be set up in process {distributed.early_rank()} ({error}). Processes set up the data at "
            "the same time: let a single process run `prepare_data` before the job starts."
        ) from error
    except (ValueError, RuntimeError) as error:
        if "num_samples" in str(error):  # torch's RandomSampler rejects an empty dataset
            message = f"Expected the datasets of `{kind}` to hold samples, got an empty one ({error})."
            raise UserError(message) from error
        if "process group" in str(error):
            raise UserError(
                f"`{kind}` needs processes that are connected already ({error}). Its data are validated before: leave "
                "the DistributedSampler out, the samples are shared by the processes without it."
            ) from error
        raise


def test_loader_of(datamodule: pl.LightningDataModule, settings: BoostingSettings) -> Any:
    """The loader of the test part, converted to batches (x, y); None if the data module has none.

    Raises:
        UserError: the method returned anything but a single loader.
    """
    if not is_overridden(TEST, datamodule, pl.LightningDataModule):
        return None
    with with_trainer(datamodule):
        datamodule.setup("test")
        loader = single_loader(datamodule.test_dataloader())
    if loader is not None and not isinstance(loader, DataLoader):
        raise UserError(
            f"Expected `{TEST}()` to return one torch DataLoader, on which the run is tested at its end, got "
            f"{type(loader).__name__}. Return one of them, and test the ensemble on the others yourself."
        )
    return as_pairs(loader, TEST, settings)


def as_pairs(loader: Any, name: str, settings: BoostingSettings | None = None) -> Any:
    """Converts a user's loader to batches (x, y) according to the settings; unchanged without settings."""
    if settings is None:
        return loader
    return paired(loader, settings.labels, ignore_index=settings.ignore_index, name=name)


def check_batches(loader: Any) -> Any:
    """Returns a training loader unchanged. Raises UserError if it has samples but yields no batch."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized) and isinstance(loader.batch_sampler, Sized):
        samples, batches = len(loader.dataset), len(loader.batch_sampler)
        if samples and not batches:
            raise UserError(
                f"Expected `train_dataloader()` to yield a batch, got {batches} of {samples} samples "
                f"(batch_size={loader.batch_size}, drop_last={loader.drop_last}): no student would be trained. Give it "
                "a smaller `batch_size`, or drop_last=False."
            )
    return loader


def warn_of_undrawn(loader: DataLoader[Any]) -> None:
    """Warns if the sampler of a training loader is a fixed list that omits samples of its dataset.

    The omitted samples stay in the run, as a curriculum may draw them in later epochs.
    """
    sampler = getattr(loader.batch_sampler, "sampler", None)
    rows = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    if not isinstance(rows, Sequence | Tensor | np.ndarray):
        return
    drawn, samples = len(np.unique(np.asarray(rows))), len(cast(Sized, loader.dataset))
    if drawn < samples:
        rank_zero_warn(
            f"The sampler of `train_dataloader()` gives {drawn:,} of the {samples:,} samples of its dataset, but the "
            f"teacher is asked about all {samples:,}, and the game weighs all of them. If the others are never drawn, "
            "as those of validation and test, give the loader torch.utils.data.Subset(dataset, indices) and "
            "shuffle=True."
        )


def check_augmentation(loader: Any, settings: BoostingSettings, seed: int) -> bool:
    """Whether a training loader augments at random. Raises UserError if cached logits would not match the batches."""
    random = is_random(loader.dataset)
    if settings.state == "recompute":
        return random
    if settings.views is None and (random or is_random(loader.dataset, loader.collate_fn)):
        raise UserError(
            "Reading a training sample twice gives two different x (random augmentation), so cached teacher logits "
            f"would not belong to the x of a batch. Give {RECOMPUTE} to evaluate the teacher on "
            "every batch, or BoostingSettings(views=K) (model.boosting.views) to cache its logits on K fixed views of "
            "each sample."
        )
    if is_random(Views(loader.dataset, seed), loader.collate_fn):
        raise UserError(
            f"`views={settings.views}` fixes what a dataset draws from the generators of Python, NumPy and torch, but "
            "reading a view twice gives two different x: the collate function augments, or the dataset has a generator "
            f"of its own. Augment in the dataset's __getitem__, or give {RECOMPUTE}."
        )
    return random


def check_repeatable_x(loader: DataLoader[Any], seed: int) -> bool:
    """Whether a validation loader augments at random, drawing from generators that a seed fixes.

    Raises:
        UserError: two readings of a sample with one seed differ. The teacher's logits of the validation part are cached
            with any `state`.
    """
    random = is_random(loader.dataset)
    if is_random(Views(loader.dataset, seed) if random else loader.dataset, loader.collate_fn):
        raise UserError(
            "Reading a sample of `val_dataloader()` twice gives two different x, even if the generators of Python, "
            "NumPy and torch are seeded: the dataset has a generator of its own, or the collate function augments. The "
            "teacher's logits of this part are cached, with any `state`, and students are accepted by their error to "
            "them. Leave the augmentation out of the validation part."
        )
    return random


@torch.no_grad()
def check_outputs(
    teacher: nn.Module, student: nn.Module, example: Any, task: Task = "classification", *, recomputed: bool = False
) -> int:
    """Checks that teacher and student return logits (B, L) with the same L; returns L.

    Args:
        teacher: the teacher.
        student: an unlinked student; it is left in eval mode.
        example: x of two samples.
        task: task of the run; classification requires L >= 2.
        recomputed: whether the teacher runs on every batch and shares its x with the students.

    Raises:
        UserError: the logits have another shape, the two L differ, or the teacher is not deterministic.
    """
    with as_written(teacher, student):
        answer = student.eval()(move_data_to_device(example, module_device(student)))
        if (table := table_of(teacher)) is not None:
            goal = table.rows("train", np.arange(2))
        else:
            x = move_data_to_device(example, module_device(teacher))
            goal = check_repeatable(teacher, "the teacher", x) if recomputed else teacher(copy.deepcopy(x))
            _warn_of_batches(teacher, x, goal)
    for name, logits in (("teacher", goal), ("student", answer)):
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"Expected logits of shape (2, L) from the {name} for a batch of 2 samples, got {got}.")
    if goal.shape[1] < 2 and task == "classification":
        raise UserError(
            "Expected a teacher of L >= 2 outputs (classes), got L=1. Give BoostingSettings(task='regression') "
            "(model.boosting.task: regression) for real outputs, or a teacher with an output for each of two classes."
        )
    if goal.shape[1] != answer.shape[1]:
        raise UserError(
            f"The teacher gives L={goal.shape[1]} outputs, the student L={answer.shape[1]}. "
            f"Give the student a head of {goal.shape[1]} outputs."
        )
    if task != "regression":
        warn_of_probabilities(goal, task)
    if task == "classification":
        _warn_of_softmax(answer)
    return int(goal.shape[1])


def _warn_of_softmax(answer: Tensor) -> None:
    """Warns if the outputs (B, L) of a student sum to 1, or their exponentials do."""
    for values, layer in ((answer, "softmax"), (answer.exp(), "log_softmax")):
        if bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 1e-4).all()):
            rank_zero_warn(
                f"The student's outputs look like those of a {layer}, which cannot follow the target of a round: the "
                "teacher's centred logits, corrected by earlier errors. Leave that layer out."
            )


def _warn_of_batches(teacher: nn.Module, x: Any, goal: Any) -> None:
    """Warns if the logits `goal` of the first of two samples x depend on the second one."""
    if not isinstance(goal, Tensor) or goal.ndim != 2 or len(goal) != 2:
        return
    try:
        twice = take_rows(x, torch.tensor([0, 0], device=device_of(x)))
    except UserError:  # the batch cannot be split into samples
        return
    change = float((teacher(twice)[:1] - goal[:1]).abs().max())
    # A teacher that draws at random differs anyway, and is none of this.
    if change > BATCH_EFFECT * float(goal.abs().max()) and close(goal, teacher(copy.deepcopy(x))):
        rank_zero_warn(
            "The teacher answers a sample differently among other samples, as by batch norm with "
            "track_running_stats=False or in training mode. Its answers then depend on the order of the samples and on "
            "the batch size of the loaders; files sorted by class make them useless. Give a teacher in eval mode."
        )


def check_repeatable(answer: Callable[[Any], Any], name: str, x: Any) -> Any:
    """Returns the output for a batch x on its device, after checking that a second call gives the same output.

    Raises:
        UserError: x was changed in place, or the second output differs.
    """
    before = copy.deepcopy(x)
    first = answer(x)
    if not same_x(x, before):
        raise UserError(
            f"Expected {name} to leave x as it is, but it changes x in place, which others read. Write x = x - mean "
            "in place of x -= mean, or inplace=False."
        )
    second = answer(x)
    if isinstance(first, Tensor) and not close(first, second):
        raise UserError(
            f"Expected {name} in eval mode to give the same answer to the same x twice, but the two differ: something "
            "is drawn at random, for example by F.dropout(x) without training=self.training."
        )
    return first


def check_task(task: Task, teacher: nn.Module) -> None:
    """Raises UserError if a teacher's probabilities or labels would be taken for the logits of another task."""
    if task == "classification":
        return
    if isinstance(teacher, ApiTeacher) and teacher.answers != "logits":
        raise UserError(
            f"Expected an API that answers with the network's outputs for task={task!r}, got answers="
            f"{teacher.answers!r}, which become logits of a softmax. Give answers='logits'; for sigmoid outputs p, "
            "return log(p / (1 - p))."
        )
    if isinstance(teacher, AdaptedTeacher) and teacher.probabilities:
        raise UserError(
            f"Expected a network that returns its outputs for task={task!r}, got AdaptedTeacher(..., "
            "probabilities=True), whose logarithms are logits of a softmax. Leave it out; for sigmoid outputs p, give "
            "a module that returns torch.logit(p)."
        )
    if isinstance(teacher, AveragedTeacher) and teacher.of == "probabilities":
        raise UserError(
            f"Expected an average of the outputs of several teachers for task={task!r}, got AveragedTeacher(..., "
            "of='probabilities'). Give of='logits'."
        )
    if isinstance(teacher, AdaptedTeacher | AveragedTeacher):
        for network in [teacher.network] if isinstance(teacher, AdaptedTeacher) else teacher.networks:
            check_task(task, network)
