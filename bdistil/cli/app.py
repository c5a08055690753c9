"""The command line: `fit` is LightningCLI with rounds; the other commands work on a finished run."""

from __future__ import annotations

import difflib
import inspect
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from bdistil.cli.commands import COMMANDS, EXAMPLES
from bdistil.cli.distiller import Distiller
from bdistil.cli.fit import BoostCLI, RoundTrainer
from bdistil.cli.parser import Parser
from bdistil.cli.recipe_files import find_recipe
from bdistil.errors import RunError, UserError
from bdistil.utils.memory import keep_freed_memory
from bdistil.utils.signals import Interrupted


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
            parser_kwargs={"prog": "bdistil"},
            args=["fit", *_with_recipe_paths(args)],
        )
        return
    function = COMMANDS[command]
    says, example = (function.__doc__ or "").splitlines()[0], f"Example: {EXAMPLES[command]}"
    parser = Parser(prog=f"bdistil {command}", description=says, epilog=example)
    parser.add_function_arguments(function, as_positional=False, as_group=False, skip={"as_json"})
    if "as_json" in inspect.signature(function).parameters:
        parser.add_argument("--json", action="store_true", help="Print JSON.")
    given: Namespace = parser.instantiate(parser.parse_args(list(args)))
    function(**{"as_json" if key == "json" else key: value for key, value in given.items()})


# What Lightning says of the machine at every Trainer, which a run of T rounds would say T times.
CHATTER = ("GPU available", "TPU available", "HPU available", "💡", "`Trainer.fit` stopped", "Restor", "LOCAL_RANK")


def _quieten() -> None:
    """Leaves on the screen what is about this run."""
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
    keep_freed_memory()
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
    """The message that is meant for the user, also where the parser wrapped it into one of its own."""
    while error is not None and not isinstance(error, UserError | RunError):
        error = error.__cause__ or error.__context__
    return error
