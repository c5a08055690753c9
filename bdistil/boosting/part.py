"""One part of the data of a boosting run: its samples, its ledger, and the passes of teacher and students over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bdistil.boosting.labels import check_finite
from bdistil.boosting.ledger.features import FeatureCache, Shapes
from bdistil.boosting.ledger.ledger import ErrorLedger
from bdistil.boosting.ledger.records import RoundEvidence, Units
from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.ledger.samples import SampleGuard
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import Index, Views, largest_batch, rows_loader
from bdistil.functional.boosting import prefix_error
from bdistil.metrics.quality import PrefixMetric, given_labels, prefix_metric, whole_figures
from bdistil.models.stages import FEATURES
from bdistil.models.student import Student, activations_of, linked_activations, linked_numbers, run_student, sources
from bdistil.teachers.offline import table_of
from bdistil.utils import distributed
from bdistil.utils.modules import eval_mode
from bdistil.utils.seeding import seed_of

# Largest number of cached activation values per sample, besides its features: 16 kB in float16.
MOST_CACHED = 1 << 13
# Activations with larger values are recomputed on every batch: float16 ends at 65504.
LARGEST_CACHED = 4096.0


class Part:
    """The training part, the validation part, or one view of the training part under random augmentation.

    Args:
        name: ``train`` or ``val``: as in ``train_dataloader`` and in the ledger's folder.
        loader: the user's loader, yields (x, y); it has passed `check_dataset`.
        folder: folder of all ledgers of a run.
        settings: settings of the run.
        seed: seed of the run.
        view: index of the view of a randomly augmented dataset; each view has its own g and S.
    """

    def __init__(
        self,
        name: str,
        loader: DataLoader[Any],
        folder: Path,
        settings: BoostingSettings,
        seed: int,
        view: int | None = None,
    ) -> None:
        self.name, self.settings, self.seed, self.view = name, settings, seed, view
        self.fixed = True  # whether all samples have one shape, so that activations of stages can be cached
        self.samples = len(cast(Sized, loader.dataset))
        self._take(loader)
        folder = folder / name / f"view{view:03d}" if view else folder / name
        self.ledger = ErrorLedger(folder, settings.storage)
        self.features = FeatureCache(folder, self.samples)
        kinds = {"augmented": view is not None, "recomputed": settings.state == "recompute"}
        self.guard = None if view else SampleGuard(self.method, loader, self.items, folder, **kinds)
        self.sharers: distributed.Sharers | None = None  # processes that share the ledger's disk, if each node has one

    @property
    def method(self) -> str:
        """Name of the user's method that returns the loader."""
        return f"{self.name}_dataloader"

    @property
    def items(self) -> Any:
        """The dataset, or its view."""
        return self.dataset_view or self.loader.dataset

    def _take(self, loader: DataLoader[Any]) -> None:
        self.loader, self.batch_size = loader, min(largest_batch(loader), BLOCK)
        self.dataset_view = None if self.view is None else Views(loader.dataset, self.seed, self.view)

    def replace_loader(self, loader: DataLoader[Any]) -> None:
        """Replaces the loader by the data module's current one, as the previous one may read closed files.

        Raises:
            UserError: its samples are not those of the run.
        """
        self._take(loader)
        if self.guard is not None:
            self.guard.replace_loader(loader, self.items)

    def compare_batch(self, batch: tuple[Any, Any, Index]) -> None:
        """Checks a batch (x, y, index) of a fit against the stored samples, see `SampleGuard`."""
        if self.guard is not None:
            self.guard.compare_batch(*batch)

    def query(
        self, teacher: nn.Module, device: torch.device, outputs: int, fingerprint: str, units: Units | None = None
    ) -> tuple[float, float]:
        """Writes the teacher's logits of all samples to the ledger.

        Args:
            teacher: maps x to logits (B, L).
            device: device of the teacher.
            outputs: L.
            fingerprint: fingerprint of the teacher.
            units: units of the ledger, if another part determines them.

        Returns:
            The teacher's accuracy and cross entropy, or the scores of another task; NaN on the training part, except
            for a table of logits.

        Raises:
            RunError: a logit is NaN or infinite.
        """
        task, table = self.settings.task, table_of(teacher)  # the rows of a table may be out of order
        scores = self._metric(outputs) if table is None else prefix_metric(task, outputs)
        answers = self._by_block(self._teacher_logits(teacher, device, scores))
        with distributed.within(self.sharers), self._sketched():
            self.ledger.create(self.samples, answers, outputs=outputs, teacher=fingerprint, task=task, units=units)
            return whole_figures(scores, outputs)

    def _metric(self, outputs: int) -> PrefixMetric | None:
        """Metric of the validation part; None for the training part, which is not scored."""
        return prefix_metric(self.settings.task, outputs) if self.name == "val" else None

    @contextmanager
    def _sketched(self) -> Iterator[None]:
        """Context of a pass over all samples during which their sketches are written."""
        sketches = self.guard.sketches if self.guard else None
        if sketches is not None:
            sketches.begin()
        yield
        if sketches is not None and self._all_sketched():
            sketches.publish()

    def _all_sketched(self) -> bool:
        """Whether all processes compare sketches; none does if padding changes those of one."""
        assert self.guard is not None
        if not distributed.all_true(self.guard.sketches is not None):
            self.guard.sketches = None
        return self.guard.sketches is not None

    def _catch_up_samples(self) -> None:
        """Compares the samples with their fingerprints on disk; computes the fingerprints that are missing."""
        if self.guard is None:
            return
        self.guard.compare_stored()
        distributed.barrier()
        self.guard.store()
        sketches = self.guard.sketches
        if self._all_sketched() and not distributed.all_true(sketches is not None and sketches.exists()):
            with self._sketched():
                for x, y, index in self._batches(0):
                    self.guard.record(x, y, index)

    def catch_up(self, students: Sequence[nn.Module], device: torch.device, fingerprint: str) -> None:
        """Opens S after the committed students and the features that links may read; computes whatever is missing.

        Args:
            students: the committed students, in order.
            device: device to run them on.
            fingerprint: fingerprint of the teacher.

        Raises:
            UserError: the number of samples or the teacher differs from the start of the run.
            RunError: a file is torn.
        """
        with distributed.within(self.sharers):  # each disk that holds a copy is filled; sums count one copy
            self.ledger.open(self.samples, fingerprint)
            self._catch_up_samples()
            self._catch_up_errors(students, device)
            self._catch_up_features(students, device)

    def _catch_up_errors(self, students: Sequence[nn.Module], device: torch.device) -> None:
        if not distributed.all_true(self.ledger.has(len(students))):
            self.ledger.use(0)
            for number, student in enumerate(students):
                answers = self._by_block(self._student_logits(student.to(device), students[:number], device, None))
                self.ledger.advance(answers, eta=1.0, tolerance=0.0)
                self.ledger.publish()
                self.ledger.use(number + 1)
        self.ledger.use(len(students))

    @torch.no_grad()
    def _catch_up_features(self, students: Sequence[nn.Module], device: torch.device) -> None:
        shapes: dict[int, Shapes] = {}
        for number in linked_numbers(students, self.settings.cached_links):
            for student in students[: number + 1]:
                student.to(device)
            latest = number == linked_numbers(students, 1)[0]  # stages are only read from the latest student
            shapes[number] = self._cached_shapes(students, number, device, stages=latest)
            if not distributed.all_true(self.features.has(number, shapes[number])):
                self.features.begin(shapes[number])
                for x, _, index in self._batches(number):
                    moved = move_data_to_device(x, device)
                    self.features.write(int(index[0]), activations_of(students, number, moved))
                self.features.publish(number)
        self.features.use(shapes)

    def _cached_shapes(
        self, students: Sequence[nn.Module], number: int, device: torch.device, *, stages: bool = True
    ) -> Shapes:
        """Shapes, by key, of a student's activations for one sample that rounds read from the cache."""
        student = students[number]
        assert isinstance(student, Student)
        keys = self.settings.cached_keys(student) if stages else []
        shapes: dict[int, tuple[int, ...]] = {FEATURES: (student.width,)}
        if keys and self.fixed:
            ends = [range(1), range(self.samples - 1, self.samples)]
            batches = rows_loader(self.loader, ends, views=self.dataset_view)
            singles = [activations_of(students, number, move_data_to_device(x, device)) for x, _, _ in batches]
            found = {key: tuple(singles[0][key].shape[1:]) for key in keys}
            fit = all(_fits_cache(one[key], found[key]) for one in singles for key in keys)
            if fit and sum(map(prod, found.values())) <= MOST_CACHED:
                shapes |= found
        return shapes

    def score(
        self, student: nn.Module, earlier: Sequence[nn.Module], device: torch.device
    ) -> tuple[RoundEvidence, float, float]:
        """Evaluates a new student in one pass; writes S and its features beside those in use, see `publish`.

        Returns:
            The evidence, and accuracy and cross entropy (or the scores of another task) of the prefix that ends with
            the student; NaN on the training part, whose labels are not needed.

        Raises:
            RunError: a logit is NaN or infinite.
        """
        settings, scores = self.settings, self._metric(self.ledger.outputs)
        with distributed.within(self.sharers), eval_mode(student):
            if isinstance(student, Student):
                self.features.begin(self._cached_shapes([*earlier, student], len(earlier), device))
            answers = self._student_logits(student, earlier, device, scores, write=isinstance(student, Student))
            answers = self._by_block(answers)
            evidence = self.ledger.advance(answers, eta=settings.eta, tolerance=settings.margin_tolerance)
            return evidence, *whole_figures(scores, self.ledger.outputs)

    def publish(self, student: nn.Module, number: int) -> None:
        """Renames the files that `score` wrote for an accepted student to their final names."""
        with distributed.within(self.sharers):
            self.ledger.publish()
            if isinstance(student, Student):
                self.features.publish(number)

    def linked(
        self, places: Sequence[tuple[int, int]], index: np.ndarray[Any, Any], device: torch.device
    ) -> list[Tensor]:
        """Cached activations (B, ...) of samples, selected by (student, key), on the device."""
        return [rows.to(device, non_blocking=True) for rows in self.features.rows(places, index)]

    def _batches(self, number: int) -> DataLoader[Any]:
        """The rows of this process as (x, y, index): whole blocks in order, in batches of at most the user's size."""
        blocks = distributed.my_blocks(self.samples, BLOCK)
        rows = [
            range(start, min(start + self.batch_size, high))
            for low, high in blocks
            for start in range(low, high, self.batch_size)
        ]
        return rows_loader(self.loader, rows, seed=seed_of(self.seed, number, "score"), views=self.dataset_view)

    def _by_block(self, answers: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Regroups batches into blocks (first row, logits (rows, L)), so that sums do not depend on the batch size."""
        rows: list[Tensor] = []
        for low, logits in answers:
            rows.append(logits)
            end = low + len(logits)
            if end % BLOCK == 0 or end == self.samples:
                yield end - sum(map(len, rows)), torch.cat(rows)
                rows = []

    @torch.no_grad()
    def _teacher_logits(
        self, teacher: nn.Module, device: torch.device, scores: PrefixMetric | None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, teacher logits (rows, L)) batch by batch; updates `scores`."""
        table = table_of(teacher)
        for x, y, index in self._batches(0):
            if self.guard is not None:
                self.guard.record(x, y, index)
            check_finite(x, index, self.method)
            if table is None:
                logits = teacher(move_data_to_device(x, device)).float().cpu()
            else:
                logits = table.rows(self.name, index)
            if scores is not None:
                scores.update(logits[None], given_labels(self.settings.task, y, logits))
            yield int(index[0]), logits

    def add_scores(
        self, scores: PrefixMetric, logits: Tensor, target: Tensor, error: Tensor, earlier: int, y: Tensor | None
    ) -> Tensor:
        """Adds a batch of the prefix that ends with a student to a metric; returns the prefix's error to g (B, L).

        Args:
            scores: metric of the part, on the CPU like all tensors, as not all devices have the float64 of its sums.
            logits: of the student, (B, L).
            target: g, (B, L).
            error: S, (B, L).
            earlier: number of students before it.
            y: labels of the batch, if it has some.
        """
        miss = prefix_error(logits, target, error, earlier)
        prefix, teacher = (self.ledger.units.outward(part.double()) for part in (target + miss, target))
        scores.update(prefix[None], given_labels(self.settings.task, y, teacher))
        return miss

    @torch.no_grad()
    def _student_logits(
        self, student: nn.Module, earlier: Sequence[nn.Module], device: torch.device,
        scores: PrefixMetric | None, write: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        """(first row, student logits (rows, L)) batch by batch; updates `scores` with the prefix's logits."""
        read = sources(student, earlier)
        for x, y, index in self._batches(len(earlier)):
            moved = move_data_to_device(x, device)
            if write and isinstance(student, Student):
                # S must be exact; float16 activations are for training only.
                exact = self.settings.cached_links > 0 and not student.stage_reads
                linked = self.linked(read, index, device) if exact else linked_activations(student, earlier, moved)
                own = student.activations(moved, linked)
                self.features.write(int(index[0]), own)
                logits = student.answer(own[FEATURES], linked)
            else:
                logits = run_student(student, earlier, moved)
            logits = logits.float().cpu()
            if scores is not None:
                self.add_scores(scores, logits, *self.ledger.rows(index), self.ledger.version, y)
            yield int(index[0]), logits


def _fits_cache(activation: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether an activation of one sample fits float16: floating point, of shape (1, *shape), no value too large."""
    if not activation.is_floating_point() or tuple(activation.shape) != (1, *shape):
        return False
    return not activation.numel() or float(activation.abs().max()) <= LARGEST_CACHED
