"""The folder of a comparison, and the recipe, options and data that it is bound to once a training has begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bdistil.comparison.origin import FILE, Origin, read_origin
from bdistil.errors import UserError
from bdistil.storage.files import write_atomically

FILES = ("recipe.yaml", "options.json", "compare.csv", "compare.md", "report.html")  # in the folder of a comparison


def begun(output: Path) -> bool:
    """Whether any training has passed its checks; before that, recipe and options may still be changed."""
    return any((output / "runs").glob("*/config.yaml"))


def check_same(output: Path, text: str, options: Sequence[str]) -> None:
    """Raises UserError if the folder holds a run, or a comparison of another recipe or with other options."""
    copy, kept = output / "recipe.yaml", output / "options.json"
    if (output / "rounds").exists():
        raise UserError(f"`output` {output} is the folder of a run, whose report would be lost. Choose another folder.")
    if not begun(output):
        if read_origin(output) is None and (own := [name for name in FILES if (output / name).exists()]):
            raise UserError(f"`output` {output} has a file {own[0]}, which would be replaced. Choose another folder.")
        return
    if lost := [name for name in (copy.name, kept.name, FILE) if not (output / name).exists()]:
        raise UserError(
            f"`output` {output} holds a comparison without its {lost[0]}, so nothing shows whether recipe, options and "
            "data are still the same. Put the file back, or choose another folder."
        )
    if (copy.read_text(encoding="utf-8"), json.loads(kept.read_text())) != (text, list(options)):
        raise UserError(
            f"`output` {output} holds a comparison of another recipe or with other options "
            f"({' '.join(json.loads(kept.read_text())) or 'none'}). Choose another folder, or give those."
        )


def freeze(output: Path, text: str, options: Sequence[str], origin: Origin) -> Path:
    """Stores recipe, options and origin of a comparison; returns the copy of the recipe that its trainings read.

    Raises:
        UserError: the folder cannot be written to.
    """
    copy, kept = output / "recipe.yaml", output / "options.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not begun(output):  # written first, as it identifies the other files as those of a comparison
            write_atomically(output / FILE, json.dumps(origin))
        write_atomically(kept, json.dumps(list(options)))
        write_atomically(copy, text)
    except OSError as error:
        raise UserError(f"`output` {output} cannot be written to: {error.strerror or error}.") from error
    return copy
