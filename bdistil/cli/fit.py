"""`bdistil fit`: a LightningCLI with one Trainer for each round."""

from __future__ import annotations

import copy
import shutil
import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from bdistil.boosting.checks.trainer import check_strategy, check_trainer
from bdistil.boosting.parts import Parts
from bdistil.boosting.plan import complete
from bdistil.boosting.settings import BoostingSettings
from bdistil.callbacks import EpochKeeper, LossMixing, MetricCurves, RoundController, RoundProgressBar
from bdistil.callbacks.metric_curves import NOT_IN_ROUNDS
from bdistil.cli.commands import find_recipe, print_curve
from bdistil.cli.parser import Parser
from bdistil.cli.recipe_files import check_recipe
from bdistil.data.loaders import indexed_loaders, with_trainer
from bdistil.distillation.loss_mixing import check_boosting
from bdistil.distillation.mekd.run import Emulation, Mekd
from bdistil.ensemble.calibration import load_calibration, save_calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.calibrate import fit_anytime
from bdistil.evaluation.run_data import pairs_loader
from bdistil.reporting.report import write_report
from bdistil.reporting.tracking import RunLogger, Tracking, make_logger
from bdistil.storage.files import disk_errors
from bdistil.storage.run_directory import RunConfig, RunDirectory
from bdistil.storage.weights import load_weights, save_weights
from bdistil.teachers.training import TeacherSpec, TeacherTraining
from bdistil.teachers.wrappers import comes_trained
from bdistil.utils import distributed
from bdistil.utils.optimizers import Interval
from bdistil.utils.seeding import seed_of

# Replaces Lightning's help for these options.
HELP = {
    "config": "Recipe: a YAML file, or a name that `bdistil recipes` lists. A later --config overrides an earlier one.",
    "seed_everything": "Seed of the run.",
}


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


