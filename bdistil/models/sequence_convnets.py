"""TODO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from bdistil.errors import UserError
from bdistil.models.layers import ChannelsFirst, SequenceClassifier, scaled
from bdistil.models.student import Student


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
