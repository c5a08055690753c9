"""Networks for sequences (B, M, C) of M steps with C channels: convolutional and recurrent, teachers and students."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.sequences import SegmentStudent
from bdistil.students import Student
from bdistil.zoo import Classifier, scaled

Cell = Literal["gru", "lstm", "rnn"]
_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


class ChannelsFirst(nn.Module):
    """Sequences as convolutions want them."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, M) of (B, M, C)."""
        return x.transpose(1, 2)


class InputNoise(nn.Module):
    """Adds Gaussian noise in training, against overfitting of a small data set.

    Args:
        deviation: of the noise.
    """

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        """x with noise, of the same shape; x itself in eval mode."""
        return x + self.deviation * torch.randn_like(x) if self.training and self.deviation else x


def sequence_conv_body(
    in_channels: int, channels: Sequence[int], *, kernel: int, strides: Sequence[int], pooled: int
) -> nn.Sequential:
    """Convolutions over the steps with batch norm and ReLU, then average pooling to `pooled` steps, flat.

    Args:
        in_channels: C of the sequence.
        channels: of each convolution.
        kernel: steps that each convolution sees, odd.
        strides: of each convolution.
        pooled: steps that are left.

    Raises:
        UserError: no channels, another number of strides, an even kernel, or a number below 1.
    """
    positive = min(*channels, *strides, in_channels, pooled, kernel, 1) == 1 and len(channels) == len(strides) > 0
    if not positive or kernel % 2 == 0:
        raise UserError(
            "Expected `channels` and as many `strides`, `in_channels` and `pooled` >= 1 and an odd `kernel`, "
            f"got {list(channels)}, {list(strides)}, {in_channels}, {pooled} and {kernel}."
        )
    layers: list[tuple[str, nn.Module]] = [("turn", ChannelsFirst())]
    pairs = zip([in_channels, *channels], channels, strides, strict=False)
    for number, (inside, outside, stride) in enumerate(pairs):
        layers += [
            (f"conv{number}", nn.Conv1d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)),
            (f"norm{number}", nn.BatchNorm1d(outside)),
            (f"act{number}", nn.ReLU(inplace=True)),
        ]
    layers += [("pool", nn.AdaptiveAvgPool1d(pooled)), ("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict(layers))


class SequenceClassifier(Classifier):
    """A classifier of sequences (B, M, C) that sees noise in training.

    Args:
        body: maps sequences to features (B, D).
        features: D.
        outputs: L.
        dropout: before the head.
        noise: standard deviation of what is added to the input in training.
    """

    def __init__(self, body: nn.Module, features: int, outputs: int, dropout: float, noise: float) -> None:
        super().__init__(body, features, outputs, dropout)
        self.noise = InputNoise(noise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of sequences (B, M, C)."""
        return super().forward(self.noise(x))


class SequenceConvNet(SequenceClassifier):
    """A convolutional classifier of sequences, as a teacher.

    Args:
        in_channels: C of the sequence.
        outputs: L.
        channels: of each convolution.
        strides: of each convolution.
        kernel: steps that each convolution sees, odd.
        pooled: steps that the head reads.
        dropout: before the head.
        noise: standard deviation of what is added to the input in training.
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        channels: Sequence[int] = (48, 48, 48),
        strides: Sequence[int] = (1, 2, 2),
        kernel: int = 5,
        pooled: int = 1,
        dropout: float = 0.2,
        noise: float = 0.0,
    ) -> None:
        body = sequence_conv_body(in_channels, channels, kernel=kernel, strides=strides, pooled=pooled)
        super().__init__(body, channels[-1] * pooled, outputs, dropout, noise)


class SequenceConvStudent(Student):
    """A tiny convolutional student for sequences with a linear head.

    Args:
        in_channels: C of the sequence.
        outputs: L.
        channels: of each convolution.
        strides: of each convolution.
        kernel: steps that each convolution sees, odd.
        pooled: steps that the head reads.
        width: factor on all channels, for wider rungs of the ladder.
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        channels: Sequence[int] = (4,),
        strides: Sequence[int] = (2,),
        kernel: int = 5,
        pooled: int = 1,
        width: float = 1.0,
    ) -> None:
        wide = scaled(channels, width)
        body = sequence_conv_body(in_channels, wide, kernel=kernel, strides=strides, pooled=pooled)
        super().__init__(body, nn.Linear(wide[-1] * pooled, outputs))


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
