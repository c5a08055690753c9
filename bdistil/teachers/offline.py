"""Teacher logits that exist already, in place of a teacher (offline distillation)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.teachers.api import ApiTeacher

Table = Tensor | np.ndarray[Any, Any] | str | os.PathLike[str]
PARTS = ("train", "val", "test")


class OfflineTeacher(nn.Module):
    """Precomputed logits in place of a teacher; row i belongs to sample i of the dataset of a loader.

    If a sampler selects the samples of a part, rows still refer to the whole dataset.

    Logits are looked up by sample number: x must not be augmented at random, as no teacher can evaluate other inputs.
    The cost of the teacher is unknown and written as 0.

    Args:
        train: logits (N, L) of the training part: a tensor, an array, a ``.npy`` file, or a ``.safetensors`` file with
            one tensor, with one named ``logits``, or with one for each part (``train``, ``val`` and ``test``). Without
            `val`, it holds all parts in sequence: training, validation, and the test part if there is one.
        val: logits of the validation part.
        test: logits of the test part; without them the run reports no test figures of the teacher.

    Raises:
        UserError: a table cannot be read, is not (N, L), or has another L than the others; `test` without `val`.

    Example:
        >>> teacher = OfflineTeacher(torch.zeros(3, 2), torch.ones(2, 2))
        >>> teacher.outputs, teacher.rows("val", np.array([1])).tolist()
        (2, [[1.0, 1.0]])
    """

    trained = True  # a recipe has nothing to train here

    def __init__(self, train: Table, val: Table | None = None, test: Table | None = None) -> None:
        super().__init__()
        self.tables = {"train": read_table(train, "train")}
        self._chosen: Mapping[str, Sequence[int]] = {}
        if val is None and _holds(train, "val"):
            val, test = train, test if test is not None or not _holds(train, "test") else train
        for name, table in (("val", val), ("test", test)):
            if table is not None:
                self.tables[name] = read_table(table, name)
        if val is None and test is not None:
            raise UserError(
                "Expected `val` of an OfflineTeacher, logits of the validation part, got `train` and `test` alone. "
                "Give `val`, or one table of all parts as `train`."
            )
        self._given = dict(self.tables)  # `check` may divide one of all parts
        widths = {name: table.shape[1] for name, table in self.tables.items()}
        if len(set(widths.values())) > 1:
            raise UserError(f"Expected logits of the same L outputs in all parts, got {_listed(widths)}.")

    @property
    def outputs(self) -> int:
        """L."""
        return int(self.tables["train"].shape[1])

    @cached_property
    def identity(self) -> str:
        """Sha256 of all logits, by which a run recognises its teacher."""
        digest = hashlib.sha256()
        for name, table in self._given.items():
            digest.update(f"{name} {table.shape} {table.dtype}".encode())
            digest.update(np.ascontiguousarray(table).view(np.uint8).data)
        return digest.hexdigest()

    def check(self, samples: Mapping[str, int], chosen: Mapping[str, Sequence[int]] | None = None) -> None:
        """Compares the number of rows with the number of samples of each part; splits a table of all parts.

        Args:
            samples: number of samples in the dataset, by name of the part; the test part may be missing.
            chosen: numbers of the samples that a sampler yields, for parts where it does not yield all.

        Raises:
            UserError: they differ.
        """
        names, self._chosen = [name for name in PARTS if name in samples], chosen or {}
        rows = {name: len(table) for name, table in self.tables.items()}
        if "val" not in self.tables:
            (whole,) = self.tables.values()
            for parts in (names, [name for name in names if name != "test"]):
                if len(whole) == sum(samples[name] for name in parts):
                    ends = np.cumsum([samples[name] for name in parts])[:-1]
                    self.tables = dict(zip(parts, np.split(whole, ends), strict=True))
                    return
            raise UserError(
                f"Expected logits of all parts in the teacher's table, {_listed(samples)}, got {len(whole)} rows. Give "
                "those of each part by OfflineTeacher(train, val, test)."
            )
        if wrong := [name for name in names if rows.get(name, samples[name]) != samples[name]]:
            raise UserError(
                f"Expected a row of teacher logits for each sample, {_listed(samples)}, got "
                f"{_listed({name: rows[name] for name in wrong})}. Row i belongs to sample i of the dataset."
            )

    def rows(self, part: str, index: np.ndarray[Any, Any]) -> Tensor:
        """Logits (B, L) float32 of samples of a part, by their number among the chosen ones."""
        index = np.asarray(self._chosen[part])[index] if part in self._chosen else index
        return torch.from_numpy(np.asarray(self.tables[part][index], np.float32))

    def forward(self, x: Any) -> Tensor:
        """Always fails: there is no teacher to evaluate x.

        Raises:
            UserError: always.
        """
        raise UserError(
            "The teacher is a table of logits, which has no answer to other inputs. Use it without "
            "state='recompute' and views, or give the teacher itself."
        )


def as_teacher(teacher: Any) -> nn.Module:
    """Converts a teacher to a module: tables of its logits become an `OfflineTeacher`, a module is unchanged.

    Raises:
        UserError: it is neither.

    Example:
        >>> as_teacher({"train": np.zeros((3, 2)), "val": np.ones((2, 2))}).outputs
        2
    """
    if isinstance(teacher, nn.Module):
        return teacher
    if isinstance(teacher, Mapping) and "train" in teacher and set(teacher) <= set(PARTS):
        return OfflineTeacher(**teacher)
    if isinstance(teacher, Tensor | np.ndarray | str | os.PathLike):
        return OfflineTeacher(teacher)
    raise UserError(
        "Expected `teacher` to be a torch.nn.Module, or its logits as a tensor, a .npy or .safetensors file, or as a "
        f"mapping of those with 'train' and 'val', got {type(teacher).__name__}."
    )


def table_of(teacher: nn.Module) -> OfflineTeacher | None:
    """The `OfflineTeacher` of a table of logits, frozen or not; None for any other teacher."""
    inner = getattr(teacher, "module", teacher)
    return inner if isinstance(inner, OfflineTeacher) else None


def declared_outputs(teacher: nn.Module) -> int | None:
    """L as declared by a teacher, frozen or not: an API or a table; None for any other, which has to be run."""
    inner: Any = getattr(teacher, "module", teacher)
    return int(inner.outputs) if isinstance(inner, ApiTeacher | OfflineTeacher) else None


def read_table(table: Table, part: str) -> np.ndarray[Any, Any]:
    """Logits (N, L) of a part in NumPy, memory-mapped from a ``.npy`` file.

    Raises:
        UserError: they cannot be read, or are not of that form.
    """
    found: Any = table
    if isinstance(table, str | os.PathLike):
        found = _read_file(Path(table), part)
    if isinstance(found, Tensor):
        found = found.detach().cpu()
        found = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu" or not found.size:
        got = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise UserError(f"Expected teacher logits of shape (N, L) for the part {part!r}, got {got}.")
    return found


def _read_file(path: Path, part: str) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                name = next((n for n in (part, "logits") if n in names), names[0] if len(names) == 1 else None)
                if name is None:
                    raise UserError(
                        f"Expected a tensor named {part!r} or 'logits' in {path}, got {', '.join(map(repr, names))}."
                    )
                return file.get_tensor(name)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"Expected {path} to hold teacher logits, but it cannot be read: {error}.") from error
    raise UserError(
        f"Expected teacher logits in a .npy or .safetensors file, got {path}. If it holds weights, build the network, "
        "load them, and give the network as `teacher`."
    )


def _holds(table: Table, part: str) -> bool:
    """Whether a table is a safetensors file with a tensor of that part."""
    if not isinstance(table, str | os.PathLike) or Path(table).suffix != ".safetensors":
        return False
    with safe_open(table, framework="pt") as file:
        return part in file.keys()  # noqa: SIM118 (it has no `in`)


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} of {name!r}" for name, number in numbers.items())
