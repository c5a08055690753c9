"""The recipes that are shipped, by name."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from bdistil.errors import UserError


def recipes() -> dict[str, Path]:
    """Name and path of every shipped recipe."""
    folder = Path(str(files("bdistil") / "recipes"))
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}


def jobs() -> list[Path]:
    """The shipped jobs for SLURM."""
    return sorted(Path(str(files("bdistil") / "recipes")).rglob("*.sbatch"))


def summary(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of a shipped one.

    Raises:
        UserError: there is none; near names are listed.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Give a path, or one of those."
    raise UserError(f"Expected `--config` to be a file or a shipped recipe ({', '.join(known)}), got {name!r}. {hint}")
