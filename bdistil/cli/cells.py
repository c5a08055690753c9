"""The process of one cell of `bdistil compare`: fits a recipe, or its teacher, and evaluates the resulting ensemble.

``python -m bdistil.cli.cells KIND [options of bdistil fit]``
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from itertools import accumulate
from typing import Any

from lightning.pytorch import LightningDataModule

from bdistil.callbacks import EpochKeeper, GradientNoise, RoundController
from bdistil.cli.distiller import Distiller
from bdistil.cli.fit import FREE_KEYS, BoostCLI, run_fit
from bdistil.cli.guard import guarded
from bdistil.comparison.figures import Row, part_figures, prefix_rows, table_figures
from bdistil.comparison.joint import JointLedger, joint_ensemble, plan_joint
from bdistil.comparison.methods import Kind
from bdistil.comparison.origin import check_split, check_test_labels, parts_of, read_origin
from bdistil.data.loaders import indexed_loaders
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.evaluation.run_data import Split, loader_of
from bdistil.metrics.cost import measure_cost, training_macs
from bdistil.storage.run_directory import RunDirectory
from bdistil.teachers.offline import table_of
from bdistil.utils.seeding import seed_of
from bdistil.utils.signals import end_with_parent

PARTS: tuple[Split, ...] = ("val", "test")
# The teacher's checkpoint is in the folder of the comparison, whose path may change between starts.
CELL_KEYS = (*FREE_KEYS, "model.teacher.checkpoint")


class ComparedCLI(BoostCLI):
    """A training in the folder `runs` of a comparison; checks that its data are split as for the teacher."""

    free_keys = CELL_KEYS
    reads_test = False  # the comparison evaluates the test part itself, once

    def fit_run(self, model: Distiller, datamodule: LightningDataModule, run: RunDirectory) -> LightningDataModule:
        """Checks the samples, then trains."""
        if (origin := read_origin(run.root.parent.parent)) is not None:
            parts = parts_of(datamodule, model.boosting)
            check_split(origin, parts)
            check_test_labels(origin, parts)
        return super().fit_run(model, datamodule, run)


class CellCLI(ComparedCLI):
    """Trains the rounds of a recipe, and writes ``figures.json`` with one row per prefix to the run directory."""

    def fit(self, model: Distiller, datamodule: LightningDataModule) -> None:
        """Trains the missing rounds and evaluates the prefixes."""
        run = RunDirectory(self.config.run_dir)
        datamodule = self.fit_run(model, datamodule, run)
        write_figures(
            run, ProgressiveEnsemble.load(run.root, student=model.make_student), prefix_costs(run), datamodule
        )


def prefix_costs(run: RunDirectory) -> list[Row]:
    """Costs of every prefix of a finished run; training costs include all rejected tries."""
    costs = [{key: row[key] for key in ("macs", "params", "train_macs", "seconds")} for row in run.rows()[1:]]
    tries = [run.record(number).get("spent_on_tries", {}) for number in range(len(costs))]
    last = (run.read("stopped") or {}).get("spent", {}) if run.stopped else {}
    for key in ("train_macs", "seconds"):  # not cumulative in the rows of a run
        own = [row[key] + spent.get(key, 0) for row, spent in zip(costs, tries, strict=True)]
        own[-1] += last.get(key, 0)
        for row, total in zip(costs, accumulate(own), strict=True):
            row[key] = total
    return costs


def write_figures(
    run: RunDirectory, ensemble: ProgressiveEnsemble, costs: list[Row], datamodule: LightningDataModule
) -> None:
    """Evaluates the prefixes on validation and test part, and writes ``figures.json``."""
    val, test = (part_figures(ensemble, loader_of(run, part, datamodule)) for part in PARTS)
    run.write("figures", prefix_rows(costs, val, test))


class TeacherCLI(ComparedCLI):
    """Trains the teacher of a recipe, if it has no weights yet, and evaluates it."""

    def fit_rounds(
        self, model: Distiller, datamodule: LightningDataModule, controller: RoundController
    ) -> LightningDataModule:
        """Trains and evaluates the teacher."""
        run = controller.run
        plan = controller.boosting.check(datamodule)
        self.prepare_teacher(model, datamodule, controller, plan.parts)
        teacher = controller.boosting.teacher
        if (table := table_of(teacher)) is not None:
            loaders = ((part, loader_of(run, part, datamodule)) for part in PARTS)
            val, test = (table_figures(table, part, loader, model.boosting.task) for part, loader in loaders)
            row = {"macs": 0, "params": 0, "train_macs": 0, "seconds": 0.0}
            run.write("figures", prefix_rows([row], val, test))
            return datamodule
        cost = measure_cost(teacher.cpu(), (plan.example,), uncounted="record")
        row = {"macs": cost.macs, "params": cost.params, "train_macs": 0, "seconds": 0.0}  # training is not compared
        write_figures(
            run, ProgressiveEnsemble([teacher], macs=[cost.macs], task=model.boosting.task), [row], datamodule
        )
        return datamodule

    def fit(self, model: Distiller, datamodule: LightningDataModule) -> None:
        """Trains and evaluates the teacher."""
        self.fit_run(model, datamodule, RunDirectory(self.config.run_dir))


class JointCLI(TeacherCLI):
    """Trains all students of a recipe at once."""

    def fit_rounds(
        self, model: Distiller, datamodule: LightningDataModule, controller: RoundController
    ) -> LightningDataModule:
        """Trains the students and evaluates the prefixes."""
        run, settings = controller.run, model.boosting
        seed = controller.boosting.seed
        checked = controller.boosting.check(datamodule)
        self.prepare_teacher(model, datamodule, controller, checked.parts)
        plan = plan_joint(controller.boosting, checked)
        model.speed_up(plan.module.student)
        loggers = controller.tracker.loggers = self.new_loggers(run, self.run_config.values)
        keeper, ledger = EpochKeeper(run.checkpoint(0), seed, "joint"), JointLedger(controller.boosting, plan)
        with indexed_loaders(
            datamodule, seed_of(seed, "joint"), *checked.parts.plans, labels=settings.labels,
            ignore_index=settings.ignore_index, prepare=checked.parts.replace_loader,
        ):  # fmt: skip
            # GradientNoise measures one student's last layer, and changes no training.
            beside = [each for each in self.copied_callbacks(loggers) if not isinstance(each, GradientNoise)]
            trainer = self.new_trainer(
                *beside, ledger, controller.signals, keeper,
                logger=loggers, default_root_dir=str(run.work(0)),
            )  # fmt: skip
            trainer.fit(plan.module, datamodule, ckpt_path=keeper.ckpt_path)
        seconds = keeper.state.elapsed()
        if plan.module.best is not None:  # the recipe keeps the best epoch
            plan.module.best.restore(plan.module.student)
        ensemble = joint_ensemble(plan)
        asked, seen = run.rows()[0]["macs"] if settings.state == "recompute" else 0, ledger.samples_seen
        whole = training_macs(student=plan.cost.macs, samples_seen=seen, teacher=asked, teacher_samples=seen)
        write_figures(run, ensemble, joint_costs(ensemble, whole, seconds), datamodule)
        for row in run.read("figures"):
            controller.tracker.log_round(row, row["prefix"], trainer.global_step)
        shutil.rmtree(run.work(0), ignore_errors=True)
        return datamodule


def joint_costs(ensemble: ProgressiveEnsemble, train_macs: int, seconds: float) -> list[Row]:
    """Costs of every prefix of students that were trained at once; all of them share the cost of the training."""
    params = accumulate(sum(p.numel() for p in student.parameters()) for student in ensemble.students)
    return [
        {"macs": macs, "params": count, "train_macs": train_macs, "seconds": seconds}
        for macs, count in zip(ensemble.macs, params, strict=True)
    ]


CELLS: dict[Kind, type[BoostCLI]] = {"teacher": TeacherCLI, "rounds": CellCLI, "joint": JointCLI}

if __name__ == "__main__":
    end_with_parent()
    kind: Any = sys.argv[1]
    sys.exit(guarded(partial(run_fit, sys.argv[2:], CELLS[kind])))
