"""Features that are computed once from many files, in parallel, and kept beside the data until anything changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from bdistil.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]
Compute = Callable[[Path], Array]

FEATURES, SPEC = "features.npy", "spec.json"
FEW = 64  # files that are not worth a process
CHUNK = 16  # files that a process is given at a time


def cached_features(cache: Path, name: str, spec: Mapping[str, Any], files: Sequence[Path], compute: Compute) -> Array:
    """Features of files, (len(files), ...) float32, read from the cache or computed and kept there.

    The cache is one folder `NAME-KEY`, which is there whole or not at all; the key is of the spec and of the name, size
    and time of every file. An older version of it is removed. Processes that ask at the same time compute once.

    Args:
        cache: folder of all caches.
        name: of this one.
        spec: what the features are, as JSON; give it a version that grows with the code of `compute`.
        files: at least one.
        compute: features of a file, all of one shape; a function that processes can be sent.

    Raises:
        UserError: `compute` refused a file, or the cache cannot be written.
    """
    wanted = {"spec": dict(spec), "files": len(files), "sources": fingerprint(files)}
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{key}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            found = _read(folder, wanted)
            if found is None:
                for stale in [*cache.glob(f"{name}-*"), *cache.glob(f".{name}-*")]:
                    shutil.rmtree(stale, ignore_errors=True)
                _build(folder, wanted, files, compute, name)
                found = _read(folder, wanted)
    except OSError as error:
        raise UserError(
            f"The features of {name} cannot be kept in {cache} ({error}). Give another folder as `cache`."
        ) from error
    assert found is not None
    return found


def fingerprint(files: Sequence[Path]) -> str:
    """Sha256 over name, size and time of change of every file."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.parent.name}/{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read(folder: Path, wanted: Mapping[str, Any]) -> Array | None:
    """What the folder holds, memory-mapped, where it is what is wanted, whole and readable."""
    try:
        if json.loads((folder / SPEC).read_text(encoding="utf-8")) != wanted:
            return None
        features: Array = np.load(folder / FEATURES, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return features if len(features) == wanted["files"] else None


def _build(folder: Path, wanted: Mapping[str, Any], files: Sequence[Path], compute: Compute, name: str) -> None:
    beside = folder.with_name(f".{folder.name}")
    beside.mkdir()
    try:
        out: Array | None = None
        for number, result in enumerate(_computed(files, compute, f"Features of {name}")):
            if out is None:
                shape = (len(files), *result.shape)
                out = np.lib.format.open_memmap(beside / FEATURES, mode="w+", dtype=np.float32, shape=shape)
            if result.shape != out.shape[1:]:
                raise UserError(f"{files[number]} gives features {result.shape}, those before it {out.shape[1:]}.")
            out[number] = result
        assert out is not None
        out.flush()  # type: ignore[attr-defined]
        (beside / SPEC).write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class _Results(Dataset[Any]):
    """What `compute` makes of each file; a refusal is a value, so that its message comes back as it was."""

    def __init__(self, files: Sequence[Path], compute: Compute) -> None:
        self.files, self.compute = files, compute

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Array | UserError:
        try:
            return self.compute(self.files[index])
        except UserError as error:
            return error


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _computed(files: Sequence[Path], compute: Compute, title: str) -> Any:
    """Results in order, from as many processes as there are cores, with a progress bar where somebody watches."""
    processes = cores() if len(files) >= FEW and cores() > 1 else 0
    generator = torch.Generator()  # else the loader draws from the run's own
    results_of = _Results(files, compute)
    loader = DataLoader(results_of, CHUNK, num_workers=processes, collate_fn=list, generator=generator)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=len(files))
        for results in loader:
            for result in results:
                if isinstance(result, UserError):
                    raise result
                yield result
            progress.update(task, advance=len(results))
