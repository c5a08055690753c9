"""A boosting run: checks before training, construction and opening of each round, and the test of the finished run.

The past of a run is read from its directory, never from a Trainer. The RoundController calls these steps in its hooks.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from bdistil.boosting.batch_checks import check_independence, check_teacher
from bdistil.boosting.checks import (
    TEST,
    check_outputs,
    check_rounds,
    check_task,
    check_widths,
    loaders_of,
    test_loader_of,
)
from bdistil.boosting.costs import Uncounted, is_api, student_cost, teacher_row
from bdistil.boosting.labels import all_batches, check_samples
from bdistil.boosting.ledger.samples import check_stored, store_samples
from bdistil.boosting.optimization import Optimization
from bdistil.boosting.part import Part
from bdistil.boosting.parts import Parts
from bdistil.boosting.round import BoostingRound, Game
from bdistil.boosting.settings import BoostingSettings
from bdistil.boosting.student_checks import check_factory, check_ladder, check_reads, check_student
from bdistil.data.loaders import LOADERS, indexed_loaders, is_indexed
from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies, restore_student
from bdistil.errors import RunError, UserError
from bdistil.metrics.cost import Cost
from bdistil.metrics.quality import Task, given_labels, prefix_metric, score_name
from bdistil.models.inputs import InputSpec
from bdistil.models.student import Rung, Student, build_student
from bdistil.storage.blueprint import IndescribableError, describe
from bdistil.storage.provenance import describe_start
from bdistil.storage.run_directory import Complete, RunDirectory
from bdistil.teachers.checks import some_inputs, warn_of_chance, warn_of_inputs
from bdistil.teachers.offline import OfflineTeacher, as_teacher, declared_outputs, table_of
from bdistil.teachers.wrappers import FrozenTeacher
from bdistil.utils import distributed
from bdistil.utils.seeding import reseed, seed_of

# Configuration keys that may differ between two starts of one run: they do not change what it computes.
FREE_KEYS = (
    "run_dir", "config", "tracking", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.logger", "trainer.enable_checkpointing", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.enable_autolog_hparams", "trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.profiler",
)  # fmt: skip
# Keys that may be raised to go on with a finished run: earlier students do not depend on them.
GROWING_KEYS = ("boosting.rounds", "model.boosting.rounds")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with all settings: those that came later had the value that is the default now."""
    sections, model = dict(config), config.get("model")
    if isinstance(model, Mapping):
        sections["model"] = {"lr_interval": "epoch", **complete(model)}
    if isinstance(given := config.get("boosting"), Mapping):
        settings = BoostingSettings().to_dict() | dict(given)
        sections["boosting"] = settings | {"ladder": [asdict(Rung()) | dict(rung) for rung in settings["ladder"]]}
    return sections


@dataclass(frozen=True)
class RunPlan:
    """Result of the checks before training.

    Attributes:
        parts: training, validation and view parts.
        example: x of one training sample, as a batch.
        inputs: structure and shape of x in all parts.
        outputs: L.
        student: an unlinked student that the checks built; not trained.
        optimization: the user's optimizer and schedule as plain values; empty for the default.
    """

    parts: Parts
    example: Any
    inputs: InputSpec
    outputs: int
    student: nn.Module
    optimization: Mapping[str, Any]


