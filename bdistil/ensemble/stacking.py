"""Bodies side by side: links join at the head, so the bodies of students of one shape can run as one.

The hybrid schedule of B-DISTIL: the bodies of a group run together on stacked parameters, then the heads one after the
other, as each reads features of bodies that are there. The numbers are those of one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.student import Student
from bdistil.storage.blueprint import IndescribableError, describe

ONE = "one"
GROUPS = {"pairs": 2, "all": None}  # schedule: students in a group


class _Features(nn.Module):
    """A student as the map from x to the features of its body."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Any) -> Tensor:
        return self.student.features(x)


class StackedBodies:
    """The bodies of students of one shape as one module on stacked parameters.

    Args:
        students: at least one; their parameters are copied.
    """

    def __init__(self, students: Sequence[Student]) -> None:
        bodies = [student.body for student in students]
        state = [torch.func.stack_module_state(bodies)[kind] for kind in (0, 1)]
        self.parameters, self.buffers = ({f"student.body.{k}": v.detach() for k, v in s.items()} for s in state)
        self.template = _Features(deepcopy(students[0]))

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Any) -> Tensor:
        features: Tensor = torch.func.functional_call(self.template, (parameters, buffers), (x,))
        return features

    @torch.no_grad()
    def __call__(self, x: Any) -> tuple[Tensor, ...]:
        """Features (B, D) of each student."""
        together = torch.func.vmap(self._one, in_dims=(0, 0, None))
        return torch.unbind(together(self.parameters, self.buffers, x))


def stack(students: Sequence[nn.Module], schedule: str) -> list[StackedBodies]:
    """The groups of a schedule, in order; a student left over at the end of the pairs is a group of its own.

    Args:
        students: in order.
        schedule: a key of `GROUPS`.

    Raises:
        UserError: there is no such schedule, or the students of a group are not of one shape.
    """
    if schedule not in GROUPS:
        raise UserError(f"Expected `schedule` to be one of {', '.join((ONE, *GROUPS))}, got {schedule!r}.")
    size = GROUPS[schedule] or len(students)
    groups = [students[start : start + size] for start in range(0, len(students), size)]
    if not all(map(_of_one_shape, groups)):
        raise UserError(
            f"The schedule {schedule!r} runs bodies of one shape together, and the students of this ensemble differ, "
            f"or are no bdistil.Student. Take schedule={ONE!r}."
        )
    return [StackedBodies([s for s in group if isinstance(s, Student)]) for group in groups]


def _of_one_shape(students: Sequence[nn.Module]) -> bool:
    if not all(isinstance(student, Student) and not student.states_read for student in students):
        return False
    try:
        shapes = [_shape(student) for student in students if isinstance(student, Student)]
    except IndescribableError:
        return False
    return all(shape == shapes[0] for shape in shapes)


def _shape(student: Student) -> tuple[Any, ...]:
    """All that features depend on but the values of the parameters."""
    plan, tensors = describe(student.body)
    beside = {key: value for key, value in vars(student).items() if key[0] != "_" and key not in ("links", "join")}
    return type(student), beside, plan, [(key, value.shape, value.dtype) for key, value in tensors.items()]


def run_bodies(groups: Sequence[StackedBodies], x: Any, count: int) -> list[Tensor]:
    """Features (B, D) of the first students by groups, no more than `count`: a group that goes beyond is left out."""
    features: list[Tensor] = []
    for group in groups:
        size = len(next(iter(group.parameters.values())))
        if len(features) + size > count:
            break
        features += group(x)
    return features
