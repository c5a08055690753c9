"""The students of a comparison: those of the recipe, and single ones with the MACs of a prefix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from bdistil.boosting.costs import student_cost, student_latency
from bdistil.boosting.settings import BoostingSettings
from bdistil.errors import UserError
from bdistil.models.student import Rung, Student, build_student

WIDEST = 64.0
TURNS = 5  # latencies are measured in turns, so that a busy moment does not affect a single network

Make = Callable[..., nn.Module]
Rungs = tuple[Rung, ...]  # classes of the students of an ensemble, in order


@dataclass(frozen=True)
class PlannedStudents:
    """The students that the methods of a comparison train: those of the recipe, and single ones of as many MACs.

    Attributes:
        rungs: classes of the recipe's students; a rejected round uses a later one.
        prefix_macs: MACs of the prefixes of the recipe's ensemble, links included.
        single_widths: for each prefix, the width of a single student with as many MACs; empty if no method needs them.
        single_macs: MACs of these single students.
        first: class of the first student.
    """

    rungs: Rungs
    prefix_macs: tuple[int, ...]
    single_widths: tuple[float, ...]
    single_macs: tuple[int, ...]
    first: Rung


def plan_students(make: Make, settings: BoostingSettings, x: Any, *, widths: bool) -> PlannedStudents:
    """Builds the students of a recipe without training them, and finds the widths of single ones with as many MACs.

    Args:
        make: ``make_student(round)``; for the widths ``make_student(round, width=...)``.
        settings: settings of the recipe; each round is planned with the class it tries first.
        x: an example batch (B, ...).
        widths: whether the widths are needed.

    Raises:
        UserError: `make` takes no width, or students read segments of x, and widths are needed.
    """
    first = next((rung for rung in settings.ladder if rung.links == 0), Rung(0))
    with isolate_rng(include_cuda=False):
        rungs = planned_rungs(make, settings)
    students = build_students(make, rungs, x)
    if widths and isinstance(students[0], Student) and students[0].most_rounds is not None:
        raise UserError(
            f"Expected students that read all of x, for the method no_resched, got {type(students[0]).__name__}: a "
            "single one reads the first segment only, whatever its width. Leave the method out of `methods`."
        )
    costs = [student_cost(s, students[:n], x, "record").macs for n, s in enumerate(students)]
    planned = PlannedStudents(rungs, tuple(accumulate(costs)), (), (), first)
    return with_widths(planned, make, x) if widths else planned


def with_widths(planned: PlannedStudents, make: Make, x: Any, reached: Sequence[int] = ()) -> PlannedStudents:
    """Finds the widths of single students with as many MACs as the prefixes.

    Args:
        planned: the recipe's students.
        make: `make_student` of the recipe.
        x: an example batch (B, ...).
        reached: MACs of the committed prefixes of a finished run.

    Raises:
        UserError: `make` takes no width.
    """
    more = reached[-1] - planned.prefix_macs[len(reached) - 1] if reached else 0
    prefixes = (*reached, *(macs + more for macs in planned.prefix_macs[len(reached) :]))

    @cache
    def macs_of(width: float) -> int:
        (student,) = build_students(make, (Rung(0, width=width),), x)
        return int(student_cost(student, [], x, "record").macs)

    found = tuple(width_for(target, _named_width(macs_of), planned.first.width) for target in prefixes)
    return replace(planned, prefix_macs=prefixes, single_widths=found, single_macs=tuple(map(macs_of, found)))


def equal_macs_note(planned: PlannedStudents) -> str:
    """Note on the prefixes whose single students have equal MACs, as widths are rounded; empty if there are none."""
    groups = [
        [n for n, macs in enumerate(planned.single_macs, 1) if macs == own]
        for own in dict.fromkeys(planned.single_macs)
    ]
    shared = [f"prefixes {', '.join(map(str, group))}" for group in groups if len(group) > 1]
    return f"Students of no_resched have equal MACs beside {'; '.join(shared)}: widths are rounded." if shared else ""


def planned_rungs(make: Make, settings: BoostingSettings) -> Rungs:
    """The class that each round tries first; builds one student to find out whether students take links."""
    links = isinstance(build_student(make, 0, [], Rung(0)), Student)
    return tuple(settings.rungs(number, links=links)[0] for number in range(settings.rounds))


def build_students(make: Make, rungs: Rungs, x: Any) -> list[nn.Module]:
    """Untrained students of these classes, in eval mode."""
    students: list[nn.Module] = []
    with isolate_rng(include_cuda=False):
        for number, rung in enumerate(rungs):
            students.append(build_student(make, number, students, rung, x).train(False))
    return students


def _named_width(macs_of: Callable[[float], int]) -> Callable[[float], int]:
    def checked(width: float) -> int:
        try:
            return macs_of(width)
        except TypeError as error:
            raise UserError(
                f"Expected a student that takes `width`, for the method no_resched, got: {error}. "
                "Give make_student(round, width=1.0), or leave the method out of `methods`."
            ) from error

    return checked


def width_for(target: int, macs_of: Callable[[float], int], start: float = 1.0) -> float:
    """Finds the width whose MACs are nearest to a target by bisection; MACs must increase with the width.

    Args:
        target: MACs to match.
        macs_of: returns the MACs of a student of a given width.
        start: initial width.

    Example:
        >>> width_for(1000, lambda width: round(10 * width) ** 2)
        3.15234375
    """
    low, high = 0.0, start
    while macs_of(high) < target and high < WIDEST:
        low, high = high, 2 * high
    while high - low > start / 256:
        middle = (low + high) / 2
        low, high = (middle, high) if macs_of(middle) < target else (low, middle)
    return min((width for width in (low, high) if width > 0), key=lambda width: abs(macs_of(width) - target))


def latencies(make: Make, ensembles: Iterable[Rungs], x: Any) -> dict[Rungs, float]:
    """Latency in milliseconds of untrained ensembles and their prefixes for one sample, on the CPU.

    All students are measured in turns; the fastest turn of each counts.

    Args:
        make: `make_student` of the recipe.
        ensembles: the classes of the students of each ensemble.
        x: an example batch (B, ...).
    """
    chains: dict[Rungs, list[nn.Module]] = {}
    for rungs in ensembles:
        students = build_students(make, rungs, x)
        for count in range(1, len(rungs) + 1):
            chains.setdefault(rungs[:count], students[:count])
    own = dict.fromkeys(chains, math.inf)
    for _ in range(TURNS):
        for rungs, (*earlier, student) in chains.items():
            own[rungs] = min(own[rungs], student_latency(student, earlier, x, torch.device("cpu")))
    found: dict[Rungs, float] = {(): 0.0}
    for rungs in chains:
        found[rungs] = found[rungs[:-1]] + own[rungs]
    return found
