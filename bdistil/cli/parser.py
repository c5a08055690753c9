"""The parser of all commands, which explains errors in words and suggests the nearest option."""

from __future__ import annotations

import difflib
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

# Lines and parts of jsonargparse's messages that help nobody: a class was meant, no file; types and objects of Python.
NOISE = re.compile(
    r"\n *- Expected a path but (?!\S*(?:/|\.ya?ml)).* either not accessible or invalid(?=\n)"
    r"|\n *(?:- )?(?:Does not validate against|Subtypes:|Errors:|Given value type:|Given value: NestedArg).*"
    r"|Type (?:typing|collections\.abc)\.Callable\[.*\] expects a function or a callable class: "
    r"|\. Got value: Namespace\(.*\)"
)
WORDS = (
    (r"Expected a <class 'NoneType'>", "or null"),
    (r"a <class 'int'>", "a whole number"),
    (r"a <class 'float'>", "a number"),
    (r"a <class 'bool'>", "true or false"),
    (r"a <class 'collections\.abc\.Sequence'>", "a list without spaces, or in quotes"),
    (r"a typing\.Literal\[(.+?)\]", r"one of \1"),
)


class Parser(LightningArgumentParser):
    """A parser without abbreviated options, whose errors are in words and suggest the nearest spelling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Otherwise abbreviated keys, such as `--model.boosting.round` for `.rounds`, would be accepted.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self, *args: Any) -> str:
        """Formats the help without the long lists of the classes that an option may name."""
        return re.sub(r",\s+known\s+subclasses:[^)]{400,}\)", ", any subclass)", super().format_help(*args))

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Exits with a message; suggests the nearest option, or a recipe if no configuration is given."""
        message = NOISE.sub("", message)
        for pattern, words in WORDS:
            message = re.sub(pattern, words, message)
        if (choice := re.search(r"one of (.*)\. Got value: (\S+)", message)) and (
            near := difflib.get_close_matches(choice[2], re.findall("'(.+?)'", choice[1]), 1)
        ):
            message += f". Did you mean '{near[0]}'?"
        if "are required: " in message:
            message = re.sub(r"(?<=[:,] )", "--", message)
        if "required: --model" in message:
            message += "\n  A recipe sets them: bdistil fit --config digits. `bdistil recipes` lists the shipped ones."
        if unknown := re.search(r"(?:does not accept option|Option) '([\w.]+)'|arguments: --([\w.-]+)", message):
            name, known = (unknown[1] or unknown[2]).replace("-", "_"), list(self.get_defaults().keys())
            inside = [key for key in known if key.endswith(f".{name}")]
            near = inside or difflib.get_close_matches(name, known, 1, 0.75)
            message += f"\n  Did you mean {' or '.join(map(repr, near))}?" if near else ""
        elif "unrecognized arguments: " in message:
            message += "\n  Every value follows an option, such as --config or --run_dir."
        if spaceless := re.search(r"Option '(\w+):(\S+)' is not accepted", message):
            message += f"\n  YAML has a space after the colon of a key: {{{spaceless[1]}: {spaceless[2]}}}."
        super().error(message, ex)
