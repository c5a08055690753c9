"""Published data sets that a user brings: where they are looked for, what is missing of them, how to get them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bdistil.errors import UserError

SHOWN = 3  # names of missing files in a message


@dataclass(frozen=True)
class Source:
    """A data set as its authors publish it. Nothing is ever downloaded by itself.

    Attributes:
        name: for messages.
        url: where it is published.
        commands: that fetch and unpack it into {root}.
        folder: that they leave there.
    """

    name: str
    url: str
    commands: str
    folder: str

    def locate(self, root: str | os.PathLike[str], needed: Sequence[str]) -> Path:
        """The folder of the data set: below `root`, or `root` itself.

        Args:
            root: what the user gave.
            needed: files and folders that have to be there.

        Raises:
            UserError: some are not; names them, and says how to get the data set.
        """
        places = [Path(root, self.folder), Path(root)]
        place = next((p for p in places if any((p / name).exists() for name in needed)), places[0])
        lacking = [name for name in needed if not (place / name).exists()]
        if len(lacking) == len(needed):
            looked = " and ".join(str(p.absolute()) for p in places)
            raise UserError(f"{self.name} is not there: looked in {looked} for {listed(needed)}. {self.cure(root)}")
        if lacking:
            raise UserError(
                f"{self.name} is not complete: {place.absolute()} lacks {listed(lacking)}. {self.cure(root)}"
            )
        return place

    def cure(self, root: str | os.PathLike[str]) -> str:
        """How to get the data set."""
        return f"Give another `root`, or get it from {self.url}:\n  {self.commands.format(root=os.fspath(root))}"

    def damaged(self, file: Path, why: str) -> UserError:
        """The error of a file that is not what was published."""
        return UserError(f"{file} of {self.name} cannot be used: {why}. Get it again from {self.url}.")

    def check_count(self, what: str, found: int, published: int, place: Path, partial: bool) -> None:
        """Compares a count with the published one, unless the user wants less than all.

        Args:
            what: is counted.
            found: how many are there.
            published: how many there should be.
            place: where they are.
            partial: does the user want what is there, whatever its number?

        Raises:
            UserError: another number.
        """
        if found != published and not partial:
            raise UserError(
                f"{self.name} has {published:,} {what}, but {found:,} are in {place.absolute()}: it was unpacked in "
                f"part, or is another version. Get it again from {self.url}, or give partial=true to use what is there."
            )


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - SHOWN:,} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


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
