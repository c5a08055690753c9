"""A boosting run: what is checked before it, and what is built, scored and committed in each round.

It knows nothing of hooks; the RoundController calls it at the right moments. What it knows of the past it reads from
the run directory.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from bdistil.boosting.acceptance import accepts_margin, accepts_progress
from bdistil.boosting.checks import (
    check_augmentation,
    check_labels,
    check_outputs,
    check_rounds,
    check_task,
    check_widths,
    loaders_of,
)
from bdistil.boosting.curve_rows import Uncounted, is_api, student_cost, student_inputs, teacher_row
from bdistil.boosting.ledger.records import RoundEvidence
from bdistil.boosting.part import Part
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.scratch import claim
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import CANONICAL, ViewPlan, indexed_loaders, is_random, single_loader
from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies, restore_student
from bdistil.errors import RunError, UserError
from bdistil.metrics.cost import latency_ms
from bdistil.metrics.quality import score_name
from bdistil.models.student import Rung, Student, build_student
from bdistil.storage.provenance import describe_start
from bdistil.storage.run_directory import RunDirectory
from bdistil.teachers.checks import some_inputs, warn_of_chance, warn_of_inputs
from bdistil.teachers.wrappers import FrozenTeacher
from bdistil.utils import distributed
from bdistil.utils.seeding import reseed, seed_of

# Keys of a configuration that may differ between two starts of one run: where it runs and what it shows, not what it
# computes.
FREE_KEYS = (
    "run_dir", "config", "tracking", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.logger", "trainer.enable_", "trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.profiler",
)  # fmt: skip


class Boosting:
    """One run on the disk.

    Args:
        run_dir: the run directory.
        teacher: any module (x -> logits).
        student: ``make_student(round)``, or ``make_student(round, width)`` where the ladder asks for wider students.
        settings: of the run.
        seed: all randomness of the run is a function of it, the round, the epoch and the rank.
        config: what config.yaml keeps; the settings and the seed by default.
        uncounted: an operator whose cost is unknown is an ``error`` before training, or recorded with a warning.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        teacher: nn.Module,
        student: Callable[..., nn.Module],
        settings: BoostingSettings,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        uncounted: Uncounted = "record",
    ) -> None:
        self.run = RunDirectory(run_dir)
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        self.make, self.settings, self.seed, self.uncounted = student, settings, seed, uncounted
        self.config = dict(config) if config else {"boosting": settings.plain(), "seed": seed}
        self.recompute = settings.state == "recompute"
        self.students: list[nn.Module] = []
        self.attempt = 0
        self._last: nn.Module | None = None
        self._said = False

    # ---- before training

    def check(self, datamodule: pl.LightningDataModule) -> None:
        """Everything that can be known to be wrong before an hour is spent on training.

        Raises:
            UserError: names the argument, what was allowed, what came, and the way out.
            RunError: a committed round is torn.
        """
        if distributed.early_rank() == 0:
            self.run.prepare()
            if self.run.config.exists() or self.run.committed():
                self.run.freeze(self.config, FREE_KEYS)
        for number in range(self.run.committed()):
            self.run.weights(number)
        train, val = loaders_of(datamodule)
        self._make_parts(train, val)
        check_task(self.settings.task, self.teacher.module)
        check_widths(self.make, self.settings.ladder)
        self.example, labels = train.collate_fn([train.dataset[0], train.dataset[self.train.samples - 1]])
        self._check_models()
        check_labels(labels, self.settings.task, self.outputs)
        warn_of_inputs(self.teacher.module, datamodule, some_inputs(train))
        if distributed.early_rank() == 0:
            self.run.freeze(self.config, FREE_KEYS)

    def _make_parts(self, train: Any, val: Any) -> None:
        """Training and validation part, and further views of the former where it augments at random."""
        options = self.run.ledger, self.seed, self.settings.task, self.settings.storage
        self.train, self.val = Part("train", train, *options), Part("val", val, *options)
        augments = check_augmentation(train, self.settings, self.seed)
        views = self.settings.views if augments else None
        if augments:
            self.train = Part("train", train, *options, view=CANONICAL)
        if steady := is_random(val.dataset):
            self.val = Part("val", val, *options, view=CANONICAL)
        self.views = [Part("train", train, *options, view=view) for view in range(1, views or 1)]
        self.plans = ViewPlan(self.seed, views) if views else None, ViewPlan(self.seed) if steady else None

    def _check_models(self) -> None:
        with torch.random.fork_rng():
            student = build_student(self.make, 0, [], Rung(0))
        check_rounds(student, self.settings.rounds)
        self.outputs, self._last = check_outputs(self.teacher, student, self.example, self.settings.task), student
        self.takes_links = isinstance(student, Student)
        if not self.takes_links and not self._said:
            self._said = True
            kind = type(student).__name__
            rank_zero_info(f"{kind} is no bdistil.Student, so it takes no links: all rounds are of class F0.")

    def recognise(self) -> None:
        """A ledger found in the run directory has to be of this teacher and of as many samples.

        Raises:
            UserError: it is not.
            RunError: one of its files is torn.
        """
        self.fingerprint = self.teacher.fingerprint
        for part in (self.train, self.val, *self.views):
            if part.ledger.exists and self.run.scratch is None:
                part.ledger.open(part.samples, self.fingerprint)

    def rounds(self, datamodule: pl.LightningDataModule) -> Iterator[BoostingRound]:
        """The modules of the rounds to come; while one is out, the data module's loaders carry the index.

        Raises:
            UserError: something is wrong that can be known before training.
            RunError: a round came back without a verdict, or a committed round is torn.
        """
        self.check(datamodule)
        self.recognise()
        started = False
        while (module := self.build()) is not None:
            if not started and distributed.early_rank() == 0:
                self.run.keep_start(describe_start())
            started = True
            before = self.run.verdicts(module.number)
            with indexed_loaders(datamodule, seed_of(self.seed, module.number, self.attempt), *self.plans):
                yield module
            if self.run.verdicts(module.number) == before:
                raise RunError(
                    f"Round {module.number + 1} came back without a verdict. Was its module fitted to the end by a "
                    "Trainer with callbacks=[controller]?"
                )
            gc.collect()  # a Trainer lingers in reference cycles

    # ---- a round

    def build(self) -> BoostingRound | None:
        """The module of the next round, or None when the run is finished."""
        number = self.run.committed()
        if number >= self.settings.rounds or self.run.stopped is not None:
            return None
        while len(self.students) < number:
            self.students.append(restore_student(self.run, len(self.students), self.students, self.make))
        self.attempt = len(self.run.tries(number))
        rungs = self.settings.rungs(number, links=self.takes_links)
        if self.attempt >= len(rungs):  # killed after the last rejection
            self.stop(number, self.run.tries(number)[-1])
            return None
        self.rung = rungs[self.attempt]
        reseed(self.seed, number, self.attempt, "build")
        student = build_student(self.make, number, self.students, self.rung)
        if student is self._last:
            raise UserError("Expected `student` to make a new module in each round, got the same one again.")
        self._last = student
        self.cost = student_cost(student, self.students, self.example, self.uncounted)
        return BoostingRound(
            student,
            number=number,
            settings=self.settings,
            earlier=self.students,
            train=self.train,
            val=self.val,
            views=self.views,
            teacher=self.teacher if self.recompute else None,
            run_dir=self.run.root,
        )

    def open(self, module: BoostingRound) -> None:
        """Brings the ledgers up to date on the devices of this round; asks the teacher where it has not been asked.

        Raises:
            RunError: NaN or infinity among the teacher's logits.
        """
        parts = self.train, self.val, *self.views
        if self.run.scratch is not None:
            claim(self.run, parts)
        if not distributed.agreed(all(part.ledger.exists for part in parts) and self.run.teacher_figures() is not None):
            self._ask_teacher(module.device)
        reach = 0 if self.recompute else max(rung.links for rung in self.settings.ladder)
        for part in parts[:2]:
            part.catch_up(self.students, module.device, self.fingerprint, reach)
        for view in self.views:
            view.catch_up_view(self.students, module.device, self.fingerprint, reach)
        module.prepare()
        inputs = student_inputs(module.student, self.students, self.example, module.device)
        self.latency = latency_ms(module.student, inputs)

    def _ask_teacher(self, device: torch.device) -> None:
        total = self.train.samples * (1 + len(self.views)) + self.val.samples
        rank_zero_info(f"Asking the teacher about {total:,} samples …")
        row = teacher_row(self.teacher, self.example, device, total, self.uncounted)
        self.train.ask(self.teacher, device, self.outputs, self.fingerprint)
        units = self.train.ledger.units
        accuracy, loss = self.val.ask(self.teacher, device, self.outputs, self.fingerprint, units)
        for view in self.views:
            view.ask(self.teacher, device, self.outputs, self.fingerprint, units)
        self.teacher.cpu()
        if self.settings.task == "classification":
            warn_of_chance(accuracy, self.outputs, self.val.samples)
        if distributed.rank() == 0:
            spent = {"queries": self.teacher.module.queries} if is_api(self.teacher) else {}
            self.run.keep_teacher({**row, "val_accuracy": accuracy, "val_loss": loss, **spent})
        distributed.barrier()
        cost = f"{self.teacher.module.queries:,} queries" if is_api(self.teacher) else f"{row['macs']:,} MACs a sample"
        what = score_name(self.settings.task)
        rank_zero_info(f"Teacher: {what} {accuracy:.4f} on validation, {cost}.")

    # ---- the end of a round; `bdistil.boosting.commit` does the rest

    def decide(self, number: int, training: RoundEvidence, validation: RoundEvidence) -> tuple[bool, str]:
        """Accept the student? The decision and its reason; the same on all ranks, as the evidence is."""
        if number == 0:
            return True, "the first round is always accepted"
        if self.settings.accept == "margin":
            return accepts_margin(training.margin_share, self.settings.margin_share)
        return accepts_progress(validation.rms_before, validation.rms_after, self.settings.min_progress)

    def stop(self, number: int, reason: str) -> None:
        """Records that no class of students was accepted."""
        if distributed.early_rank() == 0:
            self.run.stop(number, f"no class of students was accepted in round {number + 1}; last, {reason}")

    # ---- the end of the run

    @property
    def ensemble(self) -> ProgressiveEnsemble:
        """The ensemble of the committed rounds."""
        return ProgressiveEnsemble.load(self.run.root, student=self.make)

    def finish(self, datamodule: pl.LightningDataModule, device: torch.device) -> None:
        """Reads the test part, once; the curve gets its test accuracies."""
        if distributed.early_rank() != 0 or not self.run.committed():
            return
        if self.run.test_figures() is None and is_overridden("test_dataloader", datamodule, pl.LightningDataModule):
            datamodule.setup("test")
            loader, task = single_loader(datamodule.test_dataloader()), self.settings.task
            teacher: list[float | None] = [None]  # an API is not asked: its queries are for training
            if not is_api(self.teacher):
                teacher = [*prefix_accuracies(ProgressiveEnsemble([self.teacher]).to(device), loader, device, task)]
            self.run.keep_test([*teacher, *prefix_accuracies(self.ensemble.to(device), loader, device, task)])
        self.run.write_curve(self.run.rows())
