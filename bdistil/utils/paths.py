"""Paths from user input."""

from __future__ import annotations

import os
from pathlib import Path

from bdistil.errors import UserError


def user_path(value: str | os.PathLike[str], argument: str) -> Path:
    """Converts a user's path and expands ~, which a shell leaves unexpanded after `=` and in a recipe.

    Args:
        value: the path.
        argument: name of the argument, for the error message.

    Raises:
        UserError: the path is empty, for example an unset shell variable, or its home folder is unknown.

    Example:
        >>> user_path("runs/digits", "run_dir").as_posix()
        'runs/digits'
    """
    text = os.fspath(value)
    if not text.strip():
        raise UserError(f"Expected `{argument}` to be a path, got an empty one (a variable that is not set?).")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"Expected `{argument}` to be a path, got {text!r}: {error}") from error
