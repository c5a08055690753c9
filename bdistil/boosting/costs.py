"""Cost of the teacher and of students, for rows of the curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from bdistil.metrics.cost import Cost, latency_ms, measure_cost
from bdistil.models.student import linked_activations, links_of
from bdistil.teachers.api import ApiTeacher
from bdistil.teachers.offline import table_of

Uncounted = Literal["error", "record"]


def _inputs(student: nn.Module, earlier: Sequence[nn.Module], example: Any, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a student for one sample: x, and the features (1, D) that it reads from earlier students."""
    x = move_data_to_device(example, device)
    return (x, linked_activations(student, earlier, x)) if links_of(student) else (x,)


def student_latency(student: nn.Module, earlier: Sequence[nn.Module], example: Any, device: torch.device) -> float:
    """Latency of a student for one sample, in milliseconds; all modules must be on the device."""
    return latency_ms(student, _inputs(student, earlier, example, device))


def student_cost(student: nn.Module, earlier: Sequence[nn.Module], example: Any, uncounted: Uncounted) -> Cost:
    """Cost of a student for one sample; moves all modules to the CPU.

    Raises:
        UserError: an operator's cost is unknown, and `uncounted` is ``error``.
    """
    for module in (*earlier, student):
        module.cpu()
    cost = measure_cost(student, _inputs(student, earlier, example, torch.device("cpu")), uncounted=uncounted)
    _warn_of_uncounted(cost, type(student).__name__)
    return cost


def _warn_of_uncounted(cost: Cost, name: str) -> None:
    if cost.uncounted:
        rank_zero_warn(f"The MACs of {name} lack operators that could not be counted: {cost.uncounted}.")


def teacher_row(
    teacher: nn.Module, example: Any, device: torch.device, samples: int, uncounted: Uncounted
) -> dict[str, Any]:
    """Row of the curve with the teacher's cost per sample and for one pass over `samples`; leaves it on the device."""
    if is_api(teacher) or table_of(teacher) is not None:
        kind = "an API" if is_api(teacher) else "a table of logits"
        rank_zero_info(f"The teacher is {kind}: its MACs and parameters are unknown and written as 0.")
        teacher.to(device)  # as below; an API may be inside a module with buffers
        unknown = ("macs", "link_macs", "params", "train_macs", "activation_bytes", "weight_bytes")
        return {"stage": "teacher", **dict.fromkeys(unknown, 0), "latency_ms": 0.0}
    cost = measure_cost(teacher.cpu(), (example,), uncounted=uncounted)
    _warn_of_uncounted(cost, "the teacher")
    latency = latency_ms(teacher.to(device), (move_data_to_device(example, device),))
    return {
        "stage": "teacher",
        "macs": cost.macs,
        "link_macs": 0,
        "params": cost.params,
        "train_macs": cost.macs * samples,
        "latency_ms": latency,
        "device": device.type,  # of the latency
        "activation_bytes": cost.activation_bytes,
        "weight_bytes": cost.weight_bytes,
        "uncounted": cost.uncounted,
    }


def is_api(teacher: nn.Module) -> bool:
    """Whether a teacher is an ApiTeacher or contains one, as an AdaptedTeacher or an AveragedTeacher may."""
    return any(isinstance(part, ApiTeacher) for part in teacher.modules())


def queries_of(teacher: nn.Module) -> int:
    """Queries so far of all APIs in a teacher."""
    apis = (part for part in teacher.modules() if isinstance(part, ApiTeacher))
    return sum({api.cache.path: api.queries for api in apis}.values())


def linked_activations_macs(student: nn.Module, earlier: Sequence[nn.Module], example: Any) -> int:
    """MACs, for one sample, of the activations that a student reads from earlier ones; all modules on the CPU."""
    return measure_cost(_Links(student, earlier), (example,), uncounted="record").macs


class _Links(nn.Module):
    """Computes them as a module, whose cost can be measured."""

    def __init__(self, student: nn.Module, earlier: Sequence[nn.Module]) -> None:
        super().__init__()
        self.student, self.earlier = student, nn.ModuleList(earlier)

    def forward(self, x: Any) -> list[Tensor]:
        return linked_activations(self.student, list(self.earlier), x)
