"""The command line: `fit` is LightningCLI with rounds; the other commands work on a finished run."""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

from bdistil import distributed
from bdistil.anytime_fit import fit_anytime
from bdistil.boosting import FREE_KEYS
from bdistil.callbacks import EpochKeeper, RoundController, RoundProgressBar
from bdistil.commands import COMMANDS, say_end
from bdistil.data.attach import indexed_loaders, only
from bdistil.disk import disk_errors
from bdistil.distiller import Distiller, TeacherTraining
from bdistil.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError, UserError
from bdistil.mekd_run import Emulation, Mekd
from bdistil.recipe_files import find_recipe
from bdistil.report import write_report
from bdistil.run_directory import RunDirectory
from bdistil.seeding import seed_of
from bdistil.stopping import Interrupted, StopCallback
from bdistil.strategies import check_strategy
from bdistil.teachers import comes_trained
from bdistil.tracking import Tracking, make_logger
from bdistil.weight_files import load_weights, save_weights


class Parser(LightningArgumentParser):
    """A parser that answers a mistake with one message and the nearest spelling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviated keys would be taken silently: `--model.boosting.round` for `.rounds`.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def print_usage(self, file: Any = None) -> None:
        """Nothing: it is some 3,700 characters before every error."""

    def format_help(self, *args: Any) -> str:
        """The help without the lists of all subclasses that happen to be imported."""
        return re.sub(r",\s+known\s+subclasses:[^)]{400,}\)", ", any subclass)", super().format_help(*args))

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """One message, with the nearest spelling where an option is unknown."""
        unknown = re.search(r"(?:does not accept option|Option) '([\w.]+)'|arguments: --([\w.]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1] or unknown[2], self._options(), 1, 0.75)
            message += f"\n  Did you mean '{near[0]}'?" if near else ""
        super().error(message, ex)

    def _options(self) -> list[str]:
        commands = [c.values() for a in self._actions if isinstance(c := getattr(a, "choices", None), dict)]
        parsers = [self, *(parser for group in commands for parser in group)]
        return [action.dest for parser in parsers for action in parser._actions if action.dest]


class RoundTrainer(Trainer):
    """Lightning's Trainer; LightningCLI reads the help of a subcommand off its methods."""

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Distil a teacher into an ordered ensemble of students; a run found in `run_dir` goes on."""
        super().fit(*args, **kwargs)


class BoostCLI(LightningCLI):
    """`bdistil fit`: a fresh Trainer a round, one controller and one logger for all."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`, without what a recipe does not set."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys of a recipe beside model, data and trainer."""
        parser.add_argument(
            "--run_dir", type=str, default="runs/last", help="Folder of the run; one found there goes on."
        )
        parser.add_class_arguments(Tracking, "tracking")
        parser.set_defaults({"trainer.logger": False, "trainer.enable_model_summary": False})

    def before_instantiate_classes(self) -> None:
        """Refuses a strategy by its name, before Lightning asks for the devices that it needs."""
        strategy = self._get(self.config, "trainer").strategy
        if isinstance(strategy, str):
            check_strategy(strategy)

    def round_trainer(self, **changed: Any) -> Trainer:
        """A Trainer of the recipe; callbacks of the recipe are copied, so that each round has its own."""
        settings = self._get(self.config_init, "trainer")
        callbacks = [*copy.deepcopy(settings.callbacks or []), *changed.pop("callbacks", [])]
        if settings.enable_progress_bar is not False and sys.stderr.isatty():
            callbacks.append(RoundProgressBar())
        else:
            changed["enable_progress_bar"] = False
        return self.instantiate_trainer(callbacks=callbacks, strategy=self._strategy(), **changed)

    def _strategy(self) -> Strategy | str:
        """The strategy of the recipe, made anew: one belongs to the Trainer that it was first given to."""
        given = self._get(self.config, "trainer").strategy
        if isinstance(given, str):
            return given
        module, _, name = given.class_path.rpartition(".")
        made: Strategy = getattr(import_module(module), name)(**given.get("init_args", {}))
        return made

    def fit(self, model: Distiller, datamodule: LightningDataModule) -> None:
        """Trains the teacher if it is missing, then the rounds, then writes the report."""
        run = RunDirectory(self._get(self.config, "run_dir"))
        config = yaml.safe_load(self._parser("fit").dump(self.config.fit, skip_unset=False))
        seed = int(self._get(self.config, "seed_everything"))
        network = model.teacher.network
        controller = RoundController(
            run.root, teacher=network, student=model.make_student, settings=model.boosting, seed=seed, config=config
        )
        try:
            with controller.signals:
                datamodule = self._fit_rounds(model, datamodule, controller, config, seed)
        except BaseException as end:  # Lightning's answer to Ctrl-C is SystemExit; one that lost its peer fails anyhow
            if controller.signals.asked or isinstance(end, SystemExit | KeyboardInterrupt):
                raise controller.signals.interruption() from end
            raise
        finally:
            controller.tracker.close()
        _fit_anytime(run, datamodule)
        if distributed.early_rank() == 0:
            say_end(run)

    def _fit_rounds(
        self,
        model: Distiller,
        datamodule: LightningDataModule,
        controller: RoundController,
        config: Mapping[str, Any],
        seed: int,
    ) -> LightningDataModule:
        """All that trains; gives the data of the rounds."""
        run = controller.run
        over = run.committed() >= model.boosting.rounds or run.stopped
        loggers: list[Logger] | None = [] if over else None
        if model.mekd is not None:
            run.prepare()
            run.freeze(config, FREE_KEYS)
            loggers = self._loggers(run, config) if loggers is None else loggers
            datamodule = self._emulate(model.mekd, model, datamodule, controller, seed, loggers)
        controller.boosting.check(datamodule)
        model.speed_up(model.teacher.network)
        self._teach(model, datamodule, controller, seed)
        loggers = self._loggers(run, config) if loggers is None else loggers
        for module in controller.rounds(datamodule):
            model.speed_up(module.student)
            folder = str(run.work(module.number))
            trainer = self.round_trainer(callbacks=[controller], logger=loggers, default_root_dir=folder)
            trainer.fit(module, datamodule, ckpt_path=controller.ckpt_path)
        return datamodule

    def _emulate(
        self,
        settings: Mekd,
        model: Distiller,
        local: LightningDataModule,
        controller: RoundController,
        seed: int,
        loggers: list[Logger],
    ) -> LightningDataModule:
        """Both stages of MEKD; the data of the rounds are what it generated."""

        def trainer(callbacks: list[Callback], **options: Any) -> Trainer:
            stop = StopCallback(controller.signals)
            return self.round_trainer(callbacks=[*callbacks, stop], logger=loggers, **options)

        teacher, folder = model.teacher.network, controller.run.emulation
        return Emulation(settings, teacher, local, folder, seed=seed, make_trainer=trainer).run(model.make_student)

    def _loggers(self, run: RunDirectory, config: Mapping[str, Any]) -> list[Logger]:
        """The loggers of the recipe, and the one of `tracking`."""
        given = self._get(self.config_init, "trainer").logger
        tracked = make_logger(self._get(self.config_init, "tracking"), run.root, config)
        return [*(given if isinstance(given, list) else [given] if given else []), *([tracked] if tracked else [])]

    def _teach(self, model: Distiller, datamodule: LightningDataModule, controller: RoundController, seed: int) -> None:
        """Loads the teacher's weights; trains and keeps them where the run has none."""
        spec = model.teacher
        if comes_trained(spec.network) and not spec.checkpoint:
            return
        path = Path(spec.checkpoint) if spec.checkpoint else controller.run.teacher
        if not path.is_file():
            rank_zero_info(f"Training the teacher for {spec.epochs} epochs …")
            spec.network.requires_grad_(True).train()
            keeper = EpochKeeper(controller.run.teacher_checkpoint, seed, "teacher")
            trainer = self.round_trainer(
                max_epochs=spec.epochs, logger=False, callbacks=[StopCallback(controller.signals), keeper],
                default_root_dir=str(keeper.path.parent),
            )  # fmt: skip
            with indexed_loaders(datamodule, seed_of(seed, "teacher")):
                trainer.fit(TeacherTraining(spec, model.boosting.task), datamodule, ckpt_path=keeper.ckpt_path)
            if distributed.early_rank() == 0:
                with disk_errors("the teacher", controller.run.root):
                    save_weights(spec.network, path)
                    shutil.rmtree(keeper.path.parent)
            trainer.strategy.barrier("teacher kept")
        load_weights(spec.network.requires_grad_(False).eval(), path, "model.teacher.network")


