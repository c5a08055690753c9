"""`bdistil fit`: a LightningCLI with one Trainer for each round."""

from __future__ import annotations

import copy
import shutil
import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info

from bdistil.boosting.checks.trainer import check_strategy, check_trainer
from bdistil.boosting.parts import Parts
from bdistil.boosting.plan import complete
from bdistil.callbacks import EpochKeeper, LossMixing, MetricCurves, RoundController, RoundProgressBar
from bdistil.callbacks.metric_curves import NOT_IN_ROUNDS
from bdistil.cli.distiller import Distiller
from bdistil.cli.parser import Parser
from bdistil.cli.recipe_files import check_recipe, find_recipe
from bdistil.data.loaders import indexed_loaders, with_trainer
from bdistil.distillation.loss_mixing import check_boosting
from bdistil.distillation.mekd.run import Emulation, Mekd
from bdistil.ensemble.calibration import load_calibration, save_calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.calibrate import fit_anytime
from bdistil.evaluation.run_data import pairs_loader
from bdistil.reporting.report import curve_summary, write_report
from bdistil.reporting.tracking import RunLogger, Tracking, make_logger
from bdistil.storage.files import disk_errors
from bdistil.storage.run_directory import RunConfig, RunDirectory
from bdistil.storage.weights import load_weights, save_weights
from bdistil.teachers.training import TeacherTraining
from bdistil.teachers.wrappers import comes_trained
from bdistil.utils import distributed
from bdistil.utils.seeding import seed_of

FIT_SUMMARY = "Distil a teacher into an ordered ensemble of students; resumes a run that is in `run_dir`."
USAGE = "bdistil fit --config RECIPE [--run_dir DIR] [--KEY VALUE ...]"
CONFIG_HELP = (
    "RECIPE is a YAML file or a name that `bdistil recipes` lists. A later --config overrides an earlier one, options "
    "override both."
)
# Options that may differ between two starts of one run: they do not change what it computes.
FREE_KEYS = (
    "run_dir", "config", "tracking", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.logger", "trainer.enable_checkpointing", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.enable_autolog_hparams", "trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.profiler",
)  # fmt: skip
# Options that may differ, too; the new values replace those in config.yaml. Earlier students do not depend on the
# number of rounds, and samples are compared wherever they are read from.
RENEWED_KEYS = (
    "model.boosting.rounds",
    "data.init_args.root", "data.init_args.file", "data.init_args.cache", "data.init_args.num_workers",
)  # fmt: skip


CLI = TypeVar("CLI", bound="BoostCLI")


