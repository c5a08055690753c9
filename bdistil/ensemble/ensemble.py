"""The ordered ensemble: every prefix is a predictor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.ensemble.budget import Budget, Prediction, exits_of
from bdistil.ensemble.calibration import Calibration, load_calibration
from bdistil.ensemble.prediction import predict_within
from bdistil.ensemble.restore import restore_student
from bdistil.ensemble.stacking import ONE, StackedBodies, run_bodies, stack
from bdistil.ensemble.stage_clock import StageClock
from bdistil.ensemble.stages import Stage, StageRunner
from bdistil.errors import UserError
from bdistil.metrics.quality import Task
from bdistil.models.inputs import InputSpec
from bdistil.storage.run_directory import RunDirectory


class ProgressiveEnsemble(nn.Module):
    """Students in the order of their rounds; the prefix of k answers with scale * (f_1 + … + f_k) / k (+ offset).

    Args:
        students: in order.
        scale: what one unit of the students' logits is in the teacher's units; of real outputs one an output.
        macs: cumulative multiply-adds per sample, one number a stage.
        calibration: what was fitted and measured for stopping early.
        inputs: what a sample of x is like, where that is known.
        offset: of real outputs, one an output.
    """

    scale: float | Tensor
    offset: Tensor | None

    def __init__(
        self,
        students: Sequence[nn.Module],
        *,
        scale: float | Sequence[float] = 1.0,
        macs: Sequence[int] = (),
        calibration: Calibration | None = None,
        inputs: InputSpec | None = None,
        offset: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        if offset is None:
            self.scale, self.offset = scale, None  # type: ignore[assignment]
        else:
            self.register_buffer("scale", torch.tensor(scale), persistent=False)
            self.register_buffer("offset", torch.tensor(offset), persistent=False)
        self.macs = list(macs) or [0] * len(self.students)
        self.calibration, self.inputs = calibration or Calibration(len(self.students)), inputs or InputSpec()
        self._groups: dict[str, list[StackedBodies]] = {}
        self._known: tuple[Calibration | None, StageClock | None] = (None, None)
        self.requires_grad_(False).train(False)

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        student: Callable[[int], nn.Module] | None = None,
        calibration: bool = True,
    ) -> ProgressiveEnsemble:
        """The ensemble of a run: needs no recipe, no teacher, no data.

        round.json names the classes of the students' modules, which are imported: such a file is code, as a Python
        file is. Weights are safetensors, which are not.

        Args:
            run_dir: the run directory.
            student: the run's `make_student`, needed only where a student's classes cannot be imported by name.
            calibration: load what was fitted and measured for stopping early, where there is any.

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
        macs = [record["curve"]["macs"] for record in records]
        known, inputs = load_calibration(run) if calibration else None, InputSpec.of(records[0])
        units = {"scale": records[0]["scale"], "offset": records[0].get("offset")}
        return cls(students, macs=macs, calibration=known, inputs=inputs, **units)

    def __len__(self) -> int:
        return len(self.students)

    @property
    def task(self) -> Task:
        """What it answers: `classification` with logits, or `regression` with real outputs."""
        return "classification" if self.offset is None else "regression"

    def train(self, mode: bool = True) -> ProgressiveEnsemble:
        """Stays in eval mode: students are finished."""
        return super().train(False)

    def stage_runner(self, x: Any, *, count_votes: bool = False) -> StageRunner:
        """A batch before its first stage.

        Args:
            x: a batch (B, ...), on the device of the ensemble.
            count_votes: count the students' own answers, for the exit rule of agreement.

        Raises:
            UserError: x is not of the shape or dtype of training, or holds NaN or infinity.
        """
        self.inputs.check(x)
        return StageRunner(
            list(self.students),
            x,
            scale=self.scale,
            macs=self.macs,
            weights=self.calibration.weights,
            count_votes=count_votes,
            offset=self.offset,
        )

    def stages(self, x: Any) -> Iterator[Stage]:
        """The answers of the prefixes, lazily: a student runs when its stage is asked for.

        Between two stages the loop may be left at any time; the stage at hand stays the best answer so far.

        Args:
            x: a batch (B, ...), on the device of the ensemble.
        """
        runner = self.stage_runner(x)
        for _ in range(len(self)):
            yield runner.step()

    async def astages(self, x: Any) -> AsyncIterator[Stage]:
        """`stages` for asyncio: each student runs in a thread, and the loop is free meanwhile.

        A wait that is cancelled, by a timeout for example, leaves the stage at hand as the best answer so far; the
        student that was running ends in its thread, and no other starts.

        Args:
            x: a batch (B, ...), on the device of the ensemble.
        """
        runner = self.stage_runner(x)
        for _ in range(len(self)):
            yield await asyncio.to_thread(runner.step)

    def forward(self, x: Any, stages: int | None = None, schedule: str | None = None) -> Tensor:
        """Logits (B, L) of the prefix of `stages` students, in the teacher's units; all of them by default.

        Args:
            x: a batch (B, ...), on the device of the ensemble.
            stages: how many students answer.
            schedule: ``one`` after the other, bodies in ``pairs`` or ``all`` bodies together; by default the one that
                was measured to be fastest.

        Raises:
            UserError: `stages` is not in 1 … T, or the students cannot run by `schedule`.
        """
        count = len(self) if stages is None else stages
        if not 1 <= count <= len(self):
            raise UserError(f"Expected `stages` to be in 1 … {len(self)}, got {stages}.")
        runner = self.stage_runner(x)
        runner.bodies = self._bodies(x, count, schedule)
        for _ in range(count - 1):
            runner.advance()
        return runner.step().logits

    def _bodies(self, x: Any, count: int, schedule: str | None) -> Sequence[Tensor]:
        """Features of the first students' bodies, where they are to run together; else none."""
        if schedule is None:
            schedule = self.calibration.schedule(len(x), x.device.type) if self.calibration.times else ONE
        if schedule == ONE:
            return ()
        if schedule not in self._groups:
            self._groups[schedule] = stack(list(self.students), schedule)
        return run_bodies(self._groups[schedule], x, count)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ProgressiveEnsemble:
        """Of nn.Module: moves or converts all parameters; stacked copies of them are made anew."""
        self._groups.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def predict(self, x: Tensor, budget: Budget | None = None) -> Prediction:
        """Answers within a budget; work beyond it is not done.

        Samples that are decided leave the batch, so that the next student runs on fewer. Where that was measured to
        cost more than it saves they stay, and later students answer them as well.

        Args:
            x: a batch (B, ...), on the device of the ensemble.
            budget: limits; none runs all students.

        Raises:
            UserError: x is not of the shape or dtype of training or holds NaN; or the budget asks for fitted
                thresholds, and there are none, or for the confidence of real outputs, which have none.
        """
        started = time.perf_counter()
        budget = budget or Budget()
        if budget.confidence is not None and self.task == "regression":
            raise UserError(
                f"Expected a budget without `confidence` for real outputs, which have no classes to be sure of, got "
                f"{budget.confidence!r}. Limit `stages`, `macs` or `seconds`."
            )
        exits = exits_of(budget, self.calibration)
        runner = self.stage_runner(x, count_votes=exits is not None and exits.rule == "agreement")
        return predict_within(runner, budget, exits, self._clock(x.device), started)

    def _clock(self, device: torch.device) -> StageClock | None:
        """The measured times, where they are of this device; kept, as is what was decided by them."""
        calibration = self.calibration
        if not calibration.times or calibration.device != device.type:
            return None
        if self._known[0] is not calibration:
            self._known = calibration, StageClock(calibration.times)
        return self._known[1]
