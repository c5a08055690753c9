"""Stage-by-stage evaluation of a batch: one student after the other, or all bodies at once on stacked parameters."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.ensemble.budget import host
from bdistil.errors import UserError
from bdistil.models.stages import FEATURES
from bdistil.models.student import Student, sources
from bdistil.runner.confidence import Array
from bdistil.storage.blueprint import IndescribableError, describe
from bdistil.utils.trees import row_count, take_rows


def prefix_factor(scale: float | Tensor, weights: Sequence[float], count: int) -> float | Tensor:
    """Factor from the weighted sum of the logits of `count` students to the logits of that prefix.

    Args:
        scale: one unit of the students' logits in the teacher's units; one per output (L,) for real outputs.
        weights: weights of the students in the sum; empty for equal weights.
        count: number of students in the prefix.

    Example:
        >>> prefix_factor(6.0, (), 3), prefix_factor(6.0, (1.0, 3.0, 2.0), 2)
        (2.0, 1.5)
    """
    return scale / (sum(weights[:count]) if weights else count)


@dataclass(frozen=True)
class Stage:
    """Answer of a prefix.

    Attributes:
        total: (B, L), weighted sum of the logits of the individual students.
        factor: see `prefix_factor`.
        index: number of students in the prefix.
        macs: cumulative multiply-adds per sample.
        offset: (L,), added to real outputs.
    """

    total: Tensor
    factor: float | Tensor
    index: int
    macs: int
    offset: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """(B, L) of the prefix, in the teacher's units; computed on access."""
        logits = self.total * self.factor
        return logits if self.offset is None else logits + self.offset


class Wiring:
    """Activations that each student of an ensemble reads from earlier students.

    An activation is identified by the number of its student, from 0, and its key, see `bdistil.models.stages`.

    Attributes:
        reads: for each student, the activations it reads, in the order of its argument `linked`.
        gives: for each student, the keys of its activations that later students read.
        drops: for each student, the activations that no later student reads.
    """

    def __init__(self, students: Sequence[nn.Module]) -> None:
        self.reads = [sources(student, students[:number]) for number, student in enumerate(students)]
        last = {place: number for number, places in enumerate(self.reads) for place in places}
        self.gives = [sorted(key for giver, key in last if giver == number) for number in range(len(students))]
        self.drops = [[place for place in last if last[place] == number] for number in range(len(students))]


@contextmanager
def without_onednn() -> Iterator[None]:
    """Uses torch's own convolution kernels: with oneDNN, two samples of a tiny student take as long as sixteen.

    The switch is global to all threads. If it is off already, whoever turned it off restores it.
    """
    if not torch.backends.mkldnn.enabled:
        yield
        return
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


