"""A boosting run: building and starting each round, and evaluating the finished run on the test part.

The state of a run is read from its directory, never from a Trainer. The RoundController calls these steps in its hooks.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from bdistil.boosting.checks.batches import check_teacher
from bdistil.boosting.checks.data import TEST, test_loader_of
from bdistil.boosting.checks.students import check_student
from bdistil.boosting.costs import Uncounted, is_api, queries_of, student_cost, teacher_row
from bdistil.boosting.labels import all_batches
from bdistil.boosting.ledger.samples import check_stored
from bdistil.boosting.optimization import Optimization
from bdistil.boosting.part import Part
from bdistil.boosting.plan import Planner, RunPlan
from bdistil.boosting.round import BoostingRound, Game
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import indexed_loaders
from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies
from bdistil.ensemble.restore import restore_student
from bdistil.errors import RunError, UserError
from bdistil.metrics.cost import Cost
from bdistil.metrics.quality import Task, given_labels, prefix_metric, score_name
from bdistil.models.student import Rung, Student, build_student
from bdistil.storage.blueprint import reason_indescribable
from bdistil.storage.provenance import describe_start
from bdistil.storage.run_directory import RunConfig, RunDirectory
from bdistil.teachers.offline import OfflineTeacher, as_teacher, declared_outputs, table_of
from bdistil.teachers.wrappers import FrozenTeacher
from bdistil.utils import distributed
from bdistil.utils.seeding import reseed, seed_of


@dataclass(frozen=True)
class RoundPlan:
    """One try of one round, ready to be fitted.

    Attributes:
        checked: result of the checks.
        module: the LightningModule of the round.
        rungs: the classes of students that the round may try, in order.
        attempt: index of this try in `rungs`.
        cost: cost of the student for one sample.
        fingerprint: fingerprint of the teacher.
    """

    checked: RunPlan
    module: BoostingRound
    rungs: Sequence[Rung]
    attempt: int
    cost: Cost
    fingerprint: str

    @property
    def rung(self) -> Rung:
        """The class of students that is tried."""
        return self.rungs[self.attempt]


class Boosting:
    """A boosting run in a run directory; takes the arguments of `bdistil.callbacks.RoundController`."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        teacher: Any,
        student: Callable[..., nn.Module],
        settings: BoostingSettings,
        seed: int = 0,
        config: Mapping[str, Any] | RunConfig | None = None,
        uncounted: Uncounted = "record",
        reads_test: bool = True,
        optimization: Optimization | None = None,
    ) -> None:
        self.run = RunDirectory(run_dir)
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(as_teacher(teacher))
        self.make, self.settings, self.seed, self.uncounted = student, settings, seed, uncounted
        self.optimization = optimization or Optimization()
        self.planner = Planner(self.run, self.teacher, student, settings, seed, self.optimization, config)
        self.reads_test = reads_test
        self.students: list[nn.Module] = []  # of the committed rounds, restored from the disk
        self.rehearsed: RoundPlan | None = None  # the round of a fast_dev_run, once it has been fitted

    def check(self, datamodule: pl.LightningDataModule) -> RunPlan:
        """Runs the checks before training, see `Planner.check`."""
        return self.planner.check(datamodule)

    def rounds(self, datamodule: pl.LightningDataModule) -> Iterator[RoundPlan]:
        """Yields the remaining rounds; while one is being fitted, the data module's loaders also yield the index.

        Raises:
            UserError: an argument is invalid, see `check`, or the ledger has another teacher or number of samples.
            RunError: a round was fitted without reaching a verdict, or a file of the run is torn.
        """
        self.rehearsed, new = None, not self.run.config.exists()
        self.students = []  # the run directory may have been emptied since an earlier loop
        plan, fingerprint = self.check(datamodule), self.teacher.fingerprint
        self._announce(plan.student, new)
        for part in plan.parts:
            if part.ledger.exists and self.run.scratch is None:
                part.ledger.open(part.samples, fingerprint)
        if self.run.scratch is None:
            plan.parts.compare_stored()
            self._compare_teacher(plan.parts.train)
        if distributed.early_rank() == 0:
            self.run.renew(self.planner.config({}))
        last, started = plan.student, False
        while (this := self._plan_round(plan, fingerprint)) is not None:
            if this.module.student is last:
                raise UserError("Expected `student` to make a new module in each round, got the same one again.")
            last, number = this.module.student, this.module.number
            if not started and distributed.early_rank() == 0:
                self.run.keep_start(describe_start())
            started, before = True, self._verdicts(number)
            with indexed_loaders(
                datamodule, seed_of(self.seed, number, this.attempt), *plan.parts.plans,
                labels=self.settings.labels, ignore_index=self.settings.ignore_index, prepare=plan.parts.replace_loader,
            ):  # fmt: skip
                yield this
            if self._ends_here(this.module, before, new):
                return
            gc.collect()  # reference cycles keep the Trainer alive

    def _compare_teacher(self, part: Part) -> None:
        """Compares some of the teacher's answers with the ledger; skips APIs, which bill queries, and tables."""
        free = declared_outputs(self.teacher) is None and not is_api(self.teacher)
        if part.ledger.exists and self.settings.state == "cached" and free:
            check_teacher(self.teacher, part)

    def _announce(self, student: nn.Module, new: bool) -> None:
        """Logs the features that students of this kind do not support."""
        kind = type(student).__name__
        if not isinstance(student, Student):
            rank_zero_info(f"{kind} is no bdistil.Student, so it takes no links: all rounds are of class F0.")
        elif any(rung.reads_stages for rung in self.settings.ladder) and student.staged is None:
            rank_zero_info(f"{kind} has no stages: rungs of the kinds 'deep' and 'start' link to its features.")
        script = next((type(part).__name__ for part in student.modules() if type(part).__module__ == "__main__"), None)
        why = reason_indescribable(student) or (script and f"{script} is defined in the script, not in a module")
        if new and why:
            rank_zero_info(
                f"The student cannot be built from the files of the run ({why}): ProgressiveEnsemble.load(run_dir, "
                "student=make_student) loads it, and it cannot be exported."
            )

    def _ends_here(self, module: BoostingRound, before: tuple[int, int], new: bool) -> bool:
        """Whether the loop over the rounds ends: after a fast_dev_run, or if the module was not passed to a Trainer.

        Raises:
            RunError: the module was fitted, but no verdict was added to those `before`.
        """
        if self.rehearsed is not None:
            self._end_rehearsal(new)
            return True
        if self._verdicts(module.number) != before:
            return False
        if is_attached(module):
            raise RunError(
                f"Round {module.number + 1} came back without a verdict. Was its module fitted to the end by a Trainer "
                "with callbacks=[controller]?"
            )
        rank_zero_warn(
            f"Round {module.number + 1} was not fitted, so the loop over `rounds()` ends; nothing of it was committed. "
            "Fit the module of each round: trainer.fit(module, datamodule, ckpt_path=controller.ckpt_path)."
        )
        return True

    def _verdicts(self, number: int) -> tuple[int, int]:
        """As the first process sees them: another host may list a folder on a network disk as it was before."""
        committed, tries = distributed.from_first(self.run.verdicts(number))
        return committed, tries

    def _plan_round(self, plan: RunPlan, fingerprint: str) -> RoundPlan | None:
        """Builds the student of the next round; returns None if the run is finished."""
        run, settings = self.run, self.settings
        number, tries, reason = distributed.from_first(_progress(run))
        if reason is not None:
            rank_zero_info(f"Boosting has stopped after {number} of {settings.rounds} rounds: {reason}.")
            return None
        if number >= settings.rounds:
            return None
        while len(self.students) < number:
            self.students.append(restore_student(run, len(self.students), self.students, self.make))
        rungs = settings.rungs(number, links=isinstance(plan.student, Student))
        if len(tries) >= len(rungs):  # the process was killed after the last rejection
            self.stop(number, tries[-1])
            return None
        reseed(self.seed, number, len(tries), "build")
        for module in self.students:
            module.cpu()
        student = build_student(self.make, number, self.students, rungs[len(tries)], plan.example)
        student.cpu()
        check_student(student, self.students, plan.example, plan.outputs)
        cost = student_cost(student, self.students, plan.example, self.uncounted)
        if cost.macs == 0:
            raise UserError(
                f"Expected a student with multiply-adds, over which the curve is drawn, got {type(student).__name__}, "
                "in which none is counted (only matrix products and convolutions are)."
            )
        module = BoostingRound(
            student,
            number=number,
            settings=settings,
            earlier=self.students,
            train=plan.parts.train,
            val=plan.parts.val,
            views=plan.parts.views,
            teacher=self.teacher if settings.state == "recompute" else None,
            optimization=self.optimization,
            run_dir=run.root,
        )
        return RoundPlan(plan, module, rungs, len(tries), cost, fingerprint)

    # ---- a round; its end is in `bdistil.boosting.commit`

    def open(self, plan: RoundPlan) -> None:
        """Brings the ledgers up to date on the device of a round, and sets the loss constants of its module.

        The teacher is evaluated on all samples if its logits are not in the ledgers.

        Raises:
            RunError: NaN or infinity among the teacher's logits.
        """
        parts, device = plan.checked.parts, plan.module.device
        parts.start_fit(plan.module.trainer.datamodule)  # type: ignore[attr-defined]
        if self.run.scratch is not None:
            parts.claim(self.run)
        known = all(part.ledger.exists for part in parts) and self.run.read("teacher") is not None
        if not distributed.all_true(known):
            self._query_teacher(plan, device)
        inputs = plan.checked.inputs  # the first process has seen all samples
        parts.catch_up(
            self.students, device, plan.fingerprint, fixed=distributed.from_first(inputs.known and not inputs.varies)
        )
        plan.module.start(Game.of(parts.train.ledger, self.settings, device))

    def _query_teacher(self, plan: RoundPlan, device: torch.device) -> None:
        parts, outputs, teacher = plan.checked.parts, plan.checked.outputs, self.teacher
        samples = sum(part.samples for part in parts)
        if plan.checked.inputs.varies:
            rank_zero_info("The shape of samples varies: all MACs are those of the first training sample.")
        rank_zero_info(f"Evaluating the teacher on {samples:,} samples …")
        row = teacher_row(teacher, plan.checked.example, device, samples, self.uncounted)
        accuracy, loss = parts.query(teacher, device, outputs, plan.fingerprint)
        teacher.cpu()
        spent = {"queries": queries_of(teacher)} if is_api(teacher) else {}
        if distributed.rank() == 0:
            self.run.write("teacher", {**row, "val_accuracy": accuracy, "val_loss": loss, **spent})
        distributed.barrier()
        cost = f"{spent['queries']:,} queries" if spent else f"{row['macs']:,} MACs a sample"
        rank_zero_info(f"Teacher: {score_name(self.settings.task)} {accuracy:.4f} on validation, {cost}.")

    def stop(self, number: int, reason: str) -> None:
        """Records that no class of students was accepted."""
        if distributed.early_rank() == 0:
            self.run.stop(number, f"no class of students was accepted in round {number + 1}; last, {reason}")

    # ---- a fast_dev_run, which commits nothing

    def _end_rehearsal(self, new: bool) -> None:
        """Removes what was written to a `new` run directory, so that the real run may use another configuration."""
        distributed.barrier()
        if new and distributed.early_rank() == 0:
            self.run.discard()
        rank_zero_info("fast_dev_run: one round was fitted for a few batches; nothing was committed.")

    # ---- the end of the run

    @property
    def ensemble(self) -> ProgressiveEnsemble:
        """The ensemble of the committed rounds; after a fast_dev_run without any, that of its student alone."""
        if self.rehearsed is not None and not self.run.committed():
            head, plan = self.rehearsed.checked.parts.train.ledger.head, self.rehearsed
            student = plan.module.student.cpu()
            return ProgressiveEnsemble(
                [student], scale=head.scale, offset=head.offset, macs=[plan.cost.macs], task=self.settings.task
            )
        return ProgressiveEnsemble.load(self.run.root, student=self.make)

    def finish(self, datamodule: pl.LightningDataModule, device: torch.device) -> None:
        """Evaluates the test part, once per run, and writes its accuracies to the curve."""
        if distributed.early_rank() != 0 or not self.run.committed():
            return
        asked = self.reads_test and self.run.read("test") is None
        loader = test_loader_of(datamodule, self.settings) if asked else None
        if loader is not None:
            figures = self._test_figures(loader, device)
            if figures is not None:
                self.run.write("test", figures)
        self.run.write_curve(self.run.rows())

    def _test_figures(self, loader: Any, device: torch.device) -> list[float | None] | None:
        """Scores of the teacher (None if unknown) and of every prefix on the test part.

        None if there are neither labels nor a teacher to compare with, or if the test part cannot be evaluated, which
        must not fail a run whose rounds are all committed.
        """
        settings, table = self.settings, table_of(self.teacher)
        asked = None if is_api(self.teacher) or table else self.teacher  # API queries are reserved for training
        if settings.labels is None and asked is None:
            return None
        figures = partial(prefix_accuracies, loader=loader, device=device, task=settings.task, teacher=asked)
        try:
            check_stored(self.run.ledger / "test", TEST, loader.dataset)
            teacher: list[float | None] = [None if table is None else table_figure(table, loader, settings.task)]
            if asked is not None:
                teacher = [*figures(ProgressiveEnsemble([asked], task=settings.task).to(device))]
            return [*teacher, *figures(self.ensemble.to(device))]
        except (UserError, RunError, RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
            rank_zero_warn(
                f"The test part could not be evaluated ({type(error).__name__}: {error}). The report has no test "
                "figures; the ensemble is complete."
            )
            return None


def _progress(run: RunDirectory) -> tuple[int, list[str], str | None]:
    """Number of committed rounds, reasons of the rejected tries of the next one, and why boosting has stopped."""
    number = run.committed()
    return number, run.tries(number), run.stopped


def is_attached(module: pl.LightningModule) -> bool:
    """Whether a module is attached to a Trainer."""
    try:
        return module.trainer is not None
    except RuntimeError:
        return False


def table_figure(table: OfflineTeacher, loader: Any, task: Task) -> float | None:
    """Accuracy, or the score of another task, of a table of logits on the test part; None if the table lacks it."""
    if "test" not in table.tables:
        return None
    scores = prefix_metric(task, table.outputs)
    for _, y, index in all_batches(loader):
        logits = table.rows("test", index)
        scores.update(logits[None], given_labels(task, y, logits))
    return float(scores.compute()[0])
