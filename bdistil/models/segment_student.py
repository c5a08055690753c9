"""Early answers on sequences: student t reads the t-th segment of the steps, from the state that student t-1 left.

The features of such a student are its state after its segment. They are handed over by the links that every student
has: detached, cached by sample in training, and never changed by those who read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.student import Rung, Student, linkable


def segment_of(number: int, segments: int, steps: int) -> tuple[int, int]:
    """First and last step (exclusive) of a segment: equal parts of a sequence, up to one step.

    Args:
        number: of the segment, from 0.
        segments: how many there are.
        steps: M, of the sequence.
    """
    return number * steps // segments, (number + 1) * steps // segments


class SegmentStudent(Student):
    """A student that reads one segment of a sequence x (B, M, ...), from the state of the student before.

    Any x will do that has a `shape` and can be sliced: ``x[:, low:high]`` is asked for when the student runs, and the
    later steps need not be there yet.

    Args:
        body: maps a segment (B, m, ...) and a state (B, D), None at the start, to the state (B, D) after it.
        head: maps a state (B, D) to logits (B, L).
        segments: into how many the sequence is cut; a run has as many rounds at most.
        features: D; read off a linear head where it is not given.
        outputs: L; read off a linear head where it is not given.

    Raises:
        UserError: `segments` < 1, or D or L can not be read off the head and was not given.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        segments: int,
        *,
        features: int | None = None,
        outputs: int | None = None,
    ) -> None:
        super().__init__(body, head, features=features, outputs=outputs)
        if segments < 1:
            raise UserError(f"Expected `segments` to be >= 1, got {segments}.")
        self.segments = self.most_rounds = segments
        self.number = 0
        self.adapt: nn.Module | None = None

    def link(self, earlier: Sequence[nn.Module], rung: Rung) -> SegmentStudent:
        """Takes its segment and the state of the student before, through a linear layer where the widths differ.

        A rung of one link is that state alone. More links, or a joint layer, also join the head; without a link the
        student starts from nothing.

        Args:
            earlier: the students before this one, in order.
            rung: the class.

        Raises:
            UserError: an earlier student is of another kind, or none of the segments is left.
        """
        if strangers := [type(s).__name__ for s in earlier if not isinstance(s, SegmentStudent)]:
            raise UserError(f"Expected only SegmentStudents before a SegmentStudent, got {strangers[0]}.")
        if len(earlier) >= self.segments:
            raise UserError(f"Expected at most {self.segments} students for as many segments, got {len(earlier) + 1}.")
        self.number = len(earlier)
        states = linkable(earlier)[: rung.links]
        if len(states) > 1 or (states and rung.kind != "concat"):
            super().link(earlier, rung)
        self.links = len(states)
        self.states_read = min(1, self.links)
        if states and states[0].width != self.width:
            self.adapt = nn.Linear(states[0].width, self.width)
        return self

    def span(self, steps: int) -> tuple[int, int]:
        """First and last step (exclusive) that the student reads of a sequence of so many."""
        return segment_of(self.number, self.segments, steps)

    def features(self, x: Any, linked: Sequence[Tensor] = ()) -> Tensor:
        """State (B, D) after the segment, from the state of the student before, first of `linked`.

        Raises:
            UserError: x has fewer steps than there are segments.
        """
        if len(x.shape) < 2 or x.shape[1] < self.segments:
            raise UserError(
                f"Expected x (B, M, ...) of M >= {self.segments} steps for as many segments, got {tuple(x.shape)}. "
                "Give fewer `segments`."
            )
        low, high = self.span(x.shape[1])
        state = linked[0] if self.states_read else None
        if state is not None and self.adapt is not None:
            state = self.adapt(state)
        return self._checked(self.body(x[:, low:high], state))
