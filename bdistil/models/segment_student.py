"""Early predictions on sequences: student t reads the t-th segment, starting from the state of student t - 1.

The features of such a student are its state after its segment. They reach the next student through the usual
links: detached, and cached by sample in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.student import Rung, Student, linkable


class SegmentStudent(Student):
    """A student that reads one segment of a sequence x (B, M, ...), starting from the state of the student before.

    x needs only `shape` and slicing: ``x[:, low:high]`` is read when the student runs, so later steps may still be
    missing at that time.

    Args:
        body: maps a segment (B, m, ...) and a state (B, D), None at the start, to the state (B, D) after it.
        head: maps a state (B, D) to logits (B, L).
        segments: number of segments of a sequence, and maximum number of rounds.
        features: D; needed only if the head is not nn.Linear.
        outputs: L; needed only if the head is not nn.Linear.

    Raises:
        UserError: `segments` < 1, or the head is not linear, and D or L was not given.

    Example:
        >>> import torch
        >>> from bdistil.models import StateBody
        >>> first, second = (SegmentStudent(StateBody(3, 8), nn.Linear(8, 5), segments=2) for _ in range(2))
        >>> second = second.link([first.link([], Rung())], Rung(links=1))
        >>> x = torch.randn(4, 20, 3)
        >>> second(x, [first.features(x)]).shape  # the first reads steps 0 to 9, the second 10 to 19
        torch.Size([4, 5])
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

    def link(self, earlier: Sequence[nn.Module], rung: Rung, x: Any = None) -> SegmentStudent:
        """Assigns a segment and links the state of the student before, through a linear layer if the widths differ.

        With a rung of one link only that state is read. More links, or another kind of link, also join the head.
        Without a link the body starts without a state.

        Raises:
            UserError: an earlier student is not a SegmentStudent, or no segment is left.
        """
        if strangers := [type(s).__name__ for s in earlier if not isinstance(s, SegmentStudent)]:
            raise UserError(f"Expected only SegmentStudents before a SegmentStudent, got {strangers[0]}.")
        if len(earlier) >= self.segments:
            raise UserError(f"Expected at most {self.segments} students for as many segments, got {len(earlier) + 1}.")
        self.number = len(earlier)
        states = linkable(earlier)[: rung.links]
        if len(states) > 1 or (states and rung.kind != "concat"):
            super().link(earlier, rung, x)
        self.links = len(states)
        self.states_read = min(1, self.links)
        if states and states[0].width != self.width:
            self.adapt = nn.Linear(states[0].width, self.width)
        return self

    def span(self, steps: int) -> tuple[int, int]:
        """First and last step (exclusive) of its segment in a sequence; segments differ by at most one step."""
        return self.number * steps // self.segments, (self.number + 1) * steps // self.segments

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
