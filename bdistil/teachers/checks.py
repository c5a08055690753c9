"""Checks of a teacher: weights shared with a student, and warnings of likely misuse.

Likely misuse is an accuracy of guessing, unusual inputs, or probabilities in place of logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.metrics.quality import Task
from bdistil.models.inputs import expectation_of
from bdistil.teachers.wrappers import AdaptedTeacher, per_channel


def some_inputs(loader: Any, count: int = 64) -> Any:
    """Inputs x (B, ...) of samples evenly spread over the dataset of a loader."""
    data = loader.dataset
    return loader.collate_fn([data[number] for number in range(0, len(data), -(-len(data) // count))])[0]


def check_apart(student: nn.Module, trainable: Iterable[nn.Parameter]) -> None:
    """Raises UserError if a student holds one of the teacher's trainable parameters, which are frozen with it."""
    weights = list(trainable)
    held = {id(parameter) for parameter in weights}
    for name, parameter in student.named_parameters():
        if id(parameter) in held:
            for weight in weights:  # FrozenTeacher froze them: a second try would take them for frozen before
                weight.requires_grad_(True)
            raise UserError(
                f"Expected a student with weights of its own, got `{name}` that the teacher holds, too, and a teacher "
                "is frozen. Give the student copies: copy.deepcopy(layer). Freeze layers that are meant to be shared: "
                "layer.requires_grad_(False)."
            )


def warn_of_guessing(task: Task, score: float, outputs: int, samples: int) -> None:
    """Warns if a teacher is not better than chance by three standard errors, or than the mean of real labels.

    Args:
        task: task of the run.
        score: accuracy of the teacher on the validation part, or R².
        outputs: L.
        samples: number of samples of that part.
    """
    chance = 1 / outputs
    if task == "classification" and score < chance + 3 * (chance * (1 - chance) / samples) ** 0.5:
        rank_zero_warn(
            f"The teacher is right for {score:.1%} of {samples} validation samples, not clearly better than guessing "
            f"among {outputs} classes. Is it trained, in the order of these classes, and are its inputs normalised and "
            "sized as in its training (AdaptedTeacher)?"
        )
    if task == "regression" and score <= 0:
        rank_zero_warn(
            f"The teacher has R² {score:.3g} on the validation part, no better than always answering the mean of its "
            "labels. Is it trained, for labels of this scale? A teacher trained here learns labels far from 0 … 1 "
            "slowly: standardise them, or give it their mean and standard deviation (bdistil.models.MLP has `mean` and "
            "`std`)."
        )


def warn_of_order(train: float, val: float) -> None:
    """Warns if a table of logits is much worse on the training part than on the validation part.

    Args:
        train: accuracy on the training part, or R²; NaN if it was not scored.
        val: the same on the validation part.
    """
    if train < val - 0.1:
        rank_zero_warn(
            f"The table of logits has a score of {train:.3f} on the training part and of {val:.3f} on the validation "
            "part. Row i belongs to sample i of the dataset: logits that were collected from a shuffled loader are in "
            "another order. With wrong labels in the training part alone, as in LabelNoise, nothing is amiss."
        )


def warn_of_inputs(teacher: nn.Module, datamodule: Any, x: Any) -> None:
    """Warns if samples x (B, ...), on the CPU, do not look like the teacher's training data.

    The data module may declare the normalisation of its images as `mean` and `std`.
    """
    adapted = teacher if isinstance(teacher, AdaptedTeacher) else None
    expected = expectation_of(adapted.network if adapted else teacher)
    declared = [getattr(datamodule, name, None) for name in ("mean", "std")]
    if not isinstance(x, Tensor) or not (expected or adapted):
        return
    if adapted and not expected and (adapted.size or adapted.probabilities) and not adapted.rescales:
        return  # it is there to change the size or the outputs
    taken = (adapted.data_mean, adapted.data_std) if adapted else (expected.mean, expected.std)  # type: ignore[union-attr]
    cure = "Wrap it in AdaptedTeacher(network, mean, std, data_mean, data_std, size)."
    differ = all(v is not None for v in declared) and any(
        (per_channel(a) - per_channel(b)).abs().max() >= 0.02 for a, b in zip(declared, taken, strict=True)
    )
    if differ:
        rank_zero_warn(
            f"The data module declares a normalisation by mean and sd {[per_channel(v).tolist() for v in declared]}, "
            f"the teacher expects {[per_channel(v).tolist() for v in taken]}. {cure}"
        )
    reads = (adapted.normalised(x.to(adapted.scale.device)) if adapted else x).float()
    mean, sd = float(reads.mean()), float(reads.std())
    if expected and not (abs(mean) < 1 and 0.5 < sd < 2):
        rank_zero_warn(
            f"The teacher expects normalised inputs, but reads some of mean {mean:.3g} and sd {sd:.3g}. {cure}"
        )
    size = adapted.size if adapted and adapted.size else tuple(x.shape[-2:])
    if expected and tuple(size) != expected.size:
        rank_zero_warn(f"The teacher was trained on images of {expected.size}, and reads some of {tuple(size)}. {cure}")


def warn_of_probabilities(answers: Tensor, task: Task = "classification") -> None:
    """Warns if the outputs (B, L) of a teacher are probabilities instead of logits."""
    if task == "multilabel":
        if bool(((answers >= 0) & (answers <= 1)).all()):
            rank_zero_warn(
                "The teacher's outputs are in 0 … 1: they look like probabilities of a sigmoid, but logits are "
                "expected. Wrap it in a module that returns torch.logit(p, eps=1e-6)."
            )
        return
    if bool((answers >= 0).all()) and bool(((answers.sum(-1) - 1).abs() < 1e-3).all()):
        rank_zero_warn(
            "The teacher's outputs sum to 1: they look like probabilities, but logits are expected. "
            "Wrap it in AdaptedTeacher(network, probabilities=True)."
        )
