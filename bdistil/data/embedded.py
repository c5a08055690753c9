"""Data files that packages on PyPI ship: found without importing the package, and checked before they are read."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from bdistil.errors import UserError


def packaged_file(package: str, path: str, sha256: str) -> Path:
    """A data file of an installed package.

    Args:
        package: its name on PyPI.
        path: of the file, below site-packages.
        sha256: of the file.

    Raises:
        UserError: the package is not installed, or its file is missing or another one.
    """
    cure = f"Install it with: pip install 'bdistil[data]' (or: pip install {package})."
    try:
        file = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise UserError(
            f"This recipe's data come with the package `{package}`, which is not installed. {cure}"
        ) from None
    if not file.is_file():
        raise UserError(f"{file} is missing from the package `{package}` {metadata.version(package)}. {cure}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{file} is not the file that this recipe was made for: sha256 {found}, expected {sha256}. {cure}"
        )
    return file
