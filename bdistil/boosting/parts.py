"""All parts of the data of a boosting run and their ledgers, on the run's disk or on a scratch disk of each node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader

from bdistil.boosting.checks.data import check_augmentation, check_repeatable_x, warn_of_undrawn
from bdistil.boosting.ledger.samples import SampleGuard
from bdistil.boosting.part import Part
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import CANONICAL, LOADERS, ViewPlan, check_dataset, only_given
from bdistil.storage.files import write_atomically
from bdistil.storage.run_directory import RunDirectory
from bdistil.teachers.checks import warn_of_guessing, warn_of_order
from bdistil.utils import distributed

OF_STUDENTS = ("error.", "features.")  # first parts of the names of ledger files that belong to committed rounds


@dataclass(frozen=True)
class Parts:
    """Training and validation part, and further views of a randomly augmented training part.

    Attributes:
        train: training part; its view 0 if there are views.
        val: validation part.
        views: views 1 … K-1 of the training part.
        plans: the views that the training and the validation loader read; None without random augmentation.
    """

    train: Part
    val: Part
    views: tuple[Part, ...]
    plans: tuple[ViewPlan | None, ViewPlan | None]

    @classmethod
    def of(
        cls, train: DataLoader[Any], val: DataLoader[Any], folder: Path, settings: BoostingSettings, seed: int
    ) -> Parts:
        """The parts of the user's loaders, which yield (x, y).

        Raises:
            UserError: a dataset is iterable or empty, its items are not (x, y), or it is augmented at random with
                settings that do not support this.
        """
        check_dataset(train, "train_dataloader")
        check_dataset(val, "val_dataloader")
        warn_of_undrawn(train)
        val = only_given(val, "val_dataloader")
        augments, val_augments = check_augmentation(train, settings, seed), check_repeatable_x(val, seed)
        views = settings.views if augments else None
        part = partial(Part, folder=folder, settings=settings, seed=seed)
        return cls(
            part("train", train, view=CANONICAL if augments else None),
            part("val", val, view=CANONICAL if val_augments else None),
            tuple(part("train", train, view=view) for view in range(1, views or 1)),
            (ViewPlan(seed, views) if views else None, ViewPlan(seed) if val_augments else None),
        )

    def replace_loader(self, name: str, loader: Any) -> Any:
        """Replaces the loader of a part by the one that the user's method `name` returned; returns the loader to read.

        Raises:
            UserError: its samples are not those of the run.
        """
        parts = (self.train, *self.views) if name == LOADERS[0] else (self.val,)
        with isolate_rng(include_cuda=False):  # leaves the random state of the fit unchanged
            check_dataset(loader, name)
            if name != LOADERS[0]:
                loader = only_given(loader, name)
            for part in parts:
                part.replace_loader(loader)
        return loader

    def start_fit(self, datamodule: Any) -> None:
        """Requests new loaders for this fit, as those of the previous fit may read closed files.

        Raises:
            UserError: their samples are not those of the run, or differ between processes.
        """
        for guard in self.guards:
            guard.restart()
        for name in LOADERS:
            getattr(datamodule, name)()  # which calls `replace_loader`
        for guard in self.guards:
            guard.compare_processes()

    def compare_stored(self) -> None:
        """Compares some samples with those of earlier starts.

        Raises:
            UserError: a sample differs.
        """
        for guard in self.guards:
            guard.compare_stored()

    def store(self) -> None:
        """Stores some samples for later starts, if no earlier one has."""
        for guard in self.guards:
            guard.store()

    def __iter__(self) -> Iterator[Part]:
        yield from (self.train, self.val, *self.views)

    @property
    def guards(self) -> list[SampleGuard]:
        """The guards of the samples of both parts; views have none of their own."""
        return [part.guard for part in (self.train, self.val) if part.guard is not None]

    def query(self, teacher: nn.Module, device: torch.device, outputs: int, fingerprint: str) -> tuple[float, float]:
        """Writes the teacher's logits of all parts; returns its accuracy and loss on the validation part.

        Warns if the teacher is no better than guessing, and if the rows of a table seem to be in another order.
        """
        score, _ = self.train.query(teacher, device, outputs, fingerprint)
        units = self.train.ledger.units
        figures: tuple[float, float] = self.val.query(teacher, device, outputs, fingerprint, units)
        warn_of_guessing(self.val.settings.task, figures[0], outputs, self.val.samples)
        warn_of_order(score, figures[0])
        for view in self.views:
            view.query(teacher, device, outputs, fingerprint, units)
        return figures

    def catch_up(
        self, students: Sequence[nn.Module], device: torch.device, fingerprint: str, *, fixed: bool = True
    ) -> None:
        """Brings the ledgers of all parts up to date; `fixed` states that all samples have the same shape."""
        for part in self:
            part.fixed = fixed
            part.catch_up(students, device, fingerprint)

    def claim(self, run: RunDirectory) -> None:
        """Finds the processes that share a node's scratch disk, and removes files of other runs or rounds from it.

        A node may return after rounds in which it did not take part, or the run may have been restarted from scratch.
        Removed files are recomputed from the teacher and the committed students; the run directory is authoritative.
        """

        def history() -> dict[str, Any]:
            seals = [run.record(number)["weights"]["sha256"] for number in range(run.committed())]
            return {"run": run.identity(), "rounds": seals}

        now = distributed.from_first(history() if distributed.rank() == 0 else None)
        sharers = distributed.sharers_of(run.ledger)
        with distributed.within(sharers):
            if distributed.rank() == 0:
                _clear(run.ledger, now, continuing=self.train.ledger.version >= 0)
            distributed.barrier()
        for part in self:
            part.sharers = sharers


def copy_teacher(source: RunDirectory, target: RunDirectory) -> None:
    """Copies the teacher's logits from a run of the same teacher, data and seed, unless the target has some already."""
    figures = source.read("teacher")
    if figures is None or target.read("teacher") is not None or target.scratch is not None:
        return
    for file in source.ledger.rglob("*.*"):
        if file.is_file() and file.suffix != ".tmp" and not file.name.startswith(OF_STUDENTS):
            copy = target.ledger / file.relative_to(source.ledger)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    target.write("teacher", figures)


def _clear(folder: Path, history: Mapping[str, Any], *, continuing: bool) -> None:
    """Removes files of other runs or rounds from a folder; a continuing process has written the last round itself."""
    owner = folder / "owner.json"
    folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(owner.read_text()) if owner.exists() else {"run": None}
    if found["run"] != history["run"]:
        for part in ("train", "val"):
            shutil.rmtree(folder / part, ignore_errors=True)
    elif found["rounds"] != history["rounds"] and not continuing:
        for file in (file for name in OF_STUDENTS for file in folder.rglob(f"{name}*")):
            file.unlink()
    write_atomically(owner, json.dumps(history))