@dataclass(eq=False)
class StageRunner:
    """Runs the students on a batch, one per call; keeps their summed logits and the activations read by later students.

    Implements `bdistil.runner.exits.Stages`.

    Attributes, besides those of `ProgressiveEnsemble` and `Calibration`:
        x: a batch (B, ...), or a tuple or mapping of such tensors.
        native: largest batch size for which torch's own convolutions are used, see `without_onednn`.
        bodies: features (B, D) of all students, if already computed.
        totals: weighted sums (n, L) of the logits of the students that ran, by stage.
        owns: logits (n, L) of these students.
    """

    students: Sequence[nn.Module]
    wiring: Wiring
    x: Any
    scale: float | Tensor
    macs: Sequence[int]
    weights: Sequence[float] = ()
    offset: Tensor | None = None
    native: int = 0
    bodies: Sequence[Tensor] = ()
    activations: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    totals: list[Tensor] = field(default_factory=list)
    owns: list[Tensor] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Number of students that ran."""
        return len(self.totals)

    @property
    def size(self) -> int:
        """Number of samples in the batch; 1 before the first stage if x does not show it."""
        if self.totals:
            return self.totals[-1].shape[0]
        return row_count(self.x) if self.divisible else 1

    @cached_property
    def divisible(self) -> bool:
        """Whether rows can be selected from x: a tensor, or a tuple or mapping of tensors."""
        try:
            row_count(self.x)
        except UserError:
            return False
        return True

    def advance(self) -> None:
        """Runs the next student."""
        with without_onednn() if self.size <= self.native else nullcontext():
            self._advance()

    @torch.no_grad()
    def _advance(self) -> None:
        number, student = self.number, self.students[self.number]
        if isinstance(student, Student):
            linked = [self.activations[place] for place in self.wiring.reads[number]]
            own = {FEATURES: self.bodies[number]} if self.bodies else student.activations(self.x, linked)
            logits = student.answer(own[FEATURES], linked)
            self.activations.update(((number, key), own[key]) for key in self.wiring.gives[number])
            for place in self.wiring.drops[number]:
                del self.activations[place]
        else:
            logits = student(self.x)
        self.owns.append(logits)
        if self.weights:
            logits = logits * self.weights[number]
        self.totals.append(self.totals[-1] + logits if self.totals else logits)

    def advance_to(self, count: int) -> None:
        """Runs students until `count` of them have run."""
        while self.number < count:
            self.advance()

    def step(self) -> Stage:
        """Runs the next student and returns the answer of the prefix."""
        self.advance()
        return self.stage()

    def stage(self) -> Stage:
        """Answer of the current prefix to the batch."""
        factor = prefix_factor(self.scale, self.weights, self.number)
        return Stage(self.totals[-1], factor, self.number, self.macs[self.number - 1], self.offset)

    def total(self, number: int) -> Array:
        """Sum (n, L) of the logits of the students up to `number`, from 0, which has run; on the host."""
        return host(self.totals[number])

    def own(self, number: int) -> Array:
        """Logits (n, L) of student `number`, from 0, which has run; on the host."""
        return host(self.owns[number])

    @torch.no_grad()
    def keep(self, rows: Array) -> None:
        """Reduces the batch, the sum of the last stage and the activations to the given rows (m,)."""
        kept = torch.from_numpy(rows).to(self.totals[-1].device)
        self.x = take_rows(self.x, kept)
        self.totals[-1] = self.totals[-1].index_select(0, kept)
        self.activations = {place: values.index_select(0, kept) for place, values in self.activations.items()}
        self.bodies = [features.index_select(0, kept) for features in self.bodies]

    def close(self) -> None:
        """Does nothing."""


class _Features(nn.Module):
    """A student as a function from x to the features of its body."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Any) -> Tensor:
        return self.student.features(x)


ONE_CALL = threading.Lock()  # functional_call replaces the parameters of the template while it runs


class StackedBodies:
    """Bodies of students with identical architectures as one module on stacked parameters.

    Links join at the head, so the bodies of students that read no earlier state can run together; the heads then run
    one after the other. The logits equal those of the students run in order.

    Raises:
        UserError: the architectures of the students differ.
    """

    def __init__(self, students: Sequence[nn.Module]) -> None:
        self._students = _of_one_shape(students)
        self._template = _Features(deepcopy(self._students[0]))

    @torch.no_grad()
    def __call__(self, x: Any) -> tuple[Tensor, ...]:
        """Features (B, D) of each student."""
        stacked = torch.func.stack_module_state([student.body for student in self._students])
        named = [{f"student.body.{key}": value for key, value in tensors.items()} for tensors in stacked]

        def features(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            one: Tensor = torch.func.functional_call(self._template, (parameters, buffers), (x,))
            return one

        with ONE_CALL:
            return torch.unbind(torch.func.vmap(features)(*named))


def _of_one_shape(students: Sequence[nn.Module]) -> list[Student]:
    """Returns the students if their bodies differ only in tensor values; otherwise raises UserError."""
    same = [student for student in students if isinstance(student, Student) and not student.states_read]
    try:
        shapes = [_shape(student) for student in same]
    except IndescribableError:
        shapes = []
    if len(shapes) < len(students) or any(shape != shapes[0] for shape in shapes):
        raise UserError(
            "The schedule 'all' runs bodies of one shape together, and the students of this ensemble differ, or are no "
            "bdistil.Student. Take schedule='one'."
        )
    return same


def _shape(student: Student) -> tuple[Any, ...]:
    """Everything that the features depend on except the values of parameters and buffers."""
    plan, tensors = describe(student.body)
    stacked = {key for key, _ in (*student.body.named_parameters(), *student.body.named_buffers())}
    plain = {key: value for key, value in vars(student).items() if key[0] != "_" and key not in ("links", "join")}
    shapes = [(key, value.shape, value.dtype) for key, value in tensors.items()]
    others = {key: value.tolist() for key, value in tensors.items() if key not in stacked}
    return type(student), plain, plan, shapes, others


def time_of(device: torch.device) -> float:
    """Time in seconds, read after synchronising the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