class Distiller(LightningModule):
    """Teacher, students and boosting of a recipe. It is not trained itself: each round trains its own module.

    Args:
        teacher: the network and its weights.
        student: makes one student; a class path with its arguments.
        boosting: settings of the run.
        mekd: settings for a teacher behind an API. The data are local unlabelled samples; the rounds are trained on
            samples that a generator, trained on them, produces.
        channels_last: memory format of images in convolutions, faster on most hardware.
        optimizer: optimizer of the students, instead of AdamW with `lr` and `weight_decay` of `boosting`; a class path
            of torch.optim with its arguments. Its rate is constant unless `lr_scheduler` is given.
        lr_scheduler: schedule of the students' learning rate; a class path of torch.optim.lr_scheduler with its
            arguments.
        lr_interval: whether `lr_scheduler` advances after every epoch or step.
        compile: backend of `torch.compile` for the teacher and the students, `inductor` on most machines.

    Raises:
        UserError: the backend does not exist.
    """

    def __init__(
        self,
        teacher: TeacherSpec,
        student: Callable[[], nn.Module],
        boosting: BoostingSettings = BoostingSettings(),  # noqa: B008 (frozen)
        mekd: Mekd | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        channels_last: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if compile is not None and compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise UserError(f"Expected `model.compile` to be one of {', '.join(known)}, got {compile!r}.")
        self.teacher, self.make, self.boosting, self.mekd = teacher, student, boosting, mekd
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.backend = compile
        teacher.network.to(memory_format=self.layout)
        # A teacher trained here keeps what it comes with frozen; the controller freezes all of it.
        self.trainable = [parameter for parameter in teacher.network.parameters() if parameter.requires_grad]

    def make_student(self, number: int, width: float = 1.0) -> nn.Module:
        """Builds the student of a round.

        Args:
            number: index of the round, from 0.
            width: factor on the width of the recipe's students; passed on unless it is 1.
        """
        make: Callable[..., nn.Module] = self.make
        own = make.keywords.get("width", 1.0) if isinstance(make, partial) else 1.0
        student = make() if width == 1 else make(width=own * width)
        return student.to(memory_format=self.layout)

    def speed_up(self, module: nn.Module) -> None:
        """Compiles a module in place at its first call, if the recipe sets `compile`; its weights keep their names."""
        if self.backend is not None:
            torch.compiler.reset()  # otherwise a few rounds would reach the recompilation limit per class
            module.compile(backend=self.backend)


class RoundTrainer(Trainer):
    """Lightning's Trainer; each round has a new one."""

    # LightningCLI uses the docstrings of class and method as help of the Trainer's keys and of the command.
    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Distil a teacher into an ordered ensemble of students; resumes a run that is in `run_dir`."""
        super().fit(*args, **kwargs)


class BoostCLI(LightningCLI):
    """`bdistil fit`: a new Trainer for each round, one controller and one set of loggers for all.

    Attributes:
        free_keys: keys of the configuration that may differ between two starts of one run.
        reads_test: whether a run evaluates the test part at its end.
    """

    free_keys: Sequence[str] = FREE_KEYS
    reads_test: bool = True

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`, without the arguments that a recipe does not set."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options other than model, data and trainer."""
        parser.add_argument(
            "--run_dir", type=str, default="runs/last", help="Run directory; a run that is there is resumed."
        )
        parser.add_class_arguments(Tracking, "tracking")
        for action in parser._actions:
            action.help = HELP.get(action.dest, action.help)
        parser.set_defaults({"trainer.logger": False, "trainer.enable_model_summary": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments and checks the seed, which LightningCLI uses immediately."""
        super().parse_arguments(parser, args)
        seed = self.config.fit.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"Expected `seed_everything` in 0 … {2**32 - 1}, got {seed}.")

    def before_instantiate_classes(self) -> None:
        """Checks a strategy given by name before Lightning looks for its devices."""
        strategy = self.config.fit.trainer.strategy
        if isinstance(strategy, str):
            check_strategy(strategy)

    def new_trainer(self, *callbacks: Callback, **changed: Any) -> Trainer:
        """A Trainer with the settings of the recipe and these callbacks."""
        settings, given = self.config_init.fit.trainer, list(callbacks)
        shown = settings.enable_progress_bar is not False and sys.stderr.isatty()
        if not any(isinstance(callback, ProgressBar) for callback in given):
            given += [RoundProgressBar()] if shown else []
            changed["enable_progress_bar"] = shown
        changed["enable_checkpointing"] = True  # bdistil's own Checkpoint callbacks need it; Lightning adds no other
        return self.instantiate_trainer(callbacks=given, strategy=self._strategy(), **changed)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with its own list of callbacks, as Lightning appends to the list passed to it."""
        try:
            return super().instantiate_trainer(**{"callbacks": self.callbacks(), **kwargs})
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise UserError(f"Lightning makes no Trainer of the options `trainer` of the recipe: {error}") from error

    def callbacks(self) -> list[Callback]:
        """The callbacks of the recipe."""
        given = self.config_init.fit.trainer.callbacks
        return list(given) if isinstance(given, list) else [given] if given else []

    def copied_callbacks(self, loggers: Sequence[Logger]) -> list[Callback]:
        """Copies of the recipe's callbacks for one fit, without those that refuse a Trainer without a logger."""
        copies = copy.deepcopy(self.callbacks())
        if loggers:
            return copies
        return [each for each in copies if not isinstance(each, LearningRateMonitor | DeviceStatsMonitor)]

    def _strategy(self) -> Strategy | str:
        """A new strategy as the recipe defines it: a strategy cannot be shared between Trainers."""
        given = self.config.fit.trainer.strategy
        if isinstance(given, str):
            return given
        parser = ArgumentParser()
        parser.add_argument("--strategy", type=Strategy)
        made: Strategy = parser.instantiate(parser.parse_object({"strategy": given})).strategy
        return made

    def check(self, model: Distiller) -> None:
        """Checks the Trainer and its callbacks before the teacher is trained.

        Raises:
            UserError: the rounds do not support them.
        """
        check_trainer(self.trainer, model.boosting)
        if self.config_init.fit.trainer.logger is True:
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
        run = RunDirectory(self.config.fit.run_dir)
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            datamodule = self.fit_run(model, datamodule, run)
            _fit_anytime(run, datamodule)
            if distributed.early_rank() == 0:
                print_curve(run)
            return
        rehearsal = RunDirectory(run.root.with_name(f"{run.root.name}.fast_dev_run"))
        try:
            self.fit_run(model, datamodule, rehearsal)
        finally:
            if distributed.early_rank() == 0:
                shutil.rmtree(rehearsal.root, ignore_errors=True)

    def fit_run(self, model: Distiller, datamodule: LightningDataModule, run: RunDirectory) -> LightningDataModule:
        """Trains the teacher if it is missing, then the rounds; returns the data of the rounds."""
        values = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["fit"]
        self.run_config = RunConfig(values, self.free_keys, RENEWED_KEYS, self._complete)
        seed = int(self.config.fit.seed_everything)
        network = model.teacher.network
        controller = RoundController(
            run.root, teacher=network, student=model.make_student, settings=model.boosting, seed=seed,
            config=self.run_config, reads_test=self.reads_test,
            optimizer=model.optimizer, lr_scheduler=model.lr_scheduler, lr_interval=model.lr_interval,
        )  # fmt: skip
        try:
            with controller.signals, controller.run.in_use():
                return self._fit_rounds(model, datamodule, controller)
        except BaseException as end:  # Ctrl-C is SystemExit in Lightning; ranks that lost a peer fail in any way
            if controller.signals.received or isinstance(end, SystemExit | KeyboardInterrupt):
                raise controller.signals.interruption() from end
            raise
        finally:
            controller.tracker.close()

    def _complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the configuration of an earlier version: options added since then get their defaults."""
        known = {**config, "model": {"lr_interval": "epoch", **complete(config.get("model") or {})}}
        parser = self.parser
        exits, parser.exit_on_error = parser.exit_on_error, False
        try:
            parsed = parser.parse_object({"subcommand": "fit", "fit": copy.deepcopy(known)})
            return dict(yaml.safe_load(parser.dump(parsed, skip_unset=False))["fit"])
        except (ArgumentError, TypeError):  # an option no longer exists, which the comparison will report
            return known
        finally:
            parser.exit_on_error = exits

    def _fit_rounds(
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
        self._teach(model, datamodule, controller, plan.parts)
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
        loggers = self._loggers(run, config)
        # Only these have started a run already, which is to be ended if no round begins.
        controller.tracker.loggers = [logger for logger in loggers if isinstance(logger, RunLogger)]
        return loggers

    def _loggers(self, run: RunDirectory, config: Mapping[str, Any]) -> list[Logger]:
        """The loggers of the recipe and the W&B logger of `tracking`."""
        given = self.config_init.fit.trainer.logger
        tracked = make_logger(self.config_init.fit.tracking, run.root, config)
        return [*(given if isinstance(given, list) else [given] if given else []), *([tracked] if tracked else [])]

    def _teach(
        self, model: Distiller, datamodule: LightningDataModule, controller: RoundController, parts: Parts
    ) -> None:
        """Loads the teacher's weights; trains the teacher first if the run has none."""
        spec, seed = model.teacher, controller.boosting.seed
        if comes_trained(spec.network) and not spec.checkpoint:
            return
        path = Path(spec.checkpoint) if spec.checkpoint else controller.run.teacher
        if not path.is_file():
            if model.boosting.labels is None:
                raise UserError(
                    "The data have no labels (model.boosting.labels: null), so the recipe cannot train its teacher. "
                    "Give a trained one by model.teacher.checkpoint."
                )
            if controller.run.scratch is None:
                parts.compare_stored()  # an interrupted training goes on with the same samples
                if distributed.early_rank() == 0:
                    parts.store()
            if not model.trainable:
                raise UserError(
                    "Expected a teacher with parameters to train, got one in which all are frozen. Unfreeze some, give "
                    "its weights by model.teacher.checkpoint, or set its attribute `trained` to True."
                )
            rank_zero_info(f"Training the teacher (max_epochs={spec.epochs}) …")
            spec.network.train()
            for parameter in model.trainable:
                parameter.requires_grad_(True)
            for part in filter(comes_trained, spec.network.modules()):  # such as one of an AveragedTeacher
                part.requires_grad_(False)
            keeper = EpochKeeper(controller.run.teacher_checkpoint, seed, "teacher")
            trainer = self.new_trainer(
                controller.signals, keeper,
                max_epochs=spec.epochs, max_steps=-1, max_time=None,
                logger=False, default_root_dir=str(keeper.path.parent),
            )  # fmt: skip
            labels, ignore_index = model.boosting.labels, model.boosting.ignore_index
            with indexed_loaders(datamodule, seed_of(seed, "teacher"), labels=labels, ignore_index=ignore_index):
                trainer.fit(TeacherTraining(spec, model.boosting.task), datamodule, ckpt_path=keeper.ckpt_path)
            if distributed.early_rank() == 0:
                with disk_errors("the teacher", controller.run.root):
                    save_weights(spec.network, path)
                    shutil.rmtree(keeper.path.parent)
            trainer.strategy.barrier("teacher kept")
        load_weights(spec.network.requires_grad_(False).eval(), path, "model.teacher.network")


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


def run_fit(args: Sequence[str], cli: type[BoostCLI] = BoostCLI) -> BoostCLI:
    """Runs `bdistil fit`, or the subclass `cli` of it, with these arguments."""
    return cli(
        Distiller,
        LightningDataModule,
        subclass_mode_data=True,
        trainer_class=RoundTrainer,
        parser_class=Parser,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_kwargs={"prog": "bdistil"},
        args=["fit", *_recipes_first(args)],
    )


def _recipes_first(args: Sequence[str]) -> list[str]:
    """Moves the recipes to the front, so that options override them wherever they stand; names become paths."""
    recipes, others, rest = [], [], iter(args)
    for arg in rest:
        if arg.startswith("--config="):
            recipes.append(f"--config={_checked(arg.removeprefix('--config='))}")
        elif arg in ("--config", "-c") and (name := next(rest, None)) is not None:
            recipes += [arg, _checked(name)]
        else:
            others.append(arg)
    return recipes + others


def _checked(name: str) -> str:
    path = find_recipe(name)
    check_recipe(path)
    return str(path)
