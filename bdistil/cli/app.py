"""The command line: `fit` is a LightningCLI that trains rounds; the other commands work on finished runs."""

from __future__ import annotations

import difflib
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, TextIO

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from bdistil.cli.commands import COMMANDS, EXAMPLES, find_recipe
from bdistil.cli.fit import BoostCLI, Distiller, RoundTrainer
from bdistil.cli.recipe_files import check_recipe, refuse_duplicate_keys
from bdistil.errors import RunError, UserError
from bdistil.utils.memory import keep_freed_memory
from bdistil.utils.signals import Interrupted

FIT_USAGE = "usage: bdistil fit --config RECIPE [--run_dir DIR] [--KEY VALUE ...]\n\n"


def _as_typed(keys: str) -> str:
    return ", ".join(f"--{key.removeprefix('fit.')}" for key in keys.split(", "))


class Parser(LightningArgumentParser):
    """A parser whose errors are one message with the nearest spelling, and whose help is short."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated key would be accepted silently: `--model.boosting.round` for `.rounds`.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def print_usage(self, file: Any = None) -> None:
        """Prints nothing: the usage of `fit` has 3,700 characters, and would precede every error."""

    def format_help(self, *args: Any) -> str:
        """The help: options of bdistil before those of Lightning, a short usage, and no long lists of classes."""
        groups: Any = self._action_groups
        groups.sort(key=lambda group: (group.title or "").startswith("Lightning"))
        text = re.sub(r",\s+known\s+subclasses:[^)]{400,}\)", ", any subclass)", super().format_help(*args))
        return re.sub(r"^usage: [^\n]*fit .{1000,}?\n\n", FIT_USAGE, text, flags=re.DOTALL)

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Exits with one message; suggests the nearest option, or a recipe if no configuration is given."""
        message = re.sub(r"(?<=are required: ).*", lambda found: _as_typed(found[0]), message)
        if "required: --model" in message:
            message += "\n  A recipe sets them: bdistil fit --config digits. `bdistil recipes` lists the shipped ones."
        unknown = re.search(r"(?:does not accept option|Option) '([\w.]+)'|arguments: --([\w.]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1] or unknown[2], self._options(), 1, 0.75)
            message += f"\n  Did you mean '{near[0]}'?" if near else ""
        super().error(message, ex)

    def _options(self) -> list[str]:
        commands = [c.values() for a in self._actions if isinstance(c := getattr(a, "choices", None), dict)]
        parsers = [self, *(parser for group in commands for parser in group)]
        return [action.dest for parser in parsers for action in parser._actions if action.dest]


def _overview() -> str:
    lines = [
        "usage: bdistil COMMAND [options]",
        "",
        "Progressive ensemble distillation: one teacher, an ordered ensemble of students.",
        "",
    ]
    lines.append(f"  {'fit':<10} {RoundTrainer.fit.__doc__}")
    lines += [f"  {name:<10} {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    hints = ["Help of a command:  bdistil COMMAND --help", "First run:          bdistil fit --config digits"]
    return "\n".join([*lines, "", *hints])


def _with_recipe_paths(args: Sequence[str]) -> list[str]:
    """The arguments, with the name of a shipped recipe after --config replaced by its path."""
    out = list(args)
    for place, arg in enumerate(out):
        if arg.startswith("--config="):
            out[place] = f"--config={_checked(arg.removeprefix('--config='))}"
        elif arg in ("--config", "-c") and place + 1 < len(out):
            out[place + 1] = _checked(out[place + 1])
    return out


def _checked(name: str) -> str:
    path = find_recipe(name)
    check_recipe(path)
    return str(path)


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
            parser_kwargs={"prog": "bdistil"},
            args=["fit", *_with_recipe_paths(args)],
        )
        return
    function = COMMANDS[command]
    summary, example = (function.__doc__ or "").splitlines()[0], f"Example: {EXAMPLES[command]}"
    parser = Parser(prog=f"bdistil {command}", description=summary, epilog=example)
    parser.add_function_arguments(function, as_positional=False, as_group=False, skip={"as_json"})
    if "as_json" in inspect.signature(function).parameters:
        parser.add_argument("--json", action="store_true", help="Print JSON.")
    given: Namespace = parser.instantiate(parser.parse_args(list(args)))
    function(**{"as_json" if key == "json" else key: value for key, value in given.items()})


# Beginnings of the messages that every Lightning Trainer prints, and a run of T rounds would print T times.
REPEATED = ("GPU available", "TPU available", "HPU available", "💡", "`Trainer.fit` stopped", "Restor", "LOCAL_RANK")


def _filter_messages() -> None:
    """Hides messages and warnings that every round would repeat."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(REPEATED))
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", "The .* does not have many workers")
    warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*, sync_dist=True")  # of sums of all ranks
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # in every round; see docs/cluster.md


def main(args: Sequence[str] | None = None) -> int:
    """The program `bdistil`.

    Args:
        args: command and options; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failed run, 2 for bad arguments.
    """
    try:
        try:
            return _main(args)
        finally:
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        return 0  # the reader of a pipe, such as `head`, has all that it wanted


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads a stream any more; what is left in it, or written later, goes nowhere."""
    try:
        print(file=stream, flush=True)  # an empty buffer would say nothing
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _main(args: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if args is None else args)
    _filter_messages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # R² and µ on a terminal that has only ASCII
    keep_freed_memory()
    refuse_duplicate_keys()
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        print(", ".join(f"{name} {version(name)}" for name in ("bdistil", "torch", "lightning")))
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
    """The error for the user in a chain of exceptions; the parser wraps it in one of its own."""
    while error is not None and not isinstance(error, UserError | RunError):
        if isinstance(error, MisconfigurationException):  # Lightning's word for options that do not go together
            return UserError(str(error))
        error = error.__cause__ or error.__context__
    return error
