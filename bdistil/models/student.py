"""Students: a body, a head, and read-only links to the bodies of earlier students.

A student exports the features of its body *before* links join. So a link to student t - 1 costs the body of t - 1 and
nothing more, and a prefix of the ensemble does not change when later students are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.inputs import call_on

LinkKind = Literal["concat", "residual", "hidden"]


@dataclass(frozen=True)
class Rung:
    """One class of students on the ladder F_0 … F_R; a round that makes no progress moves to the next rung.

    Attributes:
        links: number of most recent students that a student reads; fewer in the first rounds.
        kind: `concat` joins their features into the linear head, `residual` adds a projection of them to the student's
            own features, `hidden` joins both through a hidden layer.
        hidden: width of the hidden layer of `hidden`.
        width: factor on the student's own width, passed to `make_student(round, width=...)` where it is not 1.

    Raises:
        UserError: a value is out of its range.

    Example:
        >>> Rung(2, "hidden", width=1.5).name
        'F2-hidden x1.5'
    """

    links: int = 0
    kind: LinkKind = "concat"
    hidden: int = 32
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.links < 0:
            raise UserError(f"Expected `links` of a rung to be >= 0, got {self.links}.")
        if self.kind not in ("concat", "residual", "hidden"):
            raise UserError(
                f"Expected `kind` of a rung to be one of 'concat', 'residual', 'hidden', got {self.kind!r}."
            )
        if self.hidden < 1 or self.width <= 0:
            raise UserError(f"Expected `hidden` >= 1 and `width` > 0 of a rung, got {self.hidden} and {self.width}.")

    @property
    def name(self) -> str:
        """Short name for tables: F0, F1, F2-hidden, F1 x1.5."""
        kind = f"-{self.kind}" if self.links and self.kind != "concat" else ""
        return f"F{self.links}{kind}" + (f" x{self.width:g}" if self.width != 1 else "")


class Join(nn.Module):
    """Layers by which the linked features of earlier students (B, D) enter a student."""

    def __init__(self, own: int, linked: Sequence[int], outputs: int, rung: Rung) -> None:
        super().__init__()
        self.kind = rung.kind
        total = sum(linked)
        if rung.kind == "concat":
            # With a linear head this is exactly a head over the concatenation.
            self.project: nn.Module = nn.Linear(total, outputs, bias=False)
        elif rung.kind == "residual":
            self.project = nn.Linear(total, own)
        else:
            self.project = nn.Sequential(
                nn.Linear(own + total, rung.hidden), nn.ReLU(), nn.Linear(rung.hidden, outputs)
            )

    def forward(self, features: Tensor, linked: Tensor) -> Tensor:
        """Term to add to the logits (B, L) for `concat` and `hidden`, to the features (B, D) for `residual`."""
        joined: Tensor = self.project(torch.cat((features, linked), 1) if self.kind == "hidden" else linked)
        return joined


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channels times a factor, rounded, at least 1 each."""
    return [max(1, round(count * width)) for count in channels]


class Student(nn.Module):
    """A network of a body and a head that can be linked to the bodies of earlier students.

    Args:
        body: maps x (B, ...) to features (B, D); a mapping x is given by keywords where `forward` names its keys.
        head: maps features (B, D) to logits (B, L).
        features: D; needed only if the head is not nn.Linear.
        outputs: L; needed only if the head is not nn.Linear.

    Attributes:
        width: D.
        links: number of earlier students that it reads.
        states_read: number of linked features that its body starts from, see `bdistil.models.segment_student`.
        most_rounds: maximum number of such students in a run; None: no limit.

    Raises:
        UserError: the head is not linear, and D or L was not given.

    Example:
        >>> first = Student(nn.Linear(4, 8), nn.Linear(8, 3))
        >>> second = Student(nn.Linear(4, 6), nn.Linear(6, 3)).link([first], Rung(links=1))
        >>> x = torch.randn(5, 4)
        >>> second(x, [first.features(x)]).shape
        torch.Size([5, 3])
        >>> run_student(second, [first], x).shape  # reads the features of the earlier students itself
        torch.Size([5, 3])
    """

    states_read = 0
    most_rounds: int | None = None

    def __init__(
        self, body: nn.Module, head: nn.Module, *, features: int | None = None, outputs: int | None = None
    ) -> None:
        super().__init__()
        self.body, self.head = body, head
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

    def link(self, earlier: Sequence[nn.Module], rung: Rung) -> Student:
        """Adds links to the most recent of the earlier students, at most `rung.links`, and returns the student itself.

        Call it before training; `earlier` has the students before this one, in order.
        """
        if linked := linkable(earlier)[: rung.links]:
            self.join = Join(self.width, [s.width for s in linked], self.outputs, rung)
            self.links = len(linked)
        return self

    def features(self, x: Any, linked: Sequence[Tensor] = ()) -> Tensor:
        """Features (B, D) of the body, before links join. The first `states_read` of `linked` enter the body."""
        return self._checked(call_on(self.body, x))

    def _checked(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.width:
            raise UserError(
                f"Expected the student's body to return features (B, {self.width}), got {tuple(features.shape)}. "
                "End the body with a flatten or a pooling, or give `features`."
            )
        return features

    def answer(self, features: Tensor, linked: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, L) from its own features (B, D) and those of the linked students, the most recent first."""
        if self.join is None:
            logits: Tensor = self.head(features)
            return logits
        joined = self.join(features, torch.cat(tuple(linked), 1) if len(linked) > 1 else linked[0])
        residual = self.join.kind == "residual"
        answer: Tensor = self.head(features + joined) if residual else self.head(features) + joined
        return answer

    def forward(self, x: Any, linked: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, L); `linked` holds features (B, D) of the linked students, the most recent first."""
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


def linked_features(student: nn.Module, earlier: Sequence[nn.Module], x: Any) -> list[Tensor]:
    """Detached features (B, D) of the earlier students that a student reads, the most recent first."""
    return [features_of(earlier, number, x) for number in linked_numbers(earlier, links_of(student))]


@torch.no_grad()
def features_of(students: Sequence[nn.Module], number: int, x: Any) -> Tensor:
    """Detached features (B, D) of a student, after those of earlier students that its body starts from."""
    student = students[number]
    assert isinstance(student, Student)
    earlier = students[:number]
    return student.features(x, [features_of(earlier, n, x) for n in linked_numbers(earlier, student.states_read)])


def run_student(student: nn.Module, earlier: Sequence[nn.Module], x: Any) -> Tensor:
    """Logits (B, L) of a student, which may read earlier ones; gradients reach this student only."""
    logits: Tensor = student(x, linked_features(student, earlier, x)) if links_of(student) else student(x)
    return logits


def build_student(make: Callable[..., nn.Module], number: int, earlier: Sequence[nn.Module], rung: Rung) -> nn.Module:
    """Makes a new student with the user's `make_student(round)`, and links it.

    For a rung of another width `make_student(round, width=...)` is called; rounds count from 0.

    Raises:
        UserError: the function did not return a module.
    """
    student = make(number) if rung.width == 1 else make(number, width=rung.width)
    if not isinstance(student, nn.Module):
        raise UserError(f"Expected `student` to return a torch.nn.Module, got {type(student).__name__}.")
    if isinstance(student, Student) and not links_of(student):
        student.link(earlier, rung)
    return student
