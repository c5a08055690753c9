"""Paths that users give."""

from __future__ import annotations

import os
from pathlib import Path

from bdistil.errors import UserError


def user_path(value: str | os.PathLike[str], argument: str) -> Path:
    """A path as a user gave it, with ~ for the home folder, as a shell does not expand it after `=` or in a recipe.

    Args:
        value: the path.
        argument: its name, for the message.

    Raises:
        UserError: it is empty, as a variable of a shell that is not set makes it, or names no user's home.

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