@dataclass(frozen=True)
class RoundPlan:
    """One try of one round, ready to be fitted.

    Attributes:
        run: result of the checks.
        module: the LightningModule of the round.
        rungs: the classes of students that the round may try, in order.
        attempt: index of this try in `rungs`.
        cost: of the student for one sample.
        fingerprint: of the teacher.
    """

    run: RunPlan
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
    """One run on the disk; its arguments are those of `bdistil.callbacks.RoundController`."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        teacher: Any,
        student: Callable[..., nn.Module],
        settings: BoostingSettings,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        uncounted: Uncounted = "record",
        optimization: Optimization | None = None,
    ) -> None:
        check_factory(student)
        self.run = RunDirectory(run_dir)
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(as_teacher(teacher))
        self.make, self.settings, self.seed, self.uncounted = student, settings, seed, uncounted
        self.optimization, self._config = optimization or Optimization(), dict(config) if config else None
        self.complete: Complete = complete  # a configuration of an earlier version
        self.free_keys: Sequence[str] = FREE_KEYS
        self.reads_test = True  # whether `finish` evaluates the test part
        self.students: list[nn.Module] = []  # of the committed rounds, restored from the disk
        self._checked: tuple[pl.LightningDataModule, InputSpec] | None = None
        self.rehearsed: RoundPlan | None = None  # the round of a fast_dev_run

    # ---- before training

    def check(self, datamodule: pl.LightningDataModule) -> RunPlan:
        """Validates run directory, data, teacher and students before training.

        Raises:
            UserError: names the argument, what was allowed, what came, and how to fix it.
            RunError: a committed round is torn.
        """
        run, settings = self.run, self.settings
        if distributed.early_rank() == 0:
            run.prepare()
            if run.config.exists() or run.committed():
                free = (*self.free_keys, *GROWING_KEYS, "optimizer", "lr_scheduler")
                run.compare(self.config({}), free, self.complete)
        self._check_rounds()
        train, val = loaders_of(datamodule, settings)
        parts = Parts.of(train, val, run.ledger, settings, self.seed)
        check_task(settings.task, self.teacher.module)
        check_widths(self.make, settings.ladder)
        pair, _ = train.collate_fn([train.dataset[0], train.dataset[parts.train.samples - 1]])
        with torch.random.fork_rng():
            student = build_student(self.make, 0, [], Rung(0))
            check_student(student, [], pair)
        check_rounds(student, settings.rounds)
        test = self._test_loader(datamodule)
        self._check_table(parts, val.dataset, test)
        recomputed = settings.state == "recompute"
        outputs = declared_outputs(self.teacher) or check_outputs(
            self.teacher, student, pair, settings.task, recomputed=recomputed
        )
        inputs = self._check_samples(datamodule, parts, test, outputs)
        if declared_outputs(self.teacher) is not None:  # an API is billed, so that labels are checked first
            check_outputs(self.teacher, student, pair, settings.task)
        if run.committed() < settings.rounds:
            check_ladder(self.make, settings, pair, outputs)
        for loader, name in ((parts.val.loader, LOADERS[1]), (test, TEST)):
            check_reads(student, loader, name)
        if settings.state == "cached":
            nets = {"teacher": self.teacher} if table_of(self.teacher) is None else {}
            check_independence((parts.train, parts.val), {**nets, "student": student})
        warn_of_inputs(self.teacher.module, datamodule, some_inputs(train))
        optimization = self.optimization.describe(student, settings)
        if distributed.early_rank() == 0:
            run.freeze(self.config(optimization), self.free_keys, GROWING_KEYS, self.complete)
            self._keep_test(test)
        return RunPlan(parts, train.collate_fn([train.dataset[0]])[0], inputs, outputs, student, optimization)

    def _test_loader(self, datamodule: pl.LightningDataModule) -> Any:
        """The loader of the test part where the checks need it: before training, and for a table of logits."""
        if self.run.committed() and table_of(self.teacher) is None:
            return None
        return test_loader_of(datamodule, self.settings)

    def _keep_test(self, test: Any) -> None:
        """Compares the test part with that of earlier starts, or keeps what later commands compare theirs with."""
        # A scratch disk may hold the files of another run until the first round.
        if test is not None and is_indexed(test.dataset) and self.run.scratch is None:
            check_stored(self.run.ledger / "test", TEST, test.dataset)
            store_samples(self.run.ledger / "test", test.dataset)

    def _check_table(self, parts: Parts, val: Any, test: Any) -> None:
        """Checks a table of logits that stands for the teacher, if there is one; `val` is the user's dataset."""
        if (table := table_of(self.teacher)) is None:
            return
        if self.settings.state == "recompute" or any(parts.plans):
            raise UserError(
                "The teacher is a table of logits, which belong to the samples as they are, but x is augmented at "
                "random, or the settings have state='recompute'. Leave that out, or give the teacher itself."
            )
        sized = {} if test is None or not hasattr(test.dataset, "__len__") else {"test": len(test.dataset)}
        given: Any = parts.val.loader.dataset
        chosen = {} if given is val else {"val": given.indices}  # by a sampler
        table.check({"train": parts.train.samples, "val": len(val), **sized}, chosen)

    def _check_samples(self, datamodule: pl.LightningDataModule, parts: Parts, test: Any, outputs: int) -> InputSpec:
        """Structure and shape of x, after a look at every label of all parts, in the first process, once in a run."""
        if hasattr(datamodule, "check_outputs"):  # a data module that knows its classes
            datamodule.check_outputs(outputs)
        if self.run.committed():
            return InputSpec.of(self.run.record(0))
        if self._checked is not None and self._checked[0] is datamodule:
            return self._checked[1]
        if distributed.early_rank() != 0:
            return InputSpec()  # the first process commits
        loaders = zip((*LOADERS, TEST), (parts.train.loader, parts.val.loader, test), strict=True)
        task = self.settings.task
        specs = [check_samples(loader, name, task, outputs) for name, loader in loaders if loader is not None]
        inputs = reduce(InputSpec.joined, specs)
        self._checked = (datamodule, inputs)
        return inputs

    def config(self, optimization: Mapping[str, Any]) -> Mapping[str, Any]:
        """Content of config.yaml: as given, or settings, seed and the user's optimizer."""
        if self._config is not None:
            return self._config
        return {"boosting": self.optimization.settings_used(self.settings), "seed": self.seed, **optimization}

    def _check_rounds(self) -> None:
        """Raises UserError for more committed rounds than `rounds`, RunError for one that is torn."""
        committed = self.run.committed()
        if committed > self.settings.rounds:
            raise UserError(
                f"Expected `rounds` of the boosting settings to be at least {committed}, as many as `run_dir` "
                f"{self.run.root} holds, got {self.settings.rounds}. Choose another `run_dir` for a shorter run."
            )
        for number in range(committed):
            self.run.weights(number)

    def rounds(self, datamodule: pl.LightningDataModule) -> Iterator[RoundPlan]:
        """The remaining rounds; while one is being fitted, the data module's loaders yield the index, too.

        Raises:
            UserError: an invalid argument, see `check`, or a ledger of another teacher or number of samples.
            RunError: a round came back without a verdict, or a file of the run is torn.
        """
        self.rehearsed, new = None, not self.run.config.exists()
        plan, fingerprint = self.check(datamodule), self.teacher.fingerprint
        self._announce(plan.student, new)
        for part in plan.parts:
            if part.ledger.exists and self.run.scratch is None:
                part.ledger.open(part.samples, fingerprint)
        if self.run.scratch is None:
            plan.parts.compare_stored()
            self._compare_teacher(plan.parts.train)
        last, started = plan.student, False
        while (this := self._plan_round(plan, fingerprint)) is not None:
            if this.module.student is last:
                raise UserError("Expected `student` to make a new module in each round, got the same one again.")
            last, number = this.module.student, this.module.number
            if not started and distributed.early_rank() == 0:
                self.run.keep_start(describe_start())
            started, before = True, self.run.verdicts(number)
            with indexed_loaders(
                datamodule, seed_of(self.seed, number, this.attempt), *plan.parts.plans,
                labels=self.settings.labels, ignore_index=self.settings.ignore_index, prepare=plan.parts.renew,
            ):  # fmt: skip
                yield this
            if self._ends_here(this.module, before, new):
                return
            gc.collect()  # a Trainer lingers in reference cycles

    def _compare_teacher(self, part: Part) -> None:
        """Compares answers of a teacher with those that it gave; an API is billed, and a table is its answers."""
        if part.ledger.exists and self.settings.state == "cached" and declared_outputs(self.teacher) is None:
            check_teacher(self.teacher, part)

    def _announce(self, student: nn.Module, new: bool) -> None:
        """Says what students of this kind cannot do, so that nobody expects it."""
        kind = type(student).__name__
        if not isinstance(student, Student):
            rank_zero_info(f"{kind} is no bdistil.Student, so it takes no links: all rounds are of class F0.")
        elif any(rung.reads_stages for rung in self.settings.ladder) and student.staged is None:
            rank_zero_info(f"{kind} has no stages: rungs of the kinds 'deep' and 'start' link to its features.")
        if new and (why := _indescribable(student)) is not None:
            rank_zero_info(
                f"The student cannot be built from the files of the run ({why}): ProgressiveEnsemble.load(run_dir, "
                "student=make_student) loads it, and it cannot be exported."
            )

    def _ends_here(self, module: BoostingRound, before: tuple[int, int], new: bool) -> bool:
        """Whether the loop over the rounds ends: after a fast_dev_run, and where no Trainer was given the module.

        Raises:
            RunError: the module was fitted, and there are no more verdicts than `before`.
        """
        if self.rehearsed is not None:
            self._end_rehearsal(new)
            return True
        if self.run.verdicts(module.number) != before:
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

    def _plan_round(self, plan: RunPlan, fingerprint: str) -> RoundPlan | None:
        """The next round, with its student built; None when the run is finished."""
        run, settings, number = self.run, self.settings, self.run.committed()
        if (reason := run.stopped) is not None:
            rank_zero_info(f"Boosting has stopped after {number} of {settings.rounds} rounds: {reason}.")
            return None
        if number >= settings.rounds:
            return None
        while len(self.students) < number:
            self.students.append(restore_student(run, len(self.students), self.students, self.make))
        tries = run.tries(number)
        rungs = settings.rungs(number, links=isinstance(plan.student, Student))
        if len(tries) >= len(rungs):  # killed after the last rejection
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
        """Brings the ledgers up to date on the devices of a round, and gives its module the game.

        The teacher is evaluated on all samples where its logits are not in the ledgers.

        Raises:
            RunError: NaN or infinity among the teacher's logits.
        """
        parts, device = plan.run.parts, plan.module.device
        parts.start_fit(plan.module.trainer.datamodule)  # type: ignore[attr-defined]
        if self.run.scratch is not None:
            parts.claim(self.run)
        known = all(part.ledger.exists for part in parts) and self.run.read("teacher") is not None
        if not distributed.agreed(known):
            self._query_teacher(plan, device)
        inputs = plan.run.inputs  # the first process has seen all samples
        parts.catch_up(
            self.students, device, plan.fingerprint, fixed=distributed.from_first(inputs.known and not inputs.varies)
        )
        plan.module.start(Game.of(parts.train.ledger, self.settings, device))

    def _query_teacher(self, plan: RoundPlan, device: torch.device) -> None:
        parts, outputs, teacher = plan.run.parts, plan.run.outputs, self.teacher
        samples = sum(part.samples for part in parts)
        rank_zero_info(f"Evaluating the teacher on {samples:,} samples …")
        row = teacher_row(teacher, plan.run.example, device, samples, self.uncounted)
        accuracy, loss = parts.query(teacher, device, outputs, plan.fingerprint)
        teacher.cpu()
        if self.settings.task == "classification":
            warn_of_chance(accuracy, outputs, parts.val.samples)
        spent = {"queries": teacher.module.queries} if is_api(teacher) else {}
        if distributed.rank() == 0:
            self.run.write("teacher", {**row, "val_accuracy": accuracy, "val_loss": loss, **spent})
        distributed.barrier()
        cost = f"{spent['queries']:,} queries" if spent else f"{row['macs']:,} MACs a sample"
        rank_zero_info(f"Teacher: {score_name(self.settings.task)} {accuracy:.4f} on validation, {cost}.")

    def stop(self, number: int, reason: str) -> None:
        """Records that no class of students was accepted."""
        if distributed.early_rank() == 0:
            self.run.stop(number, f"no class of students was accepted in round {number + 1}; last, {reason}")

    # ---- a fast_dev_run: nothing of it counts

    def rehearse(self, plan: RoundPlan) -> None:
        """Ends the only round of a fast_dev_run, of which nothing is committed."""
        self.rehearsed = plan

    def _end_rehearsal(self, new: bool) -> None:
        """Removes what a run directory got that was `new`, so that the real run may have another configuration."""
        distributed.barrier()
        if new and distributed.early_rank() == 0:
            self.run.discard()
        rank_zero_info("fast_dev_run: one round was fitted for a few batches; nothing was committed.")

    # ---- the end of the run

    @property
    def ensemble(self) -> ProgressiveEnsemble:
        """The ensemble of the committed rounds; after a fast_dev_run, that of its student alone."""
        if self.rehearsed is not None and not self.run.committed():
            head, plan = self.rehearsed.run.parts.train.ledger.head, self.rehearsed
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
        """Figures of the teacher (None where unknown) and of every prefix on the test part.

        None where there are neither labels nor a teacher to compare with, or the test part cannot be evaluated: all
        rounds are committed then, and stay.
        """
        settings, table = self.settings, table_of(self.teacher)
        asked = None if is_api(self.teacher) or table else self.teacher  # the queries of an API are for training
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


def _indescribable(student: nn.Module) -> str | None:
    """Why a student cannot be built again from the files of a round; None if it can."""
    try:
        describe(student)
    except IndescribableError as error:
        return str(error)
    return None


def is_attached(module: pl.LightningModule) -> bool:
    """Whether a Trainer was given the module."""
    try:
        return module.trainer is not None
    except RuntimeError:
        return False


def table_figure(table: OfflineTeacher, loader: Any, task: Task) -> float | None:
    """Accuracy, or what replaces it, of a table of logits on the test part; None where it has none of that part."""
    if "test" not in table.tables:
        return None
    scores = prefix_metric(task, table.outputs)
    for _, y, index in all_batches(loader):
        logits = table.rows("test", index)
        scores.update(logits[None], given_labels(task, y, logits))
    return float(scores.compute()[0])
