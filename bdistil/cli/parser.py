"""The parser of all commands, with single-message errors and a short help."""

from __future__ import annotations

import difflib
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

FIT_USAGE = "usage: bdistil fit --config RECIPE [--run_dir DIR] [--KEY VALUE ...]\n\n"


def _as_typed(keys: str) -> str:
    return ", ".join(f"--{key.removeprefix('fit.')}" for key in keys.split(", "))


KINDS = {
    "a <class 'int'>": "a whole number",
    "a <class 'float'>": "a number",
    "a <class 'bool'>": "true or false",
    "a <class 'NoneType'>": "null",
}
# The parser's report of a value that may be of several types, such as a number or null.
UNION = re.compile(
    r"Does not validate against any of the Union subtypes\n.*\n  Errors:\n((?:    - Expected a .*\n)+)"
    r"  Given value type: .*\n  Given value: (.*)"
)
# The same for an object that may be left out, such as the data: what is wrong with it, beside that it is not null.
OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes\n.*\n  Errors:\n    - ((?:.*\n)+?)"
    r"    - Expected a <class 'NoneType'>\n  Given value type: .*\n  Given value: .*"
)

# Parts of messages that help nobody: a class was meant, no file; the type of a function; options as Python objects.
NOISE = re.compile(
    r"\n  - Expected a path but (?!\S*(?:/|\.ya?ml)).* either not accessible or invalid(?=\n  - )"
    r"|Type typing\.Callable\[.*\] expects a function or a callable class: |\. Got value: Namespace\(.*\)"
)


def _in_words(message: str) -> str:
    """A message without Python's names of types, and with the nearest of the allowed values."""
    if union := UNION.search(message):
        allowed = " or ".join(re.findall(r"- Expected (a .*)\n", union[1]))
        message = message.replace(union[0], f"Expected {allowed}. Got value: {union[2]}")
    message = NOISE.sub("", OPTIONAL.sub(lambda found: found[1].rstrip(), message))
    for kind, words in KINDS.items():
        message = message.replace(kind, words)
    choice = re.search(r"a typing\.Literal\[(.+?)\](.*)\. Got value: (\S+)", message)
    if choice is None:
        return message
    near = difflib.get_close_matches(choice[3], re.findall("'(.+?)'", choice[1]), 1)
    hint = f". Did you mean '{near[0]}'?" if near else ""
    return message.replace(choice[0], f"one of {choice[1]}{choice[2]}. Got value: {choice[3]}{hint}")


class Parser(LightningArgumentParser):
    """A parser with single-message errors, which suggest the nearest spelling, and a short help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Otherwise abbreviated keys, such as `--model.boosting.round` for `.rounds`, would be accepted silently.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def print_usage(self, file: Any = None) -> None:
        """Prints nothing, as the 3,700 characters of usage of `fit` would precede every error."""

    def format_help(self, *args: Any) -> str:
        """Formats the help: bdistil's options before Lightning's, a short usage, and no long lists of classes."""
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
        super().error(_in_words(message), ex)

    def _options(self) -> list[str]:
        commands = [c.values() for a in self._actions if isinstance(c := getattr(a, "choices", None), dict)]
        parsers = [self, *(parser for group in commands for parser in group)]
        return [action.dest for parser in parsers for action in parser._actions if action.dest]
