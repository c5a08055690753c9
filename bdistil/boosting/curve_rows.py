"""What a row of the curve says: the cost of a stage, counted before training, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from bdistil.boosting.acceptance import Verdict
from bdistil.boosting.checks import first_of
from bdistil.metrics.cost import Cost, latency_ms, measure_cost, training_macs
from bdistil.models.student import linked_features, links_of
from bdistil.teachers.api import ApiTeacher

Uncounted = Literal["error", "record"]


def student_inputs(
    student: nn.Module, earlier: Sequence[nn.Module], example: Any, device: torch.device
) -> tuple[Any, ...]:
    """What a student is given for one sample: x, and the features (1, D) that it reads of earlier ones."""
    x = move_data_to_device(first_of(example), device)
    return (x, linked_features(student, earlier, x)) if links_of(student) else (x,)


def student_cost(student: nn.Module, earlier: Sequence[nn.Module], example: Any, uncounted: Uncounted) -> Cost:
    """Cost of a student for one sample; all modules come to the CPU for it.

    Raises:
        UserError: an operator's cost is unknown, and `uncounted` is ``error``.
    """
    for module in (*earlier, student):
        module.cpu()
    inputs = student_inputs(student, earlier, example, torch.device("cpu"))
    cost = measure_cost(student, inputs, uncounted=uncounted)
    if cost.uncounted:
        rank_zero_warn(
            f"The MACs of {type(student).__name__} lack operators that could not be counted: {cost.uncounted}."
        )
    return cost


def teacher_row(
    teacher: nn.Module, example: Any, device: torch.device, samples: int, uncounted: Uncounted
) -> dict[str, Any]:
    """Cost of the teacher, and of asking it about all samples once; left on the device."""
    if is_api(teacher):
        rank_zero_info("The teacher is an API: its MACs and parameters are not known, and stand as 0.")
        unknown = ("macs", "link_macs", "params", "train_macs", "activation_bytes", "weight_bytes")
        return {"stage": "teacher", **dict.fromkeys(unknown, 0), "latency_ms": 0.0}
    cost = measure_cost(teacher.cpu(), (first_of(example),), uncounted=uncounted)
    if cost.uncounted:
        rank_zero_warn(f"The MACs of the teacher lack operators that could not be counted: {cost.uncounted}.")
    latency = latency_ms(teacher.to(device), (move_data_to_device(first_of(example), device),))
    return {
        "stage": "teacher",
        "macs": cost.macs,
        "link_macs": 0,
        "params": cost.params,
        "train_macs": cost.macs * samples,
        "latency_ms": latency,
        "activation_bytes": cost.activation_bytes,
        "weight_bytes": cost.weight_bytes,
        "uncounted": cost.uncounted,
    }


def is_api(teacher: nn.Module) -> bool:
    """Is a teacher, frozen or not, one that is asked through an API?"""
    return isinstance(getattr(teacher, "module", teacher), ApiTeacher)


def round_training_macs(
    student: nn.Module,
    cost: Cost,
    earlier: Sequence[nn.Module],
    example: Any,
    samples_seen: int,
    teacher_macs: int,
) -> int:
    """MACs of training one round: the student; without cached state also the teacher and what is linked to.

    Args:
        student: of the round.
        cost: of the student.
        earlier: the students before it, on the CPU.
        example: x of some samples.
        samples_seen: in all epochs and processes.
        teacher_macs: 0 with cached state; else teacher and linked bodies run for every batch.
    """
    links = 0
    if teacher_macs and links_of(student):
        links = measure_cost(_Links(student, earlier), (first_of(example),), uncounted="record").macs
    return training_macs(
        student=cost.macs, links=links, samples_seen=samples_seen, teacher=teacher_macs, teacher_samples=samples_seen
    )


class _Links(nn.Module):
    """Makes all that a student reads of earlier ones, to be measured."""

    def __init__(self, student: nn.Module, earlier: Sequence[nn.Module]) -> None:
        super().__init__()
        self.student, self.earlier = student, nn.ModuleList(earlier)

    def forward(self, x: Any) -> list[Tensor]:
        return linked_features(self.student, list(self.earlier), x)


def stage_row(number: int, before: Mapping[str, Any], cost: Cost, verdict: Verdict) -> dict[str, Any]:
    """The row of a prefix: MACs and parameters are cumulative, the other costs are this stage's.

    Args:
        number: the round, from 0.
        before: row of the prefix before; ignored in round 0.
        cost: of the student.
        verdict: of the round.
    """
    macs, params = (before["macs"], before["params"]) if number else (0, 0)
    return {
        "stage": number + 1,
        "macs": macs + cost.macs,
        "link_macs": cost.by_module.get("join", 0),
        "params": params + cost.params,
        "val_accuracy": verdict.accuracy,
        "val_loss": verdict.loss,
        "margin_share": verdict.training.margin_share,
        "reason": verdict.reason,
        "margin_min": verdict.training.margin_min,
        "rms_error": verdict.validation.rms_after,
        "sup_error": verdict.validation.sup_after,
        "activation_bytes": cost.activation_bytes,
    }


def shape_of(example: Any) -> list[int] | None:
    """Shape of one sample, where x is a tensor."""
    return list(example.shape[1:]) if isinstance(example, Tensor) else None


def dtype_of(example: Any) -> str | None:
    """Name of the dtype of x in torch, where x is a tensor."""
    return str(example.dtype).removeprefix("torch.") if isinstance(example, Tensor) else None
