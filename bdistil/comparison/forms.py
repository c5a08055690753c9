"""Forms of the students that a comparison trains: those of the recipe, and single ones of as many MACs as a prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from bdistil.boosting.costs import student_cost, student_latency
from bdistil.boosting.settings import BoostingSettings
from bdistil.errors import UserError
from bdistil.models.student import Rung, Student, build_student

TOLERANCE = 0.05  # relative distance between the MACs of a prefix and of the one student beside it
WIDEST = 64.0

Make = Callable[..., nn.Module]


@dataclass(frozen=True)
class Forms:
    """What the methods of a comparison train.

    Attributes:
        prefixes: MACs of the prefixes of the recipe's ensemble, links included.
        widths: for each prefix, the width of one student of as many MACs; empty if no method needs them.
        oracle: MACs of these students.
        first: the form of the first student.
    """

    prefixes: tuple[int, ...]
    widths: tuple[float, ...]
    oracle: tuple[int, ...]
    first: Rung


def plan_forms(make: Make, settings: BoostingSettings, x: Any, *, widths: bool) -> Forms:
    """Builds the students of a recipe without training them, and finds the widths of single ones of as many MACs.

    Args:
        make: ``make_student(round)``; for the widths ``make_student(round, width=...)``.
        settings: of the recipe. Each round has the class that it tries first.
        x: a batch (B, ...) as an example.
        widths: whether the widths are needed.

    Raises:
        UserError: `make` takes no width.
    """
    first = next((rung for rung in settings.ladder if rung.links == 0), Rung(0))
    students = planned_students(make, settings, x)
    costs = [student_cost(s, students[:n], x, "record").macs for n, s in enumerate(students)]
    prefixes = tuple(accumulate(costs))
    if not widths:
        return Forms(prefixes, (), (), first)

    @cache
    def macs_of(width: float) -> int:
        with torch.random.fork_rng():
            student = build_student(make, 0, [], Rung(0, width=width))
        return int(student_cost(student, [], x, "record").macs)

    found = tuple(width_for(target, _named_width(macs_of), first.width) for target in prefixes)
    forms = Forms(prefixes, found, tuple(map(macs_of, found)), first)
    _tell_of_coarse(forms)
    return forms


def planned_students(make: Make, settings: BoostingSettings, x: Any) -> list[nn.Module]:
    """The students of all rounds, untrained, each of the class that its round tries first."""
    students: list[nn.Module] = []
    with torch.random.fork_rng():
        links = isinstance(build_student(make, 0, [], Rung(0)), Student)
        for number in range(settings.rounds):
            student = build_student(make, number, students, settings.rungs(number, links=links)[0], x)
            students.append(student.train(False))
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


def _tell_of_coarse(forms: Forms) -> None:
    """Says where students cannot be made as large as a prefix; a comparison interpolates over MACs then."""
    off = [f"{own:,} for {goal:,}" for own, goal in zip(forms.oracle, forms.prefixes, strict=True) if _far(own, goal)]
    if off:
        rank_zero_info(f"no_resched: no width of the student comes within {TOLERANCE:.0%} of {', '.join(off)} MACs.")


def _far(macs: int, goal: int) -> bool:
    return abs(macs / goal - 1) > TOLERANCE


def width_for(target: int, macs_of: Callable[[float], int], start: float = 1.0) -> float:
    """The width whose MACs are nearest to a number, by bisection; MACs rise with the width.

    Args:
        target: MACs.
        macs_of: MACs of a student of a width.
        start: width to begin with.

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


def latencies(make: Make, settings: BoostingSettings, forms: Forms, x: Any) -> dict[str, list[float]]:
    """Milliseconds of the prefixes of untrained students for one sample, on the CPU, by the form of the ensemble.

    `chain` are the recipe's students, `resched` as many of the first one's form, `no_resched` single ones.
    """
    with torch.random.fork_rng():
        chain = planned_students(make, settings, x)
        alike = [build_student(make, 0, [], forms.first).train(False) for _ in chain]
        single = [build_student(make, 0, [], Rung(0, width=width)).train(False) for width in forms.widths]

    def prefixes(students: Sequence[nn.Module]) -> list[float]:
        own = [student_latency(student, students[:n], x, torch.device("cpu")) for n, student in enumerate(students)]
        return list(accumulate(own))

    return {
        "chain": prefixes(chain),
        "resched": prefixes(alike),
        "no_resched": [prefixes([student])[0] for student in single],
    }
