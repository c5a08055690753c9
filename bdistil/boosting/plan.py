"""Validation before training: configuration, data, teacher and students of a run, in this order.

User code is run here once, so that it does not fail after hours of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from bdistil.boosting.checks.batches import check_independence
from bdistil.boosting.checks.data import (
    TEST,
    check_outputs,
    check_task,
    loaders_of,
    test_loader_of,
)
from bdistil.boosting.checks.students import (
    check_factory,
    check_ladder,
    check_reads,
    check_restored,
    check_rounds,
    check_student,
    check_widths,
)
from bdistil.boosting.labels import check_samples
from bdistil.boosting.ledger.samples import check_stored, store_samples
from bdistil.boosting.optimization import Optimization
from bdistil.boosting.parts import Parts
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import LOADERS, is_indexed
from bdistil.errors import UserError
from bdistil.models.inputs import InputSpec
from bdistil.models.student import Rung, build_student
from bdistil.storage.run_directory import RunConfig, RunDirectory
from bdistil.teachers.checks import check_apart, some_inputs, warn_of_inputs
from bdistil.teachers.offline import declared_outputs, table_of
from bdistil.teachers.wrappers import FrozenTeacher
from bdistil.utils import distributed


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Completes a configuration of an earlier version: settings of `boosting` added since then get their defaults."""
    if not isinstance(given := config.get("boosting"), Mapping):
        return dict(config)
    settings = BoostingSettings().to_dict() | dict(given)
    ladder = [asdict(Rung()) | dict(rung) for rung in settings["ladder"]]
    return {**config, "boosting": settings | {"ladder": ladder}}


def _own_config(values: Mapping[str, Any]) -> RunConfig:
    """Configuration of a run that is not started by a recipe: `rounds` may be raised to continue it."""
    return RunConfig(dict(values), renewed=("boosting.rounds",), complete=complete)


@dataclass(frozen=True)
class RunPlan:
    """Result of the checks before training.

    Attributes:
        parts: training, validation and view parts.
        example: x of one training sample, as a batch.
        inputs: structure and shape of x in all parts.
        outputs: L.
        student: untrained, unlinked student that the checks built.
        optimization: the user's optimizer and schedule as plain values; empty for the default.
    """

    parts: Parts
    example: Any
    inputs: InputSpec
    outputs: int
    student: nn.Module
    optimization: Mapping[str, Any]


class Planner:
    """Validates the inputs of a run; caches the result of its single pass over the data.

    Args:
        run: the run directory.
        teacher: the frozen teacher.
        make: builds the student of a round.
        settings: settings of the run.
        seed: seed of the run.
        optimization: optimizer and schedule.
        config: content of config.yaml; None for settings, seed and optimizer.
    """

    def __init__(
        self,
        run: RunDirectory,
        teacher: FrozenTeacher,
        make: Callable[..., nn.Module],
        settings: BoostingSettings,
        seed: int,
        optimization: Optimization,
        config: Mapping[str, Any] | RunConfig | None,
    ) -> None:
        check_factory(make)
        self.run, self.teacher, self.make, self.settings, self.seed = run, teacher, make, settings, seed
        self.optimization = optimization
        self._config = config if isinstance(config, RunConfig) else _own_config(config) if config else None
        self._checked: tuple[pl.LightningDataModule, InputSpec] | None = None

    def check(self, datamodule: pl.LightningDataModule) -> RunPlan:
        """Validates run directory, data, teacher and students before training.

        Raises:
            UserError: an argument is invalid; names it, the allowed and the actual value, and how to fix it.
            RunError: a committed round is torn.
        """
        run, settings = self.run, self.settings
        if distributed.early_rank() == 0:
            run.prepare()
            if run.config.exists() or run.committed():
                config = self.config({})
                run.compare(replace(config, free=(*config.free, "optimizer", "lr_scheduler")))  # not known yet
        self._check_rounds()
        train, val = loaders_of(datamodule, settings)
        parts = Parts.of(train, val, run.ledger, settings, self.seed)
        check_task(settings.task, self.teacher.module)
        check_widths(self.make, settings.ladder)
        pair, _ = train.collate_fn([train.dataset[0], train.dataset[parts.train.samples - 1]])
        with isolate_rng(include_cuda=False):
            student = build_student(self.make, 0, [], Rung(0))
            check_apart(student, self.teacher.frozen)
            check_student(student, [], pair)
            check_restored(student, self.make, pair)
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
            run.freeze(self.config(optimization))
            self._keep_test(test)
        return RunPlan(parts, train.collate_fn([train.dataset[0]])[0], inputs, outputs, student, optimization)

    def _test_loader(self, datamodule: pl.LightningDataModule) -> Any:
        """Loader of the test part if the checks need it: before the first commit, and for a table of logits."""
        if self.run.committed() and table_of(self.teacher) is None:
            return None
        return test_loader_of(datamodule, self.settings)

    def _keep_test(self, test: Any) -> None:
        """Compares the test part with that of earlier starts, and stores its digests for later commands."""
        # A scratch disk may hold the files of another run until the first round.
        if test is not None and is_indexed(test.dataset) and self.run.scratch is None:
            check_stored(self.run.ledger / "test", TEST, test.dataset)
            store_samples(self.run.ledger / "test", test.dataset)

    def _check_table(self, parts: Parts, val: Any, test: Any) -> None:
        """Checks the table of logits if one replaces the teacher; `val` is the user's validation dataset."""
        if (table := table_of(self.teacher)) is None:
            return
        if self.settings.state == "recompute" or any(parts.plans):
            raise UserError(
                "The teacher is a table of logits, which belong to the samples as they are, but x is augmented at "
                "random, or the settings have state='recompute'. Leave that out, or give the teacher itself."
            )
        sized = {} if test is None or not hasattr(test.dataset, "__len__") else {"test": len(test.dataset)}
        given: Any = parts.val.loader.dataset
        chosen = {} if given is val else {"val": given.indices}  # selected by a sampler
        table.check({"train": parts.train.samples, "val": len(val), **sized}, chosen)

    def _check_samples(self, datamodule: pl.LightningDataModule, parts: Parts, test: Any, outputs: int) -> InputSpec:
        """Structure and shape of x; checks every label of all parts, once in a run and in the first process only."""
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

    def config(self, optimization: Mapping[str, Any]) -> RunConfig:
        """The given configuration, or settings, seed and the user's optimizer."""
        if self._config is not None:
            return self._config
        values = {"boosting": self.optimization.settings_used(self.settings), "seed": self.seed, **optimization}
        return _own_config(values)

    def _check_rounds(self) -> None:
        """Raises UserError for more committed rounds than `rounds`, RunError for a torn one."""
        committed = self.run.committed()
        if committed > self.settings.rounds:
            raise UserError(
                f"Expected `rounds` of the boosting settings to be at least {committed}, as many as `run_dir` "
                f"{self.run.root} holds, got {self.settings.rounds}. Choose another `run_dir` for a shorter run."
            )
        for number in range(committed):
            self.run.weights(number)
