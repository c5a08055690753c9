"""Atomic writing of the exported folder; size and sha256 of its files for the manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from bdistil import runner
from bdistil.errors import RunError, UserError
from bdistil.export.graphs import Segment
from bdistil.runner.graphs import FORMAT
from bdistil.storage.files import atomic, digest


def check_output(output: Path, overwrite: bool) -> None:
    """Checks that an export may be written to a path.

    Raises:
        UserError: the path exists and is not an export, or is an export that must not be replaced.
    """
    if output.is_symlink():
        target = output.resolve()
        raise UserError(f"Expected `--output` to be a folder, got the link {output}. Give its target, {target}.")
    if not output.exists():
        return
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"Expected `--output` to be a new folder, got {output}, which exists and is no export.")
    if not overwrite:
        raise UserError(f"`--output` {output} is an export. Give --overwrite true to replace it, or a new folder.")
    if other := _other_files(output, manifest):
        raise UserError(
            f"Expected `--output` {output} to hold nothing but an export, which --overwrite replaces, got {other[0]}. "
            "Move it elsewhere, or give a new folder."
        )


def _other_files(output: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files, links and folders in an export folder that do not belong to the export."""
    written = {"manifest.json", "runner", *_files_of(manifest)}
    found = [path for path in output.rglob("*") if "__pycache__" not in path.parts]
    return sorted({path.relative_to(output).as_posix() for path in found} - written)


def _files_of(entry: Any) -> Iterator[str]:
    """Yields the files named in a manifest or a part of it."""
    if isinstance(entry, Mapping):
        yield from ([entry["file"]] if isinstance(entry.get("file"), str) else [])
    for value in entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, list) else ():
        yield from _files_of(value)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `output` when the block ends, and is removed if it raises.

    Raises:
        RunError: replaces an OSError.
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
            f"Could not write the export {output}: {error}. Free some space or fix its permission."
        ) from error
    finally:
        if old.exists() and not output.exists():
            os.replace(old, output)
        shutil.rmtree(old, ignore_errors=True)


def copy_runner(folder: Path) -> list[dict[str, Any]]:
    """Copies the runner into the folder; returns its manifest entry `runner`."""
    source, target = Path(runner.__file__).parent, folder / "runner"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    return [{**seal(path), "file": f"runner/{path.name}"} for path in sorted(target.iterdir())]


def seal(path: Path) -> dict[str, Any]:
    """Name, size and sha256 of a file, as in the manifest."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


def graph_entry(
    path: Path, segment: Segment, values: Mapping[str, Tensor], batch: int | str = "batch"
) -> dict[str, Any]:
    """Manifest entry of a graph; `batch` is its batch size, or the name of a dynamic one."""

    def tensors(names: Sequence[str]) -> list[dict[str, Any]]:
        dtypes = {name: str(values[name].dtype).removeprefix("torch.") for name in names}
        sizes = {n: segment.sizes.get(n, values[n].shape[1:]) for n in names}
        return [{"name": n, "shape": [batch, *sizes[n]], "dtype": dtypes[n]} for n in names]

    return {
        **seal(path),
        "first": segment.numbers[0] + 1,
        "last": segment.numbers[-1] + 1,
        "inputs": tensors(segment.reads),
        "outputs": tensors(segment.gives),
    }
