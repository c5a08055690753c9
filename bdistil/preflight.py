"""What can be known to be wrong before an hour is spent on training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import Dataset

from bdistil.cost import as_written
from bdistil.data.attach import only
from bdistil.data.indexing import is_random
from bdistil.errors import UserError
from bdistil.students import Rung, Student
from bdistil.teachers import AdaptedTeacher, AveragedTeacher, expectation_of
from bdistil.units import Task


def loaders_of(datamodule: pl.LightningDataModule) -> tuple[Any, Any]:
    """Training and validation loader of a data module that has been set up.

    Raises:
        UserError: it lacks one, or changes batches after they are read.
    """
    for method in ("train_dataloader", "val_dataloader"):
        if not is_overridden(method, datamodule, pl.LightningDataModule):
            raise UserError(
                f"Expected `{type(datamodule).__name__}` to define `{method}()`. Students are accepted by their error "
                "on the validation part; split one off the training part."
            )
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        if is_overridden(hook, datamodule, pl.LightningDataModule):
            raise UserError(
                f"`{type(datamodule).__name__}.{hook}` changes batches after they are read, which the ledger would not "
                "see. Do it in the dataset or the collate function."
            )
    rank_zero_only(datamodule.prepare_data)()
    datamodule.setup("fit")
    try:
        return only(datamodule.train_dataloader()), only(datamodule.val_dataloader())
    except ValueError as error:
        if "num_samples" not in str(error):
            raise
        kind = type(datamodule).__name__  # torch's own sampler refuses an empty dataset that is to be shuffled
        raise UserError(f"Expected the datasets of `{kind}` to hold samples, got an empty one ({error}).") from error


def check_augmentation(loader: Any, state: str) -> None:
    """Cached logits belong to an x that is the same at every reading.

    Raises:
        UserError: random augmentation with cached state.
    """
    if state == "cached" and (is_random(loader.dataset) or is_random(_Collated(loader))):
        raise UserError(
            "Reading a training sample twice gives two different x (random augmentation), so cached teacher logits "
            "would not belong to the x of a batch. Give BoostingSettings(state='recompute'), or augment once."
        )


class _Collated(Dataset[Any]):
    """Samples as batches of one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.loader.collate_fn([self.loader.dataset[index]])


