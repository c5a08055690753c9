"""The ordered ensemble: every prefix is a predictor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.blueprint import rebuild
from bdistil.budgets import Budget, Prediction, decided
from bdistil.errors import UserError
from bdistil.run_directory import RunDirectory
from bdistil.students import Rung, Student, links_of


@dataclass(frozen=True)
class Stage:
    """The answer after a number of students.

    Attributes:
        logits: (B, L) of the prefix, in the teacher's units.
        index: how many students have answered, from 1.
        macs: multiply-adds per sample so far.
    """

    logits: Tensor
    index: int
    macs: int


class ProgressiveEnsemble(nn.Module):
    """Students in the order of their rounds; the prefix of k answers with scale * (f_1 + … + f_k) / k.

    Args:
        students: in order.
        scale: what one unit of the students' logits is in the teacher's units.
        macs: cumulative multiply-adds per sample, one number a stage.
    """

    def __init__(self, students: Sequence[nn.Module], *, scale: float = 1.0, macs: Sequence[int] = ()) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.scale = scale
        self.macs = list(macs) or [0] * len(self.students)
        self.requires_grad_(False).train(False)

    @classmethod
    def load(
        cls, run_dir: str | os.PathLike[str], *, student: Callable[[int], nn.Module] | None = None
    ) -> ProgressiveEnsemble:
        """The ensemble of a run: needs no recipe, no teacher, no data.

        round.json names the classes of the students' modules, which are imported: such a file is code, as a Python
        file is. Weights are safetensors, which are not.

        Args:
            run_dir: the run directory.
            student: the run's `make_student`, needed only where a student's classes cannot be imported by name.

        Raises:
            UserError: no round is committed there, or a student's class cannot be imported.
            RunError: a file of a committed round is missing or torn.
        """
        run = RunDirectory(run_dir)
        number = run.committed()
        if not number:
            raise UserError(f"No round is committed in `run_dir` {run.root}. Train one with `bdistil fit`.")
        students: list[nn.Module] = []
        for t in range(number):
            students.append(restore_student(run, t, students, student))
        records = [run.record(t) for t in range(number)]
        return cls(students, scale=records[0]["scale"], macs=[r["curve"]["macs"] for r in records])

    def __len__(self) -> int:
        return len(self.students)

    def train(self, mode: bool = True) -> ProgressiveEnsemble:
        """Stays in eval mode: students are finished."""
        return super().train(False)

    @torch.no_grad()
    def _step(self, x: Any, number: int, total: Tensor | None, features: list[Tensor]) -> Tensor:
        """Adds the logits of one student to the running sum; keeps its features for those that link to it."""
        student = self.students[number]
        if isinstance(student, Student):
            own = student.features(x)
            logits = student.answer(own, features[::-1][: student.links])
            features.append(own)
        else:
            logits = student(x)
        return logits if total is None else total + logits

    def stages(self, x: Any) -> Iterator[Stage]:
        """The answers of the prefixes, lazily: a student runs when its stage is asked for.

        Args:
            x: a batch (B, ...), on the device of the ensemble.
        """
        total: Tensor | None = None
        features: list[Tensor] = []
        for number in range(len(self)):
            total = self._step(x, number, total, features)
            yield Stage(total * (self.scale / (number + 1)), number + 1, self.macs[number])

    def forward(self, x: Any, stages: int | None = None) -> Tensor:
        """Logits (B, L) of the prefix of `stages` students, in the teacher's units; all of them by default.

        Raises:
            UserError: `stages` is not in 1 … T.
        """
        count = len(self) if stages is None else stages
        if not 1 <= count <= len(self):
            raise UserError(f"Expected `stages` to be in 1 … {len(self)}, got {stages}.")
        total: Tensor | None = None
        features: list[Tensor] = []
        for number in range(count):
            total = self._step(x, number, total, features)
        assert total is not None
        return total * (self.scale / count)

    @torch.no_grad()
    def predict(self, x: Tensor, budget: Budget | None = None) -> Prediction:
        """Answers within a budget; work beyond it is not done.

        Samples that are decided leave the batch, so that the next student runs on fewer.

        Args:
            x: a batch (B, ...), on the device of the ensemble.
            budget: limits; none runs all students.
        """
        budget = budget or Budget()
        started, longest = time.perf_counter(), 0.0
        allowed = budget.stages_within(self.macs)
        logits, stages = torch.empty(0), torch.zeros(len(x), dtype=torch.int64)
        active, total, features = torch.arange(len(x), device=x.device), None, list[Tensor]()
        for number in range(allowed):
            begun = time.perf_counter()
            if budget.seconds is not None and number and begun - started + longest > budget.seconds:
                break
            total = self._step(x, number, total, features)
            answer = total * (self.scale / (number + 1))
            logits = answer.clone() if number == 0 else logits.index_copy_(0, active, answer)
            stages[active.cpu()] = number + 1
            if budget.confidence is not None and number + 1 < allowed:
                keep = ~decided(answer, budget.confidence)
                if not keep.any():
                    break
                if not keep.all():
                    active, total, x = active[keep], total[keep], x[keep]
                    features = [f[keep] for f in features]
            longest = max(longest, time.perf_counter() - begun)
        return Prediction(logits, stages, torch.tensor(self.macs)[stages - 1])


def restore_student(
    run: RunDirectory, number: int, earlier: Sequence[nn.Module], make: Callable[..., nn.Module] | None
) -> nn.Module:
    """A committed student, in eval mode.

    Args:
        run: the run directory.
        number: the round.
        earlier: the students before it, in order.
        make: `make_student`; without it the student is built from what round.json says of it.

    Raises:
        UserError: the classes cannot be imported and `make` was not given.
        RunError: a file is missing or torn.
    """
    record, tensors = run.record(number), run.weights(number)
    if make is None:
        if record["blueprint"] is None:
            raise UserError(
                f"The student of round {number} cannot be built from its files ({record['indescribable']}). "
                "Give ProgressiveEnsemble.load(run_dir, student=make_student)."
            )
        student = rebuild(record["blueprint"], tensors)
    else:
        with torch.random.fork_rng():
            student = build_student(make, number, earlier, Rung(**record["rung"]))
        try:
            student.load_state_dict({name: tensors[name] for name in student.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"The student of round {number + 1} in {run.root} is another than `student` makes now ({error}). "
                "Give the function that the run was started with, or choose another `run_dir`."
            ) from error
    return student.requires_grad_(False).train(False)


def build_student(make: Callable[..., nn.Module], number: int, earlier: Sequence[nn.Module], rung: Rung) -> nn.Module:
    """A new student of a class: made by the user's function, then linked.

    Raises:
        UserError: the function gave no module.
    """
    student = make(number) if rung.width == 1 else make(number, width=rung.width)
    if not isinstance(student, nn.Module):
        raise UserError(f"Expected `student` to return a torch.nn.Module, got {type(student).__name__}.")
    if isinstance(student, Student) and not links_of(student):
        student.link(earlier, rung)
    return student
