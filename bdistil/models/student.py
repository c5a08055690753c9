"""Students: a body, a head, and read-only links to the bodies of earlier students.

A student exports the activations of its body: its features, and those after its stages, if any. Links to features
join at the head, so such a link to student t - 1 costs only the body of t - 1. Links to activations enter the body. A
prefix of the ensemble does not change when later students are added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.inputs import call_on
from bdistil.models.stages import FEATURES, StagedBody, check_stages
from bdistil.utils.modules import eval_mode

LinkKind = Literal["concat", "residual", "hidden", "deep", "start"]
KINDS = get_args(LinkKind)


@dataclass(frozen=True)
class Rung:
    """One class of students on the ladder F_0 … F_R; a round that makes no progress moves to the next rung.

    Attributes:
        links: number of most recent students that a student reads; fewer in the first rounds.
        kind: `concat` joins their features into the linear head, `residual` adds a projection of them to the student's
            own features, `hidden` joins both through a hidden layer. `deep` and `start` are for students made of stages
            and read only the student before, `links=1`, whose features join the head as for `concat`. `deep` adds a
            projection of its activation to the student's own after each stage but the last. `start` replaces the first
            `at` stages by its activation after `at` stages: the student computes only the stages from there on.
        hidden: width of the hidden layer for `hidden`.
        at: number of stages that are replaced; with `deep`, the student starts there and projects later activations.
        width: factor on the student's own width, passed to `make_student(round, width=...)` where it is not 1.

    Raises:
        UserError: a value is out of its range.

    Example:
        >>> Rung(2, "hidden", width=1.5).name, Rung(1, "start", at=2).name
        ('F2-hidden x1.5', 'F1-start2')
    """

    links: int = 0
    kind: LinkKind = "concat"
    hidden: int = 32
    width: float = 1.0
    at: int = 0

    def __post_init__(self) -> None:
        if self.links < 0:
            raise UserError(f"Expected `links` of a rung to be >= 0, got {self.links}.")
        if self.kind not in KINDS:
            raise UserError(f"Expected `kind` of a rung to be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}.")
        if self.reads_stages and self.links != 1:
            raise UserError(f"Expected `links` of a rung of kind {self.kind!r} to be 1, got {self.links}.")
        least, most = {"start": (1, math.inf), "deep": (0, math.inf)}.get(self.kind, (0, 0))
        if not least <= self.at <= most:
            raise UserError(
                f"Expected `at` of a rung to be >= 1 for kind 'start', >= 0 for 'deep' and 0 for others, got {self.at} "
                f"with kind {self.kind!r}. It is the number of stages that the earlier student's activation replaces."
            )
        if self.hidden < 1 or self.width <= 0:
            raise UserError(f"Expected `hidden` >= 1 and `width` > 0 of a rung, got {self.hidden} and {self.width}.")

    @property
    def reads_stages(self) -> bool:
        """Whether it reads activations after stages, and not only features."""
        return self.kind in ("deep", "start")

    def may_read(self, key: int) -> bool:
        """Whether it may read the earlier student's activation of a key, see `bdistil.models.stages`."""
        return key == self.at - 1 if self.kind == "start" else self.kind == "deep" and key >= self.at - 1

    @property
    def name(self) -> str:
        """Short name for tables: F0, F1, F2-hidden, F1 x1.5, F1-deep, F1-start2."""
        kind = f"-{self.kind}{self.at or ''}" if self.links and self.kind != "concat" else ""
        return f"F{self.links}{kind}" + (f" x{self.width:g}" if self.width != 1 else "")


