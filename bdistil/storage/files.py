"""Files that are on the disk whole or not at all, and what to say when the disk refuses."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bdistil.errors import RunError


@contextmanager
def disk_errors(doing: str, root: Path) -> Iterator[None]:
    """Turns a refusal of the disk into a message that says what is safe.

    Args:
        doing: what was to be written, for the message.
        root: the run directory.

    Raises:
        RunError: in place of an OSError, or of what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        cause = "the disk is full" if full else str(error)
        way_out = "Free some space" if full else "Mend that (a permission, a disk that became read-only)"
        raise RunError(
            f"Could not finish {doing} in {root}: {cause}. Every round committed before is intact. "
            f"{way_out} and give the same command again: it goes on from there."
        ) from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader, or a restart, sees all of it or what was there before."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def digest(path: Path) -> str:
    """Sha256 of a file, as hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
