"""Small networks of the shipped recipes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from bdistil.errors import UserError
from bdistil.models.layers import Classifier, scaled
from bdistil.models.student import Student


def conv_body(in_channels: int, channels: Sequence[int], pooled: int) -> nn.Sequential:
    """Convolutions 3x3 of stride 2 with batch norm and ReLU, then average pooling to `pooled` x `pooled`, flat.

    Args:
        in_channels: of the image.
        channels: of each convolution; each halves the image's side.
        pooled: side of what is left.

    Raises:
        UserError: no channels, or a number below 1.
    """
    if not channels or min(*channels, in_channels, pooled) < 1:
        raise UserError(
            f"Expected `channels`, `in_channels` and `pooled` >= 1, got {list(channels)}, {in_channels}, {pooled}."
        )
    layers: list[tuple[str, nn.Module]] = []
    for number, (inside, outside) in enumerate(zip([in_channels, *channels], channels, strict=False)):
        layers += [
            (f"conv{number}", nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)),
            (f"norm{number}", nn.BatchNorm2d(outside)),
            (f"act{number}", nn.ReLU(inplace=True)),
        ]
    layers += [("pool", nn.AdaptiveAvgPool2d(pooled)), ("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict(layers))


class StridedConvNet(Classifier):
    """A strided convolutional classifier of images (B, C, H, W), as a teacher.

    Args:
        channels: of each convolution.
        in_channels: of the image.
        outputs: L.
        pooled: side of the features before the linear head.
        dropout: before the head.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128),
        in_channels: int = 1,
        outputs: int = 10,
        pooled: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(conv_body(in_channels, channels, pooled), channels[-1] * pooled**2, outputs, dropout)


class ConvStudent(Student):
    """A tiny strided convolutional student with a linear head.

    Args:
        channels: of each convolution.
        in_channels: of the image.
        outputs: L.
        pooled: side of the features before the linear head.
        width: factor on all channels, for wider rungs of the ladder.
    """

    def __init__(
        self,
        channels: Sequence[int] = (4, 8),
        in_channels: int = 1,
        outputs: int = 10,
        pooled: int = 2,
        width: float = 1.0,
    ) -> None:
        wide = scaled(channels, width)
        super().__init__(conv_body(in_channels, wide, pooled), nn.Linear(wide[-1] * pooled**2, outputs))