class Join(nn.Module):
    """Layers that feed the linked features (B, D) of earlier students into a student."""

    def __init__(self, own: int, linked: Sequence[int], outputs: int, rung: Rung) -> None:
        super().__init__()
        self.kind = rung.kind
        total = sum(linked)
        if rung.kind == "concat" or rung.reads_stages:
            # With a linear head this is exactly a head over the concatenation.
            self.project: nn.Module = nn.Linear(total, outputs, bias=False)
        elif rung.kind == "residual":
            self.project = nn.Linear(total, own)
        else:
            self.project = nn.Sequential(
                nn.Linear(own + total, rung.hidden), nn.ReLU(), nn.Linear(rung.hidden, outputs)
            )

    def forward(self, features: Tensor, linked: Tensor) -> Tensor:
        """Term to add to the features (B, D) for `residual`, to the logits (B, L) for the other kinds."""
        joined: Tensor = self.project(torch.cat((features, linked), 1) if self.kind == "hidden" else linked)
        return joined


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channels times a factor, rounded, at least 1 each; channels below 1 stay as they are, for the caller to refuse.

    Raises:
        UserError: the factor is not positive.
    """
    if not width > 0:
        raise UserError(f"Expected `width` of a student to be > 0, got {width}.")
    return [max(1, round(count * width)) if count > 0 else count for count in channels]


class Student(nn.Module):
    """A network of a body and a head that can be linked to the bodies of earlier students.

    Args:
        body: maps x (B, ...) to features (B, D); see `call_on` for x of several parts.
        head: maps features (B, D) to logits (B, L).
        stages: instead of `body`, modules that run in sequence, the last of which returns features (B, D).
            Later students may read the activation after each of them, see `Rung`.
        features: D; needed only if the head is not nn.Linear.
        outputs: L; needed only if the head is not nn.Linear.

    Attributes:
        width: D.
        links: number of earlier students whose features it reads.
        stage_reads: keys of the activations of the student before that its stages read, see `bdistil.models.stages`.
        states_read: number of linked tensors that enter its body.
        most_rounds: maximum number of such students in a run; None: no limit.

    Raises:
        UserError: both body and stages were given, or neither; or the head is not linear, and D or L is missing.

    Example:
        >>> first = Student(nn.Linear(4, 8), nn.Linear(8, 3))
        >>> second = Student(nn.Linear(4, 6), nn.Linear(6, 3)).link([first], Rung(links=1))
        >>> x = torch.randn(5, 4)
        >>> second(x, [first.features(x)]).shape
        torch.Size([5, 3])
        >>> run_student(second, [first], x).shape  # reads the features of the earlier students itself
        torch.Size([5, 3])
        >>> def staged() -> Student:
        ...     return Student(stages=[nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)], head=nn.Linear(6, 3))
        >>> first, second = staged(), staged()
        >>> _ = second.link([first], Rung(1, "start", at=1), x)  # reads the first one's 8 numbers, not x
        >>> [parameter.numel() for parameter in second.body.parameters()]
        [48, 6]
    """

    states_read = 0
    stage_reads: Sequence[int] = ()
    most_rounds: int | None = None

    def __init__(
        self,
        body: nn.Module | None = None,
        head: nn.Module | None = None,
        *,
        stages: Sequence[nn.Module] = (),
        features: int | None = None,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if head is None or (body is None) == (not stages):
            given = [name for name, value in (("body", body), ("stages", stages), ("head", head)) if value]
            raise UserError(f"Expected Student(body, head) or Student(stages=[...], head=...), got {given}.")
        self.body, self.head = StagedBody(stages) if body is None else body, head
        linear = head if isinstance(head, nn.Linear) else None
        if isinstance(head, nn.LazyLinear) and features is None and not head.in_features:
            raise UserError(
                "Expected a head whose size is known, got LazyLinear without `features`: links to this student need "
                "it. Give nn.Linear(D, L), or Student(body, head, features=D)."
            )
        if linear is None and (features is None or outputs is None):
            raise UserError(
                f"Expected `features` and `outputs` beside a head that is not nn.Linear, got "
                f"{type(head).__name__} with features={features}, outputs={outputs}. "
                "Give Student(body, head, features=D, outputs=L)."
            )
        self.width = int(features if features is not None else linear.in_features)  # type: ignore[union-attr]
        self.outputs = int(outputs if outputs is not None else linear.out_features)  # type: ignore[union-attr]
        self.links = 0
        self.join: Join | None = None

    def link(self, earlier: Sequence[nn.Module], rung: Rung, x: Any = None) -> Student:
        """Adds links to the most recent of the earlier students, at most `rung.links`, and returns the student itself.

        Call it before training. Without stages on both sides, `deep` and `start` link to features, as `concat` does.

        Args:
            earlier: the students before this one, in order.
            rung: kind and number of the links.
            x: a batch (B, ...) as an example; needed by rungs that read activations after stages.

        Raises:
            UserError: the stages of the two students do not fit together, or x is missing.
        """
        if linked := linkable(earlier)[: rung.links]:
            self.join = Join(self.width, [s.width for s in linked], self.outputs, rung)
            self.links = len(linked)
            if rung.reads_stages and self.staged is not None and linked[0].staged is not None:
                self._link_stages(self.staged, earlier, rung, x)
        return self

    def _link_stages(self, body: StagedBody, earlier: Sequence[nn.Module], rung: Rung, x: Any) -> None:
        if x is None:
            raise UserError(f"Expected an example `x` beside a rung of kind {rung.kind!r}: link(earlier, rung, x).")
        with eval_mode(nn.ModuleList(earlier)):  # earlier students stay as they are, batch norm too
            given = activations_of(earlier, linked_numbers(earlier, 1)[0], x)
        start = given.get(rung.at - 1) if rung.at else None
        if rung.at and (start is None or rung.at >= len(body.stages)):
            raise UserError(
                f"Expected `at` of the rung to be a stage of the student before and not the last of this one's "
                f"{len(body.stages)}, got {rung.at}; the one before has activations after stages "
                f"{[key + 1 for key in given if key != FEATURES]}."
            )
        if start is not None:
            body.begin_at(rung.at)
            body.refinement = self.refinement(start)
        check_stages(body, x if start is None else start.clone())
        if rung.kind == "deep":
            body.project(given, x, () if start is None else (start,))
        self.stage_reads = body.reads
        self.states_read = len(self.stage_reads)

    def refinement(self, activation: Tensor) -> nn.Module | None:
        """Override to insert a module between an earlier student's activation and the stages that start from it.

        None by default. The output (B, ...) enters the student's own stages, and a later student may start from it.
        """
        return None

    @property
    def staged(self) -> StagedBody | None:
        """The body, if it is made of stages that later students may read.

        None for a class that overrides `features`, as its additions to the stages would be skipped.
        """
        own = type(self).features is Student.features
        return self.body if own and isinstance(self.body, StagedBody) else None

    @property
    def reads(self) -> list[tuple[int, int]]:
        """The tensors it reads from earlier students, as (students back, key), in the order of `linked`.

        The key is that of the activation after a stage, or `bdistil.models.stages.FEATURES`.
        """
        return [(1, key) for key in self.stage_reads] + [(back, FEATURES) for back in range(1, self.links + 1)]

    def features(self, x: Any, linked: Sequence[Tensor] = ()) -> Tensor:
        """Features (B, D) of the body, before links join at the head. The first `states_read` of `linked` enter it."""
        if self.staged is not None:
            return self._checked(self.staged(x, linked[: self.states_read]))
        return self._checked(call_on(self.body, x))

    def activations(self, x: Any, linked: Sequence[Tensor] = ()) -> dict[int, Tensor]:
        """Tensors that later students can read, by key: features (B, D), and the activations after stages."""
        if self.staged is None:
            return {FEATURES: self.features(x, linked)}
        found = self.staged.activations(x, linked[: self.states_read])
        self._checked(found[FEATURES])
        return found

    def _checked(self, features: Tensor) -> Tensor:
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.width:
            got = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise UserError(
                f"Expected the student's body to return features (B, {self.width}), got {got}. "
                "End the body with a flatten or a pooling, or give `features`."
            )
        return features

    def answer(self, features: Tensor, linked: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, L) from its own features (B, D) and those of the linked students, the last `links` of `linked`."""
        if self.join is None:
            logits: Tensor = self.head(features)
            return logits
        joining = tuple(linked)[-self.links :]
        joined = self.join(features, torch.cat(joining, 1) if len(joining) > 1 else joining[0])
        residual = self.join.kind == "residual"
        answer: Tensor = self.head(features + joined) if residual else self.head(features) + joined
        return answer

    def forward(self, x: Any, linked: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, L); `linked` holds the tensors named by `reads`, in that order."""
        return self.answer(self.features(x, linked), linked)


def links_of(student: nn.Module) -> int:
    """Number of earlier students that a student reads; 0 for any other module."""
    return student.links if isinstance(student, Student) else 0


def linkable(earlier: Sequence[nn.Module]) -> list[Student]:
    """The earlier students that export features, the most recent first."""
    return [s for s in reversed(earlier) if isinstance(s, Student)]


def linked_numbers(earlier: Sequence[nn.Module], links: int) -> list[int]:
    """Round numbers of the earlier students that a student with `links` links reads, the most recent first."""
    return [number for number in reversed(range(len(earlier))) if isinstance(earlier[number], Student)][:links]


def sources(student: nn.Module, earlier: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Round number and key of each tensor a student reads, in the order of `linked`; see `Student.reads`."""
    if not isinstance(student, Student):
        return []
    numbers = linked_numbers(earlier, student.links)
    return [(numbers[back - 1], key) for back, key in student.reads if back <= len(numbers)]


