"""The exported folder: written beside and renamed, so that a half-written one is never mistaken for an export."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from bdistil.errors import RunError, UserError
from bdistil.export.graphs import Segment
from bdistil.storage.files import atomic

FORMAT, VERSION = "bdistil-export", 1


def check_output(output: Path, overwrite: bool) -> None:
    """Is there room for a new export?

    Raises:
        UserError: something else is there, or an export that was not to be replaced.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not is_export(output):
        raise UserError(f"Expected `--output` to be a new folder, got {output}, which is there and is no export.")
    if not overwrite:
        raise UserError(
            f"`--output` {output} is an export already. Give --overwrite true to replace it, or a new folder."
        )


def is_export(folder: Path) -> bool:
    """Does a folder hold an export of ours, of whatever version?"""
    try:
        return bool(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `output` when all went well and is gone when it did not.

    Raises:
        RunError: the disk refused.
    """
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        with atomic(output) as temporary:
            temporary.mkdir(parents=True)
            yield temporary
            if output.exists():
                os.replace(output, old)
    except OSError as error:
        raise RunError(
            f"Could not write the export {output}: {error}. Free some space or mend the permission."
        ) from error
    finally:
        if old.exists() and not output.exists():
            os.replace(old, output)
        shutil.rmtree(old, ignore_errors=True)


def copy_runner(folder: Path) -> list[dict[str, Any]]:
    """Puts the runner beside the graphs; gives its files for the manifest."""
    source, target = Path(__file__).with_name("runner"), folder / "runner"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    return [{**seal(path), "file": f"runner/{path.name}"} for path in sorted(target.iterdir())]


def seal(path: Path) -> dict[str, Any]:
    """Name, size and sha256 of a file, as the manifest has them."""
    data = path.read_bytes()
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def tensors(names: Sequence[str], values: Mapping[str, Tensor], batch: int | str) -> list[dict[str, Any]]:
    """Names, shapes and dtypes of the tensors that a graph reads or gives."""
    return [
        {
            "name": name,
            "shape": [batch, *values[name].shape[1:]],
            "dtype": str(values[name].dtype).removeprefix("torch."),
        }
        for name in names
    ]


def graph_entry(
    path: Path, segment: Segment, values: Mapping[str, Tensor], batch: int | str = "batch"
) -> dict[str, Any]:
    """What the manifest says of one graph; `batch` is its batch size, or the word for any."""
    return {
        **seal(path),
        "first": segment.numbers[0] + 1,
        "last": segment.numbers[-1] + 1,
        "inputs": tensors(segment.reads, values, batch),
        "outputs": tensors(segment.gives, values, batch),
    }
