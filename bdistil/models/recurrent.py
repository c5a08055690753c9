"""Networks for sequences (B, M, C) of M steps with C channels: convolutional and recurrent, teachers and students."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.layers import SequenceClassifier, scaled
from bdistil.models.segment_student import SegmentStudent
from bdistil.models.student import Student

Cell = Literal["gru", "lstm", "rnn"]
_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


def _check_recurrent(cell: str, in_channels: int, hidden: int, layers: int) -> None:
    if cell not in get_args(Cell) or min(in_channels, hidden, layers) < 1:
        raise UserError(
            f"Expected `cell` to be one of {', '.join(get_args(Cell))}, and `in_channels`, `hidden` and `layers` "
            f">= 1, got {cell!r}, {in_channels}, {hidden} and {layers}."
        )


class RecurrentBody(nn.Module):
    """A recurrent net up to the output of its top layer after the last step.

    Args:
        in_channels: C of the sequence.
        hidden: H, of each layer and direction.
        cell: kind of net.
        layers: how many.
        bidirectional: reads the sequence from both ends; D is then 2 H.
    """

    def __init__(
        self, in_channels: int, hidden: int, cell: Cell = "gru", layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__()
        _check_recurrent(cell, in_channels, hidden, layers)
        self.net = _CELLS[cell](in_channels, hidden, layers, batch_first=True, bidirectional=bidirectional)
        self.directions = 2 if bidirectional else 1
        self.features = self.directions * hidden

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) of sequences (B, M, C)."""
        state = self.net(x)[1]
        last: Tensor = state[0] if isinstance(state, tuple) else state
        return last[-self.directions :].transpose(0, 1).flatten(1)


class RecurrentNet(SequenceClassifier):
    """A recurrent classifier of sequences, as a teacher.

    Args:
        in_channels: C of the sequence.
        outputs: L.
        hidden: H, of each layer and direction.
        cell: kind of net.
        layers: how many.
        bidirectional: reads the sequence from both ends.
        dropout: before the head.
        noise: standard deviation of what is added to the input in training.
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
    """A tiny recurrent student with a linear head.

    Args:
        in_channels: C of the sequence.
        outputs: L.
        hidden: H.
        cell: kind of net.
        width: factor on `hidden`, for wider rungs of the ladder.
    """

    def __init__(self, in_channels: int, outputs: int, hidden: int = 4, cell: Cell = "gru", width: float = 1.0) -> None:
        body = RecurrentBody(in_channels, scaled([hidden], width)[0], cell)
        super().__init__(body, nn.Linear(body.features, outputs))


class StateBody(nn.Module):
    """One recurrent layer from a state to the state after some steps: H numbers, of an LSTM 2 H.

    Args:
        in_channels: C of the sequence.
        hidden: H.
        cell: kind of net.
    """

    def __init__(self, in_channels: int, hidden: int, cell: Cell = "gru") -> None:
        super().__init__()
        _check_recurrent(cell, in_channels, hidden, 1)
        self.net = _CELLS[cell](in_channels, hidden, batch_first=True)
        self.features = hidden * (2 if cell == "lstm" else 1)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """State (B, D) after the steps of x (B, m, C)."""
        if isinstance(self.net, nn.LSTM):
            start = None if state is None else tuple(half.contiguous()[None] for half in state.chunk(2, 1))
            return torch.cat(self.net(x, start)[1], -1)[0]
        final: Tensor = self.net(x, None if state is None else state[None])[1]
        return final[0]


class RecurrentSegmentStudent(SegmentStudent):
    """A tiny recurrent student for early answers: reads one segment of the sequence, from the state handed over.

    Args:
        in_channels: C of the sequence.
        outputs: L.
        segments: into how many the sequence is cut; a run has as many rounds at most.
        hidden: H.
        cell: kind of net.
        width: factor on `hidden`, for wider rungs of the ladder.
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
