"""The parser of the command line: one message for a mistake, with the nearest spelling; help that can be read."""

from __future__ import annotations

import difflib
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

FIT_USAGE = "usage: bdistil fit --config RECIPE [--run_dir DIR] [--KEY VALUE ...]\n\n"


def _as_typed(keys: str) -> str:
    return ", ".join(f"--{key.removeprefix('fit.')}" for key in keys.split(", "))


class Parser(LightningArgumentParser):
    """A parser that answers a mistake with one message and the nearest spelling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviated keys would be taken silently: `--model.boosting.round` for `.rounds`.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def print_usage(self, file: Any = None) -> None:
        """Nothing: it is some 3,700 characters before every error."""

    def format_help(self, *args: Any) -> str:
        """The help, what is ours first; without a usage of a page, and the subclasses that happen to be imported."""
        groups: Any = self._action_groups
        groups.sort(key=lambda group: (group.title or "").startswith("Lightning"))
        text = re.sub(r",\s+known\s+subclasses:[^)]{400,}\)", ", any subclass)", super().format_help(*args))
        return re.sub(r"^usage: [^\n]*fit .{1000,}?\n\n", FIT_USAGE, text, flags=re.DOTALL)

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """One message, with the nearest spelling where an option is unknown, and a start where all of them lack."""
        message = re.sub(r"(?<=are required: ).*", lambda found: _as_typed(found[0]), message)
        if "required: --model" in message:
            message += "\n  A recipe has them: bdistil fit --config digits. `bdistil recipes` lists what is shipped."
        unknown = re.search(r"(?:does not accept option|Option) '([\w.]+)'|arguments: --([\w.]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1] or unknown[2], self._options(), 1, 0.75)
            message += f"\n  Did you mean '{near[0]}'?" if near else ""
        super().error(message, ex)

    def _options(self) -> list[str]:
        commands = [c.values() for a in self._actions if isinstance(c := getattr(a, "choices", None), dict)]
        parsers = [self, *(parser for group in commands for parser in group)]
        return [action.dest for parser in parsers for action in parser._actions if action.dest]