class BoostCLI(LightningCLI):
    """`bdistil fit`: a new Trainer for each round, one controller and one set of loggers for all.

    Attributes:
        free_keys: keys of the configuration that may differ between two starts of one run.
        reads_test: whether a run evaluates the test part at its end.
    """

    free_keys: Sequence[str] = FREE_KEYS
    reads_test: bool = True

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds all options, those of Lightning's Trainer last in the help."""
        parser.add_argument(
            "--run_dir", type=str, default="runs/last", help="Run directory; a run that is there is resumed."
        )
        parser.add_lightning_class_args(Distiller, "model")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.add_class_arguments(Tracking, "tracking")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({"trainer.logger": False, "trainer.enable_model_summary": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments and checks the seed, which LightningCLI uses immediately."""
        super().parse_arguments(parser, args)
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"Expected `seed_everything` in 0 … {2**32 - 1}, got {seed}.")

    def before_instantiate_classes(self) -> None:
        """Checks a strategy given by name before Lightning looks for its devices."""
        strategy = self.config.trainer.strategy
        if isinstance(strategy, str):
            check_strategy(strategy)

    def new_trainer(self, *callbacks: Callback, **changed: Any) -> Trainer:
        """A Trainer with the settings of the recipe and these callbacks."""
        settings, given = self.config_init.trainer, list(callbacks)
        shown = settings.enable_progress_bar is not False and sys.stderr.isatty()
        if not any(isinstance(callback, ProgressBar) for callback in given):
            given += [RoundProgressBar()] if shown else []
            changed["enable_progress_bar"] = shown
        changed["enable_checkpointing"] = True  # bdistil's own Checkpoint callbacks need it; Lightning adds no other
        return self.instantiate_trainer(callbacks=given, **changed)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with its own list of callbacks, to which Lightning appends, and its own strategy."""
        own = {"callbacks": self.callbacks(), "strategy": copy.deepcopy(self.config_init.trainer.strategy)}
        try:
            return super().instantiate_trainer(**own | kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise UserError(f"Lightning refuses the options `--trainer.*`: {error}") from error

    def callbacks(self) -> list[Callback]:
        """The callbacks of the recipe."""
        return _as_list(self.config_init.trainer.callbacks)

    def copied_callbacks(self, loggers: Sequence[Logger]) -> list[Callback]:
        """Copies of the recipe's callbacks for one fit, without those that refuse a Trainer without a logger."""
        copies = copy.deepcopy(self.callbacks())
        if loggers:
            return copies
        return [each for each in copies if not isinstance(each, LearningRateMonitor | DeviceStatsMonitor)]

    def check(self, model: Distiller) -> None:
        """Checks the Trainer and its callbacks before the teacher is trained.

        Raises:
            UserError: the rounds do not support them.
        """
        check_trainer(self.trainer, model.boosting)
        if self.config_init.trainer.logger is True:
            raise UserError(
                "Expected `trainer.logger` to be false, a logger or a list of loggers, got true: the rounds share "
                "their loggers, so that Lightning cannot choose one. Give, for example, --trainer.logger CSVLogger "
                "--trainer.logger.save_dir FOLDER."
            )
        for callback in self.callbacks():
            if isinstance(callback, LossMixing):
                check_boosting(model.boosting, callback.settings)
            if isinstance(callback, MetricCurves):
                raise UserError(NOT_IN_ROUNDS)

    def fit(self, model: Distiller, datamodule: LightningDataModule) -> None:
        """Trains the teacher if it is missing, then the rounds, then writes the report."""
        self.check(model)
        run = RunDirectory(self.config.run_dir)
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            datamodule = self.fit_run(model, datamodule, run)
            _fit_anytime(run, datamodule)
            if distributed.early_rank() == 0:
                print(curve_summary(run))
            return
        rehearsal = RunDirectory(run.root.with_name(f"{run.root.name}.fast_dev_run"))
        try:
            self.fit_run(model, datamodule, rehearsal)
        finally:
            if distributed.early_rank() == 0:
                shutil.rmtree(rehearsal.root, ignore_errors=True)

    def fit_run(self, model: Distiller, datamodule: LightningDataModule, run: RunDirectory) -> LightningDataModule:
        """Trains the teacher if it is missing, then the rounds; returns the data of the rounds."""
        self.run_config = RunConfig(self._plain(self.config), self.free_keys, RENEWED_KEYS, self._complete)
        seed = int(self.config.seed_everything)
        network = model.teacher.network
        controller = RoundController(
            run.root, teacher=network, student=model.make_student, settings=model.boosting, seed=seed,
            config=self.run_config, reads_test=self.reads_test,
            optimizer=model.optimizer, lr_scheduler=model.lr_scheduler, lr_interval=model.lr_interval,
        )  # fmt: skip
        try:
            with controller.signals.ending_with_message(), controller.run.in_use():
                return self.fit_rounds(model, datamodule, controller)
        finally:
            controller.tracker.close()

    def _plain(self, config: Namespace) -> dict[str, Any]:
        return dict(yaml.safe_load(self.parser.dump(config, skip_unset=False)))

    def _complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the configuration of an earlier version: options added since then get their defaults."""
        known = {**config, "model": {"lr_interval": "epoch", **complete(config.get("model") or {})}}
        parser = self.parser
        exits, parser.exit_on_error = parser.exit_on_error, False
        try:
            return self._plain(parser.parse_object(copy.deepcopy(known)))
        except (ArgumentError, TypeError):  # an option no longer exists, which the comparison will report
            return known
        finally:
            parser.exit_on_error = exits

    def fit_rounds(
        self, model: Distiller, datamodule: LightningDataModule, controller: RoundController
    ) -> LightningDataModule:
        """Trains the teacher and all rounds; returns the data of the rounds."""
        run, config = controller.run, self.run_config
        if model.mekd is not None:
            run.prepare()
            run.freeze(config)
            loggers = self._start_loggers(controller, config.values)
            datamodule = self._emulate(model.mekd, model, datamodule, controller, loggers)
        plan = controller.boosting.check(datamodule)
        model.speed_up(model.teacher.network)
        self.prepare_teacher(model, datamodule, controller, plan.parts)
        if model.mekd is None:  # not before the teacher is trained
            loggers = self._start_loggers(controller, config.values)
        for module in controller.rounds(datamodule):
            model.speed_up(module.student)
            folder = str(run.work(module.number))
            beside = self.copied_callbacks(loggers)
            trainer = self.new_trainer(*beside, controller, logger=loggers, default_root_dir=folder)
            trainer.fit(module, datamodule, ckpt_path=controller.ckpt_path)
        return datamodule

    def _emulate(
        self,
        settings: Mekd,
        model: Distiller,
        local: LightningDataModule,
        controller: RoundController,
        loggers: list[Logger],
    ) -> LightningDataModule:
        """Runs both stages of MEKD; returns the generated data."""

        def trainer(callbacks: list[Callback], **options: Any) -> Trainer:
            return self.new_trainer(
                *callbacks, controller.signals, logger=loggers, max_steps=-1, max_time=None, **options
            )

        teacher, folder, seed = model.teacher.network, controller.run.emulation, controller.boosting.seed
        return Emulation(settings, teacher, local, folder, seed=seed, make_trainer=trainer).run(model.make_student)

    def _start_loggers(self, controller: RoundController, config: Mapping[str, Any]) -> list[Logger]:
        """The loggers of all fits; none if nothing will be trained, or only a fast_dev_run."""
        run = controller.run
        over = run.committed() >= controller.settings.rounds or run.stopped
        reported = run.report.is_file()  # otherwise the run was killed before it logged its curve
        if (over and reported) or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return []
        loggers = self.new_loggers(run, config)
        # Only these have started a run already, which is to be ended if no round begins.
        controller.tracker.loggers = [logger for logger in loggers if isinstance(logger, RunLogger)]
        return loggers

    def new_loggers(self, run: RunDirectory, config: Mapping[str, Any]) -> list[Logger]:
        """The loggers of the recipe and the W&B logger of `tracking`."""
        tracked = make_logger(self.config_init.tracking, run.root, config)
        return [*_as_list(self.config_init.trainer.logger), *_as_list(tracked)]

    def prepare_teacher(
        self, model: Distiller, datamodule: LightningDataModule, controller: RoundController, parts: Parts
    ) -> None:
        """Loads the teacher's weights; trains the teacher first if the run has none."""
        spec = model.teacher
        if comes_trained(spec.network) and not spec.checkpoint:
            return
        path = Path(spec.checkpoint) if spec.checkpoint else controller.run.teacher
        if not path.is_file():
            _check_trainable(model)
            if controller.run.scratch is None:
                parts.compare_stored()  # an interrupted training goes on with the same samples
                if distributed.early_rank() == 0:
                    parts.store()
            self._train_teacher(model, datamodule, controller)
        load_weights(spec.network.requires_grad_(False).eval(), path, "model.teacher.network")

    def _train_teacher(self, model: Distiller, datamodule: LightningDataModule, controller: RoundController) -> None:
        spec, seed, run = model.teacher, controller.boosting.seed, controller.run
        rank_zero_info(f"Training the teacher (max_epochs={spec.epochs}) …")
        spec.network.train()
        for parameter in model.trainable:
            parameter.requires_grad_(True)
        for part in filter(comes_trained, spec.network.modules()):  # such as one of an AveragedTeacher
            part.requires_grad_(False)
        keeper = EpochKeeper(run.teacher_checkpoint, seed, "teacher")
        trainer = self.new_trainer(
            controller.signals, keeper,
            max_epochs=spec.epochs, max_steps=-1, max_time=None,
            logger=False, default_root_dir=str(keeper.path.parent),
        )  # fmt: skip
        labels, ignore_index = model.boosting.labels, model.boosting.ignore_index
        with indexed_loaders(datamodule, seed_of(seed, "teacher"), labels=labels, ignore_index=ignore_index):
            trainer.fit(TeacherTraining(spec, model.boosting.task), datamodule, ckpt_path=keeper.ckpt_path)
        if distributed.early_rank() == 0:
            with disk_errors("the teacher", run.root):
                save_weights(spec.network, run.teacher)
                shutil.rmtree(keeper.path.parent)
        trainer.strategy.barrier("teacher kept")


def _check_trainable(model: Distiller) -> None:
    """Raises UserError if the recipe cannot train its teacher."""
    if model.boosting.labels is None:
        raise UserError(
            "The data have no labels (model.boosting.labels: null), so the recipe cannot train its teacher. "
            "Give a trained one by model.teacher.checkpoint."
        )
    if not model.trainable:
        raise UserError(
            "Expected a teacher with parameters to train, got one in which all are frozen. Unfreeze some, give "
            "its weights by model.teacher.checkpoint, or set its attribute `trained` to True."
        )


def _as_list(value: Any) -> list[Any]:
    """A value of a recipe that may be a list, a single object or absent."""
    return list(value) if isinstance(value, list) else [value] if value else []


def _fit_anytime(run: RunDirectory, datamodule: LightningDataModule) -> None:
    """Fits early exits and times the stages, once per run, if the data allow it."""
    if load_calibration(run) is not None or run.task != "classification":
        return
    try:
        with with_trainer(datamodule):
            datamodule.setup("fit")  # torn down by the last fit
            if distributed.early_rank() != 0:
                return
            loader = pairs_loader(run, datamodule.val_dataloader(), "val_dataloader")
            figures = fit_anytime(ProgressiveEnsemble.load(run.root), loader)
    except UserError as error:
        rank_zero_info(f"No thresholds were fitted: {error}")
        return
    save_calibration(run, figures)
    write_report(run)


def run_fit(args: Sequence[str], cli: type[CLI]) -> CLI:
    """Runs `bdistil fit` (`BoostCLI`), or a subclass of it, with these arguments."""
    made = cli(
        Distiller,
        LightningDataModule,
        subclass_mode_data=True,
        parser_class=Parser,
        parser_kwargs={"prog": "bdistil fit", "usage": USAGE, "description": FIT_SUMMARY, "epilog": CONFIG_HELP},
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=_recipes_first(args),
        run=False,
    )
    made.fit(made.model, made.datamodule)
    return made


def _recipes_first(args: Sequence[str]) -> list[str]:
    """Moves the recipes to the front, so that options override them wherever they stand; names become paths."""
    parser = ArgumentParser(prog="bdistil fit", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    given, others = parser.parse_known_args(args)
    recipes = [find_recipe(name) for name in given.config]
    for recipe in recipes:
        check_recipe(recipe)
    return [*(f"--config={recipe}" for recipe in recipes), *others]