def some_inputs(loader: Any, count: int = 64) -> Any:
    """X of samples that are spread over the dataset of a loader."""
    data = loader.dataset
    return loader.collate_fn([data[number] for number in range(0, len(data), -(-len(data) // count))])[0]


def check_widths(make: Callable[..., nn.Module], ladder: Sequence[Rung]) -> None:
    """A ladder with wider students needs a function that makes them.

    Raises:
        UserError: it takes no `width`.
    """
    wider = [rung.width for rung in ladder if rung.width != 1]
    parameters = inspect.signature(make).parameters.values()
    if wider and not any(p.name == "width" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise UserError(
            f"The ladder asks for students of width x{wider[0]:g}, but `student` takes no `width`. "
            "Write make_student(round, width=1.0), or leave such rungs out."
        )


def check_rounds(student: nn.Module, rounds: int) -> None:
    """Students that read segments of a sequence are as many as there are segments, at most.

    Raises:
        UserError: more rounds than that.
    """
    most = student.most_rounds if isinstance(student, Student) else None
    if most is not None and rounds > most:
        raise UserError(
            f"Expected `rounds` of the boosting settings to be at most {most}, as many as {type(student).__name__} has "
            f"segments to read, got {rounds}. Give it more `segments`, or fewer rounds."
        )


@torch.no_grad()
def check_outputs(teacher: nn.Module, student: nn.Module, example: Any, task: Task = "classification") -> int:
    """Teacher and student must give logits (B, L) of the same L.

    Args:
        teacher: the teacher, wherever it is.
        student: an unlinked student, on the CPU; left in eval mode.
        example: x of two samples.
        task: classes need two outputs or more.

    Returns:
        L.

    Raises:
        UserError: another shape, or two different L.
    """
    with as_written(teacher, student):
        goal, answer = teacher(to_device(example, device_of(teacher))), student.eval()(example)
    for name, logits in (("teacher", goal), ("student", answer)):
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"Expected logits of shape (2, L) of the {name} for a batch of 2 samples, got {got}.")
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
    if task == "classification":
        warn_of_probabilities(goal)
    return int(goal.shape[1])


def check_precision(precision: str) -> None:
    """Weights stay float32: a student is judged, committed and linked to outside the Trainer's precision.

    Args:
        precision: of a Trainer.

    Raises:
        UserError: a Trainer that turns the weights into another type.
    """
    if precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise UserError(
            f"Expected `precision` of the Trainer to be '32-true', '16-mixed' or 'bf16-mixed', got {precision!r}. "
            "With the mixed ones the network's products are in half precision; weights, loss and ledger are float32."
        )


def warn_of_chance(accuracy: float, outputs: int, samples: int) -> None:
    """Warns of a teacher that knows no more of the labels than a guess does, by three standard errors."""
    chance = 1 / outputs
    if accuracy < chance + 3 * (chance * (1 - chance) / samples) ** 0.5:
        rank_zero_warn(
            f"The teacher is right for {accuracy:.1%} of {samples} validation samples, no better than guessing among "
            f"{outputs} classes. Is it trained, in the order of these classes, and are its inputs normalised and "
            "sized as in its training (AdaptedTeacher)?"
        )


def warn_of_inputs(teacher: nn.Module, datamodule: Any, x: Any) -> None:
    """Warns where the inputs do not look like those that a teacher was trained on.

    Args:
        teacher: without the frozen wrapper.
        datamodule: may declare by `mean` and `std` how its images were normalised.
        x: some samples (B, ...), as the data give them.
    """
    adapted = teacher if isinstance(teacher, AdaptedTeacher) else None
    expected = expectation_of(adapted.network if adapted else teacher)
    declared = _declared(datamodule)
    if not isinstance(x, Tensor) or not (expected or adapted):
        return
    taken = (adapted.data_mean, adapted.data_std) if adapted else (expected.mean, expected.std)  # type: ignore[union-attr]
    cure = "Wrap it in AdaptedTeacher(network, mean, std, data_mean, data_std, size)."
    if declared and not all(_alike(*pair) for pair in zip(declared, taken, strict=True)):
        rank_zero_warn(
            f"The data say that they are normalised by mean and sd {[v.tolist() for v in declared]}, the teacher takes "
            f"them for normalised by {[torch.as_tensor(v).tolist() for v in taken]}. {cure}"
        )
    reads = (adapted.normalised(x) if adapted else x).float()
    mean, sd = float(reads.mean()), float(reads.std())
    if expected and not (abs(mean) < 1 and 0.5 < sd < 2):
        rank_zero_warn(
            f"The teacher expects normalised inputs, but reads some of mean {mean:.3g} and sd {sd:.3g}. {cure}"
        )
    size = adapted.size if adapted and adapted.size else tuple(x.shape[-2:])
    if expected and tuple(size) != expected.size:
        rank_zero_warn(f"The teacher was trained on images of {expected.size}, and reads some of {tuple(size)}. {cure}")


def _declared(datamodule: Any) -> tuple[Tensor, Tensor] | None:
    mean, std = getattr(datamodule, "mean", None), getattr(datamodule, "std", None)
    if mean is None or std is None:
        return None
    return torch.as_tensor(mean, dtype=torch.float32), torch.as_tensor(std, dtype=torch.float32)


def _alike(first: Any, second: Any) -> bool:
    difference = torch.as_tensor(first).reshape(-1) - torch.as_tensor(second).reshape(-1)
    return bool(difference.abs().max() < 0.02)


def warn_of_probabilities(answers: Tensor) -> None:
    """Warns where a teacher's answers (B, L) are probabilities, and not their logarithms."""
    if bool((answers >= 0).all()) and bool(((answers.sum(-1) - 1).abs() < 1e-3).all()):
        rank_zero_warn(
            "The teacher's answers sum to 1: they look like probabilities, but logits are expected. "
            "Wrap it in AdaptedTeacher(network, probabilities=True)."
        )


def check_task(task: Task, teacher: nn.Module) -> None:
    """A mean of probabilities is no answer of a regression.

    Raises:
        UserError: several teachers of real outputs are averaged so.
    """
    inner = teacher.network if isinstance(teacher, AdaptedTeacher) else teacher
    if task == "regression" and isinstance(inner, AveragedTeacher) and inner.of == "probabilities":
        raise UserError(
            "Expected several teachers of real outputs to be averaged as they are, got AveragedTeacher(..., "
            "of='probabilities') with task='regression'. Give of='logits'."
        )


def check_labels(labels: Any, task: Task, outputs: int) -> None:
    """Classes are numbers 0 … L-1, real labels one number an output.

    Args:
        labels: y of two samples.
        task: of the run.
        outputs: L.

    Raises:
        UserError: other labels.
    """
    if not isinstance(labels, Tensor):
        return
    real = labels.is_floating_point() or labels.ndim > 1
    if task == "classification" and real:
        raise UserError(
            f"Expected class numbers as labels y, got {labels.dtype} of shape {tuple(labels.shape)} for 2 samples. "
            "Give BoostingSettings(task='regression') (model.boosting.task: regression) for real outputs."
        )
    if task == "regression" and labels.numel() != 2 * outputs:
        raise UserError(
            f"Expected {outputs} numbers as the label y of a sample, one an output of the teacher, got labels of shape "
            f"{tuple(labels.shape)} for 2 samples."
        )


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are; the CPU for one that has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def to_device(x: Any, device: torch.device) -> Any:
    """A tensor, or a tuple or list of them, on a device."""
    return x.to(device) if isinstance(x, Tensor) else type(x)(to_device(part, device) for part in x)


def first_of(x: Any) -> Any:
    """The first sample of a batch, as a batch of one."""
    return x[:1] if isinstance(x, Tensor) else type(x)(first_of(part) for part in x)
