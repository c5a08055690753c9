"""A batch on its way through the students, one stage after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.ensemble.exit_rules import add_votes
from bdistil.models.student import Student


@dataclass(frozen=True)
class Stage:
    """The answer after a number of students.

    Attributes:
        total: (B, L), weighted sum of the students' own logits.
        factor: by which the sum becomes the logits of the prefix; of real outputs one an output, (L,).
        index: how many students have answered, from 1.
        macs: multiply-adds per sample so far.
        offset: (L,) that real outputs have beside the factor.
    """

    total: Tensor
    factor: float | Tensor
    index: int
    macs: int
    offset: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """(B, L) of the prefix, in the teacher's units; worked out when it is read."""
        return _in_units(self.total, self.factor, self.offset)


def _in_units(total: Tensor, factor: float | Tensor, offset: Tensor | None) -> Tensor:
    return total * factor if offset is None else total * factor + offset


class StageRunner:
    """A batch and what the students so far have made of it.

    Args:
        students: in order.
        x: a batch (B, ...).
        scale: what one unit of the mean of the students' logits is in the teacher's units; of real outputs (L,).
        macs: cumulative, of each stage.
        weights: of the students in the sum; empty: all 1.
        count_votes: count the students' own answers, for the rule of agreement.
        bodies: features (B, D) of the first students' bodies, where they were run together before.
        offset: see `Stage`.
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        x: Any,
        *,
        scale: float | Tensor,
        macs: Sequence[int],
        weights: Sequence[float] = (),
        count_votes: bool = False,
        bodies: Sequence[Tensor] = (),
        offset: Tensor | None = None,
    ) -> None:
        self.students, self.x, self.scale = students, x, scale
        self.macs, self.weights, self.count_votes = macs, weights, count_votes
        self.bodies, self.offset = bodies, offset
        self.number, self.weight = 0, 0.0
        self.features: list[Tensor] = []
        self.total: Tensor | None = None
        self.votes: Tensor | None = None

    @property
    def samples(self) -> int:
        """B, of the samples that are still on their way."""
        return len(self.x)

    @property
    def factor(self) -> float | Tensor:
        """By which the sum becomes the logits of the prefix, see `Stage`."""
        return self.scale / self.weight

    @torch.no_grad()
    def advance(self) -> None:
        """Runs the next student. The features of its body are kept for those that link to it."""
        number, student = self.number, self.students[self.number]
        if isinstance(student, Student):
            linked = self.features[::-1][: student.links] if student.links else ()
            own = self.bodies[number] if number < len(self.bodies) else student.features(self.x, linked)
            logits = student.answer(own, linked)
            self.features.append(own)
        else:
            logits = student(self.x)
        if self.count_votes:
            self.votes = add_votes(self.votes, logits)
        if self.weights:
            logits = logits * self.weights[number]
        self.total = logits if self.total is None else self.total + logits
        self.weight += self.weights[number] if self.weights else 1.0
        self.number += 1

    def step(self) -> Stage:
        """Runs the next student and gives the answer of the prefix."""
        self.advance()
        assert self.total is not None
        return Stage(self.total, self.factor, self.number, self.macs[self.number - 1], self.offset)

    def logits(self, rows: Tensor | None = None) -> Tensor:
        """(B, L) of the stage at hand; of some rows (n,) of the batch: (n, L)."""
        assert self.total is not None
        return _in_units(self.total if rows is None else self.total.index_select(0, rows), self.factor, self.offset)

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch only; features that no student to come reads are dropped."""
        self.x = self.x.index_select(0, rows)
        self.total = None if self.total is None else self.total.index_select(0, rows)
        self.votes = None if self.votes is None else self.votes.index_select(0, rows)
        read = self._still_read()
        self.features = [features.index_select(0, rows) for features in self.features[len(self.features) - read :]]
        self.bodies = [features.index_select(0, rows) for features in self.bodies]

    def _still_read(self) -> int:
        """How many of the features at hand, the most recent ones, the students to come read."""
        read = between = 0
        for student in self.students[self.number :]:
            if isinstance(student, Student):
                read, between = max(read, student.links - between), between + 1
        return min(read, len(self.features))
