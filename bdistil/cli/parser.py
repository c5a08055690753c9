"""The parser of all commands: errors of one message, and a help that is short."""

from __future__ import annotations

import difflib
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

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
        if spaceless := re.search(r"Option '(\w+):(\S+)' is not accepted", message):
            message += f"\n  YAML has a space after the colon of a key: {{{spaceless[1]}: {spaceless[2]}}}."
        super().error(message, ex)

    def _options(self) -> list[str]:
        commands = [c.values() for a in self._actions if isinstance(c := getattr(a, "choices", None), dict)]
        parsers = [self, *(parser for group in commands for parser in group)]
        return [action.dest for parser in parsers for action in parser._actions if action.dest]