@torch.no_grad()
def linked_activations(student: nn.Module, earlier: Sequence[nn.Module], x: Any) -> list[Tensor]:
    """Detached activations of the earlier students that a student reads. Each body runs once."""
    made: dict[int, dict[int, Tensor]] = {}
    return [activations_of(earlier, number, x, made)[key] for number, key in sources(student, earlier)]


@torch.no_grad()
def activations_of(
    students: Sequence[nn.Module], number: int, x: Any, made: dict[int, dict[int, Tensor]] | None = None
) -> dict[int, Tensor]:
    """Detached activations of a student by key, computed after those of earlier students that its body reads.

    Args:
        students: all students in order.
        number: position of the student, from 0.
        x: a batch (B, ...).
        made: activations already computed on x, by number; new ones are added.
    """
    made = {} if made is None else made
    if number not in made:
        student, earlier = students[number], students[:number]
        assert isinstance(student, Student)
        read = sources(student, earlier)[: student.states_read]
        made[number] = student.activations(x, [activations_of(earlier, n, x, made)[key] for n, key in read])
    return made[number]


def run_all(students: Sequence[nn.Module], x: Any) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
    """Logits (B, L) and activations by key of each student; every body runs once.

    Gradients pass through the links. A module that is not a `Student` has no activations.
    """
    answers: list[Tensor] = []
    made: list[dict[int, Tensor]] = []
    for number, student in enumerate(students):
        if isinstance(student, Student):
            linked = [made[n][key] for n, key in sources(student, students[:number])]
            made.append(student.activations(x, linked))
            answers.append(student.answer(made[-1][FEATURES], linked))
        else:
            made.append({})
            answers.append(student(x))
    return answers, made


