"""Files of published data sets: location, checks, and readers that execute nothing and name a damaged file."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from bdistil.errors import UserError, listed
from bdistil.utils.paths import user_path

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Source:
    """A data set as its authors publish it. Nothing is downloaded automatically.

    Attributes:
        name: name of the data set, for messages.
        url: where it is published.
        commands: shell commands that fetch and unpack it into {root}.
        folder: the folder that these commands create there.
    """

    name: str
    url: str
    commands: str
    folder: str

    def locate(self, root: str | os.PathLike[str], needed: Sequence[str]) -> Path:
        """The folder of the data set with all the needed files: `folder` below `root`, or `root` itself.

        Raises:
            UserError: files are missing; the message names them and the download commands.
        """
        above = user_path(root, "root")
        places = [above / self.folder, above]
        place = next((p for p in places if any((p / name).exists() for name in needed)), places[0])
        missing = [name for name in needed if not (place / name).exists()]
        if len(missing) == len(needed):
            looked = " and ".join(str(p.absolute()) for p in places)
            raise UserError(f"{self.name} was not found in {looked}: expected {listed(needed)}. {self.cure(root)}")
        if missing:
            raise self.incomplete(place, missing, root)
        return place

    def cure(self, root: str | os.PathLike[str]) -> str:
        """Instructions for downloading the data set."""
        return f"Give another `root`, or get it from {self.url}:\n  {self.commands.format(root=os.fspath(root))}"

    def incomplete(self, place: Path, missing: Iterable[str], root: str | os.PathLike[str]) -> UserError:
        """The error for a folder with missing files."""
        return UserError(f"{self.name} is not complete: {place.absolute()} lacks {listed(missing)}. {self.cure(root)}")

    def damaged(self, file: Path, why: str) -> UserError:
        """The error for a file that differs from the published one."""
        return UserError(f"{file} of {self.name} cannot be used: {why}. Get it again from {self.url}.")

    def check_count(self, what: str, found: int, published: int, place: Path, partial: bool) -> None:
        """Compares the number of `what` that was found in a folder with the published one.

        Raises:
            UserError: the numbers differ, without `partial`.
        """
        if found != published and not partial:
            raise UserError(
                f"{self.name} has {published:,} {what}, but {found:,} are in {place.absolute()}: it was unpacked in "
                f"part, or is another version. Get it again from {self.url}, or give partial=true to use what is there."
            )


def packaged_file(package: str, path: str, sha256: str) -> Path:
    """A data file of an installed PyPI package; `path` is relative to site-packages.

    Raises:
        UserError: the package is not installed, or the file is missing or differs.
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


def read_numbers(
    path: Path, source: Source, columns: int, lines: int | None = None, delimiter: str | None = None
) -> Array:
    """Reads a text file of numbers, (lines, columns) float32; by default any number of lines, split at whitespace.

    Raises:
        UserError: another shape, or entries that are not finite numbers; the file is named.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy only warns of an empty file
            table = np.loadtxt(path, np.float32, delimiter=delimiter, ndmin=2)
    except (ValueError, UserWarning) as error:
        raise source.damaged(path, str(error)) from error
    if table.shape != (lines or len(table), columns):
        expected = f"{lines or 'any number of'} lines of {columns} numbers"
        raise source.damaged(path, f"it has {len(table)} lines of {table.shape[1]} numbers, expected {expected}")
    if not np.isfinite(table).all():
        raise source.damaged(path, "it has NaN or infinity")
    return table


# ---- pickles


def _latin1(text: str, encoding: str) -> bytes:
    """Text as bytes, in the only encoding that pickled arrays use."""
    if encoding != "latin1":
        raise UserError(f"it names the encoding {encoding!r}, which no file of arrays does")
    return text.encode("latin1")


# All that a pickled array needs. `numpy.core` is the name in old files; NumPy 2 has it as `numpy._core`.
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes in a form that Python 2 can read
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core", 1)
        if (module, name) not in _ALLOWED:
            raise UserError(f"it names {module}.{name}, which no file of arrays does, so it is not to be trusted")
        return _ALLOWED[module, name]


def load_arrays(file: IO[bytes]) -> Any:
    """Loads a pickle of plain values and NumPy arrays; strings of Python 2 are decoded as latin1.

    Raises:
        UserError: it refers to anything else, or is damaged; the message omits the file name.
    """
    try:
        return _ArrayUnpickler(file, encoding="latin1").load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"it is not a complete pickle ({type(error).__name__}: {error})") from error