def _fit_anytime(run: RunDirectory, datamodule: LightningDataModule) -> None:
    """Fits and measures what stopping early needs, once a run; a run whose data allow none goes without."""
    if distributed.early_rank() != 0 or run.anytime_figures() is not None or run.task == "regression":
        return
    try:
        figures = fit_anytime(ProgressiveEnsemble.load(run.root), only(datamodule.val_dataloader()))
    except UserError as error:
        rank_zero_info(f"No thresholds were fitted: {error}")
        return
    run.keep_anytime(figures)
    write_report(run)


def _overview() -> str:
    lines = [
        "usage: bdistil COMMAND [options]",
        "",
        "Progressive ensemble distillation: one teacher, an ordered ensemble of students.",
        "",
    ]
    lines.append(f"  {'fit':<10} {RoundTrainer.fit.__doc__}")
    lines += [f"  {name:<10} {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join([*lines, "", "bdistil COMMAND --help says more. First: bdistil fit --config digits"])


def _with_recipe_paths(args: Sequence[str]) -> list[str]:
    """Replaces the name of a shipped recipe after --config by its path."""
    out = list(args)
    for place, arg in enumerate(out):
        if arg.startswith("--config="):
            out[place] = f"--config={find_recipe(arg.removeprefix('--config='))}"
        elif arg in ("--config", "-c") and place + 1 < len(out):
            out[place + 1] = str(find_recipe(out[place + 1]))
    return out


def _run(command: str, args: Sequence[str]) -> None:
    if command == "fit":
        BoostCLI(
            Distiller,
            LightningDataModule,
            subclass_mode_data=True,
            trainer_class=RoundTrainer,
            parser_class=Parser,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=["fit", *_with_recipe_paths(args)],
        )
        return
    function = COMMANDS[command]
    parser = Parser(prog=f"bdistil {command}", description=(function.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(function, as_positional=False, skip={"as_json"})
    if "as_json" in inspect.signature(function).parameters:
        parser.add_argument("--json", action="store_true", help="Print JSON.")
    given: Namespace = parser.instantiate(parser.parse_args(list(args)))
    function(**{"as_json" if key == "json" else key: value for key, value in given.items()})


# What Lightning says of the machine at every Trainer, which a run of T rounds would say T times.
CHATTER = ("GPU available", "TPU available", "HPU available", "💡", "`Trainer.fit` stopped", "Restor", "LOCAL_RANK")


def _quieten() -> None:
    """Leaves on the screen what is about this run. W&B says its own where `tracking` has not said it."""
    os.environ.setdefault("WANDB_SILENT", "true")
    said = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    said.addFilter(lambda record: not record.getMessage().startswith(CHATTER))
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", "The .* does not have many workers")
    warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*, sync_dist=True")  # of sums of all ranks
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # said in every round; docs/cluster.md has it


def main(args: Sequence[str] | None = None) -> int:
    """The program `bdistil`.

    Args:
        args: command and options; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failed run, 2 for bad arguments.
    """
    given = list(sys.argv[1:] if args is None else args)
    _quieten()
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command = given[0]
    try:
        if command not in ("fit", *COMMANDS):
            near = difflib.get_close_matches(command, ["fit", *COMMANDS], 1, 0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"Expected a command, one of {', '.join(['fit', *COMMANDS])}, got {command!r}.{hint}")
        _run(command, given[1:])
    except Interrupted as end:
        if isinstance(end.code, str):
            print(f"bdistil: {end.code}", file=sys.stderr)
        return 1
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        print(f"bdistil: error: {known}", file=sys.stderr)
        return 2 if isinstance(known, UserError) else 1
    return 0


def _known(error: BaseException | None) -> UserError | RunError | None:
    """The message that is meant for the user, also where the parser wrapped it into one of its own."""
    while error is not None and not isinstance(error, UserError | RunError):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    sys.exit(main())