def run_student(student: nn.Module, earlier: Sequence[nn.Module], x: Any) -> Tensor:
    """Logits (B, L) of a student, which may read earlier ones; gradients reach this student only."""
    logits: Tensor = student(x, linked_activations(student, earlier, x)) if links_of(student) else student(x)
    return logits


def link_macs(by_module: Mapping[str, int]) -> int:
    """Multiply-adds of the links of a student, from those of its submodules, see `bdistil.metrics.cost.Cost`."""
    link = re.compile(r"join|adapt|body\.projections\.\d+")
    return sum(macs for name, macs in by_module.items() if link.fullmatch(name))


def build_student(
    make: Callable[..., nn.Module], number: int, earlier: Sequence[nn.Module], rung: Rung, x: Any = None
) -> nn.Module:
    """Makes a new student with the user's `make_student(round)`, and links it.

    If the rung's width is not 1, `make_student(round, width=...)` is called; rounds count from 0. `x` is an example.

    Raises:
        UserError: the function did not return a module.
    """
    student = make(number) if rung.width == 1 else make(number, width=rung.width)
    if not isinstance(student, nn.Module):
        raise UserError(f"Expected `student` to return a torch.nn.Module, got {type(student).__name__}.")
    if isinstance(student, Student) and not links_of(student):
        student.link(earlier, rung, x)
    return student
