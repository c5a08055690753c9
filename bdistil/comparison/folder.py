"""The folder of a comparison, and the recipe, options and data that it is bound to once a training has begun."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bdistil.comparison.origin import FILE, Origin, read_origin
from bdistil.errors import UserError
from bdistil.storage.files import write_atomically
from bdistil.storage.run_lock import RunLock

RECIPE, OPTIONS = "recipe.yaml", "options.json"
FILES = (RECIPE, OPTIONS, "compare.csv", "compare.md", "report.html")  # in the folder of a comparison


@contextmanager
def in_use(output: Path) -> Iterator[None]:
    """Context in which no other start of a comparison may use its folder, which is created.

    Raises:
        UserError: another start uses it, or it cannot be written to.
    """
    lock = RunLock(output / ".lock", "output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"`output` {output} cannot be written to: {error.strerror or error}.") from error
    with lock.held():
        yield


def begun(output: Path) -> bool:
    """Whether any training has passed its checks; before that, recipe and options may still be changed."""
    return any((output / "runs").glob("*/config.yaml"))


def check_same(output: Path, text: str, options: Sequence[str]) -> None:
    """Raises UserError if the folder holds a run, or a comparison of another recipe or with other options."""
    copy, kept = output / RECIPE, output / OPTIONS
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


def freeze(output: Path, text: str, options: Sequence[str], origin: Origin) -> None:
    """Stores recipe, options and origin of a comparison; its trainings read this copy of the recipe."""
    if not begun(output):  # written first, as it identifies the other files as those of a comparison
        write_atomically(output / FILE, json.dumps(origin))
    write_atomically(output / OPTIONS, json.dumps(list(options)))
    write_atomically(output / RECIPE, text)
