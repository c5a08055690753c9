"""The command line: `fit` is a LightningCLI that trains rounds; the other commands work on finished runs."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from jsonargparse import Namespace

from bdistil.cli.commands import COMMANDS, EXAMPLES
from bdistil.cli.compare import COMPARE_SUMMARY, run_compare
from bdistil.cli.fit import FIT_SUMMARY, BoostCLI, run_fit
from bdistil.cli.guard import guarded
from bdistil.cli.parser import Parser
from bdistil.errors import UserError


def _overview() -> str:
    lines = [
        "usage: bdistil COMMAND [options]",
        "",
        "Progressive ensemble distillation: one teacher, an ordered ensemble of students.",
        "",
    ]
    summaries = {name: _summary(function) for name, function in COMMANDS.items()}
    for name, summary in {"fit": FIT_SUMMARY, **summaries, "compare": COMPARE_SUMMARY}.items():
        lines.append(f"  {name:<10} {summary}")
    hints = ["Help of a command:  bdistil COMMAND --help", "First run:          bdistil fit --config digits"]
    return "\n".join([*lines, "", *hints])


def _summary(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _run(command: str, args: Sequence[str]) -> None:
    if command == "fit":
        run_fit(args, BoostCLI)
        return
    if command == "compare":
        run_compare(args)
        return
    function = COMMANDS[command]
    example = f"Example: {EXAMPLES[command]}"
    parser = Parser(prog=f"bdistil {command}", description=_summary(function), epilog=example)
    parser.add_function_arguments(function, as_positional=False, as_group=False, skip={"as_json"})
    if "as_json" in inspect.signature(function).parameters:
        parser.add_argument("--json", action="store_true", help="Print JSON.")
    given: Namespace = parser.instantiate(parser.parse_args(list(args)))
    function(**{"as_json" if key == "json" else key: value for key, value in given.items()})


def main(args: Sequence[str] | None = None) -> int:
    """The program `bdistil`.

    Args:
        args: command and options; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failed run, 2 for bad arguments.
    """
    return guarded(lambda: _main(list(sys.argv[1:] if args is None else args)))


def _main(given: Sequence[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return
    if given[0] == "--version":
        print(", ".join(f"{name} {version(name)}" for name in ("bdistil", "torch", "lightning")))
        return
    known, command = ["fit", *COMMANDS, "compare"], given[0]
    if command not in known:
        near = difflib.get_close_matches(command, known, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"Expected a command, one of {', '.join(known)}, got {command!r}.{hint}")
    _run(command, given[1:])
