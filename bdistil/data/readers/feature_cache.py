"""Features computed once from many files, in parallel, and kept on the disk until a file or the computation changes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import track

from bdistil.data.readers.files import Array
from bdistil.errors import UserError

Compute = Callable[[Path], Array]

FEW = 64  # files that are not worth several processes
CHUNK = 16  # files per task of a process


def cached_features(cache: Path, name: str, spec: Mapping[str, Any], files: Sequence[Path], compute: Compute) -> Array:
    """Features of files, (len(files), ...) float32, read from the cache or computed and kept there.

    The cache is the file `NAME-KEY.npy`, written atomically; the key is a digest of the spec and of the name, size and
    time of every file. Older versions are removed. If several processes start at once, only one computes.

    `spec` describes the features and holds a version, to be raised when the code of `compute` (picklable) changes.

    Raises:
        UserError: raised by `compute`; features of different shapes; the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for path in files:
        status = path.stat()
        key.update(f"{path.parent.name}/{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    file = cache / f"{name}-{key.hexdigest()[:12]}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not _is_readable(file):
                for stale in [*cache.glob(f"{name}-*.npy"), *cache.glob(f".{name}-*.npy")]:
                    stale.unlink()
                _write(file, _computed(files, compute, f"Features of {name}"))
        features: Array = np.load(file, mmap_mode="r")
    except OSError as error:
        raise UserError(
            f"The features of {name} cannot be kept in {cache} ({error}). Give another folder as `cache`."
        ) from error
    return features


def _is_readable(file: Path) -> bool:
    try:
        np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def _write(file: Path, features: Array) -> None:
    beside = file.with_name(f".{file.name}")
    try:
        np.save(beside, features)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _computed(files: Sequence[Path], compute: Compute, title: str) -> Array:
    """Features of all files, computed in one process per core, with a progress bar on a terminal."""
    several = len(files) >= FEW and cores() > 1
    features: list[Array] = []
    with ProcessPoolExecutor(cores()) if several else nullcontext() as pool:
        results = pool.map(compute, files, chunksize=CHUNK) if pool else map(compute, files)
        tracked = track(results, title, len(files), console=Console(stderr=True), disable=not sys.stderr.isatty())
        for file, result in zip(files, tracked, strict=True):
            if features and result.shape != features[0].shape:
                raise UserError(f"{file} gives features {result.shape}, those before it {features[0].shape}.")
            features.append(result.astype(np.float32, copy=False))
    return np.stack(features)
