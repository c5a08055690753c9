"""Recipes: those that are shipped, and clear errors for a file that is empty, not in UTF-8, or sets a key twice."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from yaml.nodes import MappingNode, Node, SequenceNode

from bdistil.errors import UserError
from bdistil.models.student import Rung
from bdistil.utils.paths import user_path

RUNG = asdict(Rung())


def recipes() -> dict[str, Path]:
    """The shipped recipes: paths by name."""
    folder = Path(str(files("bdistil") / "recipes"))
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}


def jobs() -> list[Path]:
    """The shipped SLURM scripts."""
    return sorted(Path(str(files("bdistil") / "recipes")).rglob("*.sbatch"))


def summary(path: Path) -> str:
    """The description of a recipe: its first comment line."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()


def find_recipe(name: str) -> Path:
    """The path of a recipe, given as a path or as the name of a shipped recipe.

    Raises:
        UserError: there is no such recipe; similar names are listed.
    """
    if name and (path := user_path(name, "config")).is_file():
        return path
    known = recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Give a path, or one of those."
    raise UserError(f"Expected `--config` to be a file or a shipped recipe ({', '.join(known)}), got {name!r}. {hint}")


def check_recipe(path: Path) -> None:
    """Checks that a file holds options as YAML, in UTF-8.

    Raises:
        UserError: it does not.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"Expected the recipe {path} in UTF-8, got another encoding: byte {content[error.start]:#x} in line {line}."
        ) from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"Expected the recipe {path} to be YAML, got an error: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(found, dict) or not found:
        got = "an empty file" if found in (None, {}) else f"a {type(found).__name__}"
        raise UserError(f"Expected the recipe {path} to set options (`key: value`), got {got}.")


def install_yaml_loader() -> None:
    """Makes the command-line parsers refuse duplicate keys, of which YAML silently drops the first, and complete rungs.

    See `_whole_rungs`.
    """
    set_loader("yaml", _load, (yaml.YAMLError,))


_lenient = get_loader("yaml")


def _load(text: str) -> Any:
    value = _lenient(text)
    if isinstance(value, dict | list):
        _check_keys(yaml.compose(text, yaml.SafeLoader), "")
    return _whole_rungs(value)


def _whole_rungs(value: Any, key: str | None = None) -> Any:
    """Fills missing fields of the rungs of a `ladder` in YAML values with defaults; other lists are unchanged.

    Otherwise the parser would take them from the rung at the same position of the default ladder, or of an earlier
    --config, if that ladder is as long: {links: 1, width: 2} in third position would get the kind `hidden`.

    Args:
        value: value from a recipe or of a command-line option.
        key: key of the value in its mapping; None for an option, whose name is unknown here: a ladder is then
            recognised by `links`.
    """
    if isinstance(value, dict):
        return {name: _whole_rungs(part, str(name)) for name, part in value.items()}
    if not isinstance(value, list) or not all(isinstance(part, dict) and part.keys() <= RUNG.keys() for part in value):
        return value
    ladder = any("links" in part for part in value) if key is None else key.split(".")[-1] == "ladder"
    return [RUNG | part for part in value] if ladder else value


def _check_keys(node: Node | None, place: str) -> None:
    """Raises UserError if a mapping in a node has a key twice; names the key and both lines."""
    if isinstance(node, SequenceNode):
        for number, item in enumerate(node.value):
            _check_keys(item, f"{place}{number}.")
    if not isinstance(node, MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines and name != "<<":
            raise UserError(
                f"Expected each key once in a recipe, got `{place}{name}` twice, in lines {lines[name]} and {line}, "
                "where YAML drops the first. Put both under one key."
            )
        lines[name] = line
        _check_keys(value, f"{place}{name}.")
