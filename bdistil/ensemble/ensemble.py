"""The ordered ensemble of students; every prefix of it is a predictor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bdistil.ensemble.budget import Budget, Prediction
from bdistil.ensemble.calibration import Calibration, exits_of, load_calibration
from bdistil.ensemble.restore import restore_student
from bdistil.ensemble.stages import StackedBodies, Stage, StageRunner, Wiring, prefix_factor, time_of
from bdistil.errors import UserError
from bdistil.metrics.quality import PrefixMetric, Task, given_labels, prefix_metric
from bdistil.models.inputs import InputSpec
from bdistil.runner.exits import ExitPlan, Exits, predict_within, runs
from bdistil.runner.stage_clock import Deadline, Guard
from bdistil.storage.run_directory import RunDirectory, task_of
from bdistil.utils.trees import device_of

SCHEDULES = ("one", "all")
PLANS = 64  # largest number of budgets whose exits are cached


class ProgressiveEnsemble(nn.Module):
    """Students in the order of their rounds. The prefix of k students answers scale * (f_1 + … + f_k) / k (+ offset).

    Its students are frozen, and no gradient passes through them to x. `load` restores all of it; a state dict holds
    weights, not MACs, calibration or the scale of class logits.

    Args:
        students: the students, in order.
        scale: one unit of the students' logits in the teacher's units; one value per output for real outputs.
        macs: cumulative multiply-adds per sample, one value per stage; required by budgets that limit them.
        calibration: values fitted and measured for early exit.
        inputs: shape and dtype of a sample, if known; inputs are checked against it.
        offset: added to real outputs and to multi-label logits, one value per output.
        task: task of the run; by default classification without an offset, regression with one.

    Example:
        >>> from bdistil import Budget, ProgressiveEnsemble, Student
        >>> _ = torch.manual_seed(0)
        >>> students = [Student(nn.Linear(4, 8), nn.Linear(8, 3)) for _ in range(3)]
        >>> ensemble = ProgressiveEnsemble(students, macs=[56, 112, 168])
        >>> x = torch.randn(5, 4)
        >>> ensemble(x, stages=2).shape
        torch.Size([5, 3])
        >>> [stage.macs for stage in ensemble.stages(x)]
        [56, 112, 168]
        >>> ensemble.predict(x, Budget(macs=120)).stages
        tensor([2, 2, 2, 2, 2])
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
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.task: Task = task or ("classification" if offset is None else "regression")
        self.students = nn.ModuleList(students)
        if offset is None:
            self.scale, self.offset = scale, None  # type: ignore[assignment]
        else:
            self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
            self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32))
        if macs and len(macs) != len(students):
            raise UserError(
                f"Expected `macs` to hold one number for each of {len(students)} students, got {len(macs)}."
            )
        if sorted(macs) != [*macs] or (len(macs) > 1 and 0 < macs[0] == macs[-1]):
            raise UserError(
                f"Expected cumulative `macs`, which rise from stage to stage, got {list(macs)}. If they are those of "
                "each student alone, give itertools.accumulate of them as a list."
            )
        self.macs = list(macs) or [0] * len(self.students)
        self.calibration, self.inputs = calibration or Calibration(len(self.students)), inputs or InputSpec()
        self.wiring = Wiring(students)
        self._stacked: StackedBodies | None = None
        self._plans: dict[Any, ExitPlan | None] = {}  # by budget and device, of one calibration
        self._plans_of: Calibration | None = None
        self.requires_grad_(False).train(False)

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        student: Callable[[int], nn.Module] | None = None,
        calibration: bool = True,
    ) -> ProgressiveEnsemble:
        """Loads the ensemble of a run; needs no recipe, no teacher and no data.

        The classes of modules named in round.json are imported, so treat that file as code. Weights are safetensors,
        which execute nothing.

        Args:
            run_dir: the run directory.
            student: the run's `make_student`; needed only if a student's classes cannot be imported by name.
            calibration: load the calibration of the run, if it has one.

        Raises:
            UserError: the run has no committed round, or a student's class cannot be imported.
            RunError: a file of a committed round is missing or torn.
        """
        run = RunDirectory(run_dir)
        number = run.committed()
        if not number:
            there = "No round is committed in" if run.root.exists() else "There is no folder"
            raise UserError(f"{there} `run_dir` {run.root}. Train one with `bdistil fit`.")
        students: list[nn.Module] = []
        for t in range(number):
            students.append(restore_student(run, t, students, student))
        records = [run.record(t) for t in range(number)]
        return cls(
            students,
            scale=records[0]["scale"],
            macs=[record["curve"]["macs"] for record in records],
            calibration=load_calibration(run) if calibration else None,
            inputs=InputSpec.of(records[0]),
            offset=records[0].get("offset"),
            task=task_of(records[0]),
        )

    def __len__(self) -> int:
        return len(self.students)

    def train(self, mode: bool = True) -> ProgressiveEnsemble:
        """Stays in eval mode: students are not trained any further."""
        return super().train(False)

    def stage_runner(self, x: Any) -> StageRunner:
        """Returns a `StageRunner` for a batch, before its first stage; checks x, see `InputSpec.check`."""
        self.inputs.check(x)
        x = self.inputs.select(x)
        students, weights, native = list(self.students), self.calibration.weights, self.calibration.native
        return StageRunner(students, self.wiring, x, self.scale, self.macs, weights, self.offset, native)

    def stages(self, x: Any) -> Iterator[Stage]:
        """Yields the answers of the prefixes; a student runs only when its stage is requested.

        The loop may be left after any stage, which then holds the best answer so far.

        Args:
            x: a batch (B, ...), or a tuple or mapping of such tensors, on the device of the ensemble.
        """
        runner = self.stage_runner(x)
        for _ in range(len(self)):
            yield runner.step()

    async def astages(self, x: Any) -> AsyncIterator[Stage]:
        """`stages` for asyncio: each student runs in a thread, so the event loop is not blocked.

        If the wait is cancelled, for example by a timeout, the last stage is the best answer so far; the running
        student finishes in its thread, and no other starts.
        """
        runner = self.stage_runner(x)
        for _ in range(len(self)):
            yield await asyncio.to_thread(runner.step)

    def forward(self, x: Any, stages: int | None = None, schedule: str | None = None) -> Tensor:
        """Logits (B, L) of the prefix of `stages` students, in the teacher's units; of all students by default.

        Args:
            x: a batch (B, ...), or a tuple or mapping of such tensors, on the device of the ensemble.
            stages: number of students.
            schedule: ``one`` student after the other, or ``all`` bodies together on stacked parameters if all
                students run; by default the faster one according to the calibration.

        Raises:
            UserError: `stages` is not in 1 … T, or the schedule is unknown or not supported by the students.
        """
        count = len(self) if stages is None else stages
        if not 1 <= count <= len(self):
            raise UserError(f"Expected `stages` to be in 1 … {len(self)}, got {stages}.")
        runner = self.stage_runner(x)
        if schedule is None:
            schedule = self.calibration.schedule(runner.size, device_of(x).type) if self.calibration.times else "one"
        if schedule not in SCHEDULES:
            raise UserError(f"Expected `schedule` to be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
        if schedule == "all":
            self._stacked = self._stacked or StackedBodies(list(self.students))
            runner.bodies = self._stacked(runner.x) if count == len(self) else ()
        for _ in range(count - 1):
            runner.advance()
        return runner.step().logits

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ProgressiveEnsemble:
        """Moves or converts all parameters, as nn.Module does; floating-point x must then have their dtype."""
        before, units, self._stacked = self._real_type(), (self.scale, self.offset), None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # In half precision, a target of 200,000 would have steps of 1,024.
        if self.offset is not None and not any(unit.is_meta for unit in units):  # type: ignore[union-attr]
            self.scale, self.offset = (unit.to(self.offset.device) for unit in units)  # type: ignore[union-attr]
        if (now := self._real_type()) != before and now is not None:
            self.inputs = self.inputs.in_type(now)
        return self

    def _real_type(self) -> torch.dtype | None:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def predict(self, x: Any, budget: Budget | None = None) -> Prediction:
        """Predicts within a budget.

        With a confidence, a sample is answered by the first stage that reaches it, independently of the other samples
        in the batch. Decided samples are removed from the batch, unless the measured times show that removing them
        costs more than it saves; `macs` of the prediction counts what was run.

        Args:
            x: a batch (B, ...), or a tuple or mapping of such tensors, on the device of the ensemble.
            budget: limits; None runs all students.

        Raises:
            UserError: x differs in shape or dtype from training or contains NaN; the budget requires fitted thresholds
                and there are none; or it sets a confidence, which is defined for classification only.
        """
        started = time.perf_counter()
        budget = budget or Budget()
        if not isinstance(budget, Budget):
            raise UserError(f"Expected a Budget, got {budget!r}: predict(x, Budget(confidence=0.9)).")
        if budget.macs is not None and not any(self.macs):
            raise UserError(
                f"Expected an ensemble whose `macs` are known for a budget of {budget.macs} multiply-adds, got one "
                "without. Give ProgressiveEnsemble(students, macs=[…]), or limit `stages`."
            )
        allowed, device, deadline = budget.stages_within(self.macs), device_of(x), None
        plan = self._plan(budget, allowed, device.type)
        runner = self.stage_runner(x)
        if budget.seconds is not None:
            clock = self.calibration.clock(device.type)
            deadline = Deadline(budget.seconds, clock, lambda: time_of(device), started)
        if plan is None:
            while runs(runner, allowed, deadline):
                pass
            return Prediction(runner.stage().logits, runner.number, self.macs)
        answer = predict_within(runner, allowed, plan, deadline)
        ran = answer.ran if isinstance(answer.ran, int) else torch.from_numpy(answer.ran)
        logits = torch.from_numpy(answer.logits).to(runner.totals[-1])
        return Prediction(logits, torch.from_numpy(answer.stages), self.macs, ran)

    def _plan(self, budget: Budget, allowed: int, device: str) -> ExitPlan | None:
        """Exits of a budget, cached; None without a confidence."""
        if self._plans_of is not self.calibration or len(self._plans) >= PLANS:
            self._plans, self._plans_of = {}, self.calibration
        key = (budget.confidence, budget.rule, allowed, device)
        if key not in self._plans:
            self._plans[key] = self._new_plan(budget, allowed, device)
        return self._plans[key]

    def _new_plan(self, budget: Budget, allowed: int, device: str) -> ExitPlan | None:
        if budget.confidence is not None and self.task != "classification":
            outputs = "real outputs" if self.task == "regression" else "several labels"
            raise UserError(
                f"Expected a budget without `confidence` for {outputs}, which have no class probabilities, got "
                f"{budget.confidence!r}. Limit `stages`, `macs` or `seconds`."
            )
        exits = exits_of(budget, self.calibration)
        if exits is None:
            return None
        return self.exit_plan(exits, Guard(self.calibration.clock(device), allowed, exits.shares))

    def exit_plan(self, exits: Exits, guard: Guard) -> ExitPlan:
        """Combines exits with the logit factors of the prefixes."""
        numbers, weights = range(1, len(self) + 1), self.calibration.weights
        return ExitPlan(exits, [float(prefix_factor(self.scale, weights, number)) for number in numbers], guard)


@torch.no_grad()
def prefix_accuracies(
    ensemble: ProgressiveEnsemble,
    loader: DataLoader[Any],
    device: torch.device,
    task: Task = "classification",
    teacher: nn.Module | None = None,
) -> list[float]:
    """Accuracy in 0 … 1, or the score of another task, of every prefix; one pass over a loader that yields (x, y).

    The answers of `teacher` replace missing labels.
    """
    scores: PrefixMetric | None = None
    for x, y in loader:
        moved = move_data_to_device(x, device)
        answers = [stage.logits.cpu() for stage in ensemble.stages(moved)]
        scores = scores or prefix_metric(task, answers[0].shape[-1], len(ensemble))
        if y is None and teacher is not None:
            y = given_labels(task, None, teacher(moved).float().cpu())
        scores.update(torch.stack(answers), y)
    return [] if scores is None else [float(a) for a in scores.compute()[0].flatten()]
