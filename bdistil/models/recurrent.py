"""Recurrent networks for sequences (B, M, C) of M steps and C channels, as teachers and as students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.convnets import Classifier
from bdistil.models.segment_student import SegmentStudent
from bdistil.models.student import Rung, Student, linkable, scaled

Cell = Literal["gru", "lstm", "rnn"]
_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


def _rnn(cell: str, in_channels: int, hidden: int, layers: int = 1, bidirectional: bool = False) -> nn.RNNBase:
    if cell not in get_args(Cell) or min(in_channels, hidden, layers) < 1:
        raise UserError(
            f"Expected `cell` to be one of {', '.join(get_args(Cell))}, and `in_channels`, `hidden` and `layers` "
            f">= 1, got {cell!r}, {in_channels}, {hidden} and {layers}."
        )
    return _CELLS[cell](in_channels, hidden, layers, batch_first=True, bidirectional=bidirectional)


class RecurrentBody(nn.Module):
    """A recurrent network; returns the output of its top layer after the last step. D is H, or 2 H if bidirectional.

    Raises:
        UserError: an unknown cell, or a number below 1.
    """

    def __init__(
        self, in_channels: int, hidden: int, cell: Cell = "gru", layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.net = _rnn(cell, in_channels, hidden, layers, bidirectional)
        self.directions = 2 if bidirectional else 1
        self.features = self.directions * hidden

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Features (B, D) of sequences (B, M, C), from a state (B, H) of one layer, or from zeros."""
        start = None if state is None else state[None].contiguous()
        if start is not None and isinstance(self.net, nn.LSTM):
            start = (start, torch.zeros_like(start))  # type: ignore[assignment]
        state = self.net(x, start)[1]
        last: Tensor = state[0] if isinstance(state, tuple) else state
        return last[-self.directions :].transpose(0, 1).flatten(1)


class RecurrentNet(Classifier):
    """A recurrent classifier of sequences (B, M, C), as a teacher.

    Args:
        in_channels: C.
        outputs: L.
        hidden: H, hidden size of each layer and direction.
        cell: ``gru``, ``lstm`` or ``rnn``.
        layers: number of layers.
        bidirectional: run over the sequence from both ends.
        dropout: probability of the dropout before the head.
        noise: standard deviation of Gaussian noise added to the input in training.

    Example:
        >>> RecurrentNet(in_channels=3, outputs=5, cell="lstm")(torch.zeros(2, 20, 3)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        hidden: int = 64,
        cell: Cell = "gru",
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.2,
        noise: float = 0.0,
    ) -> None:
        body = RecurrentBody(in_channels, hidden, cell, layers, bidirectional)
        super().__init__(body, body.features, outputs, dropout, noise)


class RecurrentStudent(Student):
    """A tiny recurrent student for sequences (B, M, C), with a linear head.

    With a rung of the kind `deep` it starts from a projection of the last state of the student before.

    Args:
        in_channels: C.
        outputs: L.
        hidden: H, hidden size.
        cell: ``gru``, ``lstm`` or ``rnn``.
        width: factor on `hidden`, for wider rungs of the ladder.

    Example:
        >>> RecurrentStudent(in_channels=3, outputs=5).features(torch.zeros(2, 20, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_channels: int, outputs: int, hidden: int = 4, cell: Cell = "gru", width: float = 1.0) -> None:
        body = RecurrentBody(in_channels, scaled([hidden], width)[0], cell)
        super().__init__(body, nn.Linear(body.features, outputs))
        self.adapt: nn.Module | None = None

    def link(self, earlier: Sequence[nn.Module], rung: Rung, x: Any = None) -> RecurrentStudent:
        """Adds links; `deep` also feeds the state of the student before, its features, into the body."""
        super().link(earlier, rung, x)
        if rung.kind == "deep" and self.links:
            self.states_read, self.adapt = 1, nn.Linear(linkable(earlier)[0].width, self.width)
        return self

    def features(self, x: Any, linked: Sequence[Tensor] = ()) -> Tensor:
        """Features (B, D) of sequences (B, M, C), from the state of the student before, first of `linked`, if read."""
        state = self.adapt(linked[0]) if self.states_read and self.adapt is not None else None
        return self._checked(self.body(x, state))


class StateBody(nn.Module):
    """One recurrent layer that maps a state to the state after some steps; D is H, or 2 H for an LSTM.

    Args:
        in_channels: C.
        hidden: H, hidden size.
        cell: ``gru``, ``lstm`` or ``rnn``.

    Raises:
        UserError: an unknown cell, or a number below 1.

    Example:
        >>> body = StateBody(in_channels=3, hidden=4)
        >>> state = body(torch.zeros(2, 10, 3))
        >>> body(torch.zeros(2, 10, 3), state).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_channels: int, hidden: int, cell: Cell = "gru") -> None:
        super().__init__()
        self.net = _rnn(cell, in_channels, hidden)
        self.features = hidden * (2 if cell == "lstm" else 1)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """State (B, D) after the steps of x (B, m, C), from the given state (B, D) or from zeros."""
        if isinstance(self.net, nn.LSTM):
            start = None if state is None else tuple(half.contiguous()[None] for half in state.chunk(2, 1))
            return torch.cat(self.net(x, start)[1], -1)[0]
        final: Tensor = self.net(x, None if state is None else state[None])[1]
        return final[0]


class RecurrentSegmentStudent(SegmentStudent):
    """A tiny recurrent student for early predictions: reads one segment, starting from the state of the student before.

    Args:
        in_channels: C.
        outputs: L.
        segments: number of segments of a sequence, and maximum number of rounds.
        hidden: H, hidden size.
        cell: ``gru``, ``lstm`` or ``rnn``.
        width: factor on `hidden`, for wider rungs of the ladder.

    Example:
        >>> student = RecurrentSegmentStudent(in_channels=3, outputs=5, segments=4)
        >>> student.features(torch.zeros(2, 20, 3)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        segments: int,
        hidden: int = 8,
        cell: Cell = "gru",
        width: float = 1.0,
    ) -> None:
        body = StateBody(in_channels, scaled([hidden], width)[0], cell)
        super().__init__(body, nn.Linear(body.features, outputs), segments)
