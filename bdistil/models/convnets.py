"""Small strided convolutional networks for images and sequences, as teachers and as students."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.student import Rung, Student, scaled


class Classifier(nn.Module):
    """A body, dropout and a linear head; Gaussian noise can be added to the input in training.

    Args:
        body: maps x (B, ...) to features (B, D).
        features: D.
        outputs: L.
        dropout: probability of the dropout before the head.
        noise: standard deviation of the noise; it reduces overfitting on small data sets.

    Raises:
        UserError: an impossible dropout or noise.
    """

    def __init__(self, body: nn.Module, features: int, outputs: int, dropout: float, noise: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout <= 1 or not noise >= 0:
            raise UserError(f"Expected `dropout` in 0 … 1 and `noise` >= 0 of a teacher, got {dropout} and {noise}.")
        self.body, self.dropout, self.head = body, nn.Dropout(dropout), nn.Linear(features, outputs)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of x (B, ...)."""
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        logits: Tensor = self.head(self.dropout(self.body(x)))
        return logits


class ChannelsFirst(nn.Module):
    """Moves the channels of sequences before the steps, as convolutions expect."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, M, C) to (B, C, M)."""
        return x.transpose(1, 2)


_LAYERS: dict[int, tuple[Callable[..., nn.Module], ...]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
}


def _conv_stages(
    dims: int, channels: Sequence[int], kernel: int, strides: Sequence[int], pooled: int
) -> list[nn.Sequential]:
    """Stages of convolution, batch norm and ReLU between consecutive `channels`, then flattened average pooling."""
    conv, norm, pool = _LAYERS[dims]
    stages = [
        nn.Sequential(
            conv(inside, outside, kernel, stride, padding=kernel // 2, bias=False), norm(outside), nn.ReLU(inplace=True)
        )
        for inside, outside, stride in zip(channels, channels[1:], strides, strict=False)
    ]
    return [*stages, nn.Sequential(pool(pooled), nn.Flatten())]


def _joined(stages: Sequence[nn.Sequential]) -> nn.Sequential:
    """The layers of all stages in one module, under the names in teacher checkpoints."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (conv, norm, act) in enumerate(stages[:-1]):
        layers |= {f"conv{number}": conv, f"norm{number}": norm, f"act{number}": act}
    pool, flat = stages[-1]
    return nn.Sequential(OrderedDict(**layers, pool=pool, flat=flat))


class _Block(nn.Module):
    """A residual block; if the channels differ, the shortcut is a 1x1 convolution with batch norm.

    Args:
        channels: input channels.
        dims: 2 for maps, 1 for sequences.
        outputs: output channels.
    """

    def __init__(self, channels: int, dims: int, outputs: int) -> None:
        super().__init__()
        if channels != outputs:
            conv, norm, _ = _LAYERS[dims]
            self.shortcut = nn.Sequential(conv(channels, outputs, 1, bias=False), norm(outputs))

    def joined(self, x: Tensor, own: Tensor) -> Tensor:
        """ReLU of the shortcut of x plus the block's own output."""
        return torch.relu((self.shortcut(x) if hasattr(self, "shortcut") else x) + own)


class ResidualConv(_Block):
    """x + a 3x3 convolution (or one of 3 steps) of x, with batch norm before the sum and ReLU after it.

    Args:
        channels: input channels.
        dims: 2 for maps, 1 for sequences.
        outputs: output channels; if they differ, the shortcut is a 1x1 convolution.
    """

    def __init__(self, channels: int, dims: int = 2, outputs: int | None = None) -> None:
        outputs = outputs or channels
        super().__init__(channels, dims, outputs)
        conv, norm, _ = _LAYERS[dims]
        self.conv, self.norm = conv(channels, outputs, 3, padding=1, bias=False), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, ...) to (B, outputs, ...)."""
        return self.joined(x, self.norm(self.conv(x)))


class InvertedResidual(_Block):
    """x + a 1x1, a depthwise 3x3 and a 1x1 convolution, with more channels in between, and ReLU after the sum.

    The block of MobileNetV2 (Sandler et al., arXiv 1801.04381), for outputs of a ReLU. With 32 channels and an
    expansion of 2 it has half the multiply-adds of a `ResidualConv`. Arguments as for `ResidualConv`.
    """

    def __init__(self, channels: int, dims: int = 2, outputs: int | None = None, expansion: int = 2) -> None:
        outputs = outputs or channels
        super().__init__(channels, dims, outputs)
        conv, norm, _ = _LAYERS[dims]
        wide = expansion * outputs
        self.block = nn.Sequential(
            conv(channels, wide, 1, bias=False), norm(wide), nn.ReLU(inplace=True),
            conv(wide, wide, 3, padding=1, groups=wide, bias=False), norm(wide), nn.ReLU(inplace=True),
            conv(wide, outputs, 1, bias=False), norm(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, ...) to (B, outputs, ...)."""
        return self.joined(x, self.block(x))


Refinement = Literal["residual", "inverted"]
_BLOCKS: dict[str, Callable[[int, int, int], nn.Module]] = {"residual": ResidualConv, "inverted": InvertedResidual}


def _check_refinement(refine: str | None) -> None:
    if refine is not None and refine not in _BLOCKS:
        raise UserError(f"Expected `refine` to be one of {', '.join(_BLOCKS)}, or None, got {refine!r}.")


class _RefiningStudent(Student):
    """A convolutional student that adds blocks of its own if it starts from an earlier student's activation."""

    refine: Refinement | None
    dims: ClassVar[int]
    channels: Sequence[int]

    def refinement(self, activation: Tensor) -> nn.Module | None:
        """A block of the kind `refine`, from the activation to the student's own number of channels; None if unset."""
        if self.refine is None or self.staged is None:
            return None
        return _BLOCKS[self.refine](activation.shape[1], self.dims, self.channels[self.staged.start - 1])

    def link(self, earlier: Sequence[nn.Module], rung: Rung, x: Any = None) -> Student:
        """As `Student`; ``refine="inverted"`` adds a block to every stage if it starts from an activation."""
        super().link(earlier, rung, x)
        if self.refine == "inverted" and self.staged is not None and self.staged.start:
            for stage, channels in zip(self.staged.stages[1:], self.channels[self.staged.start :], strict=True):
                assert isinstance(stage, nn.Sequential)
                stage.insert(0, InvertedResidual(channels, self.dims))
        return self


def conv_stages(in_channels: int, channels: Sequence[int], pooled: int) -> list[nn.Sequential]:
    """Maps images to (B, channels[-1] * pooled²): 3x3 convolutions of stride 2, average pooling to pooled x pooled.

    Raises:
        UserError: no channels, or a number below 1.
    """
    if not channels or min(*channels, in_channels, pooled) < 1:
        raise UserError(
            f"Expected `channels`, `in_channels` and `pooled` >= 1, got {list(channels)}, {in_channels}, {pooled}."
        )
    return _conv_stages(2, [in_channels, *channels], 3, [2] * len(channels), pooled)


class StridedConvNet(Classifier):
    """A strided convolutional classifier of images (B, C, H, W), as a teacher.

    Args:
        channels: output channels of each convolution.
        in_channels: C.
        outputs: L.
        pooled: side of the features before the linear head.
        dropout: probability of the dropout before the head.

    Example:
        >>> StridedConvNet((8, 16))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128),
        in_channels: int = 1,
        outputs: int = 10,
        pooled: int = 2,
        dropout: float = 0.2,
    ) -> None:
        body = _joined(conv_stages(in_channels, channels, pooled))
        super().__init__(body, channels[-1] * pooled**2, outputs, dropout)


class ConvStudent(_RefiningStudent):
    """A tiny strided convolutional student for images (B, C, H, W), with a linear head; each convolution is a stage.

    Args:
        channels: output channels of each convolution.
        in_channels: C.
        outputs: L.
        pooled: side of the features before the linear head.
        width: factor on all channels, for wider rungs of the ladder.
        refine: block that a student starting from an activation applies to it first: `residual`, a convolution,
            or `inverted`, an inverted residual, with others before each later convolution and the pooling.

    Example:
        >>> student = ConvStudent(width=1.5)
        >>> student.features(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 48])
    """

    dims = 2

    def __init__(
        self,
        channels: Sequence[int] = (4, 8),
        in_channels: int = 1,
        outputs: int = 10,
        pooled: int = 2,
        width: float = 1.0,
        refine: Refinement | None = None,
    ) -> None:
        wide = scaled(channels, width)
        stages = conv_stages(in_channels, wide, pooled)
        super().__init__(stages=stages, head=nn.Linear(wide[-1] * pooled**2, outputs))
        _check_refinement(refine)
        self.refine, self.channels = refine, wide


def sequence_conv_stages(
    in_channels: int, channels: Sequence[int], *, kernel: int, strides: Sequence[int], pooled: int
) -> list[nn.Sequential]:
    """Maps sequences to (B, channels[-1] * pooled): convolutions over the steps, average pooling to `pooled` steps.

    Raises:
        UserError: no channels, another number of strides, an even kernel, or a number below 1.
    """
    positive = min(*channels, *strides, in_channels, pooled, kernel, 1) == 1 and len(channels) == len(strides) > 0
    if not positive or kernel % 2 == 0:
        raise UserError(
            "Expected `channels` and as many `strides`, `in_channels` and `pooled` >= 1 and an odd `kernel`, "
            f"got {list(channels)}, {list(strides)}, {in_channels}, {pooled} and {kernel}."
        )
    return _conv_stages(1, [in_channels, *channels], kernel, strides, pooled)


class SequenceConvNet(Classifier):
    """A convolutional classifier of sequences (B, M, C), as a teacher.

    Args:
        in_channels: C.
        outputs: L.
        channels: output channels of each convolution.
        strides: stride of each convolution.
        kernel: size of each convolution in steps, odd.
        pooled: steps after pooling, read by the head.
        dropout: probability of the dropout before the head.
        noise: standard deviation of Gaussian noise added to the input in training.

    Example:
        >>> SequenceConvNet(in_channels=3, outputs=5)(torch.zeros(2, 20, 3)).shape
        torch.Size([2, 5])
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
        layers = _joined(sequence_conv_stages(in_channels, channels, kernel=kernel, strides=strides, pooled=pooled))
        body = nn.Sequential(OrderedDict([("turn", ChannelsFirst()), *layers.named_children()]))
        super().__init__(body, channels[-1] * pooled, outputs, dropout, noise)


class SequenceConvStudent(_RefiningStudent):
    """A tiny convolutional student for sequences (B, M, C), with a linear head; each convolution is a stage.

    Args:
        in_channels: C.
        outputs: L.
        channels: output channels of each convolution.
        strides: stride of each convolution.
        kernel: size of each convolution in steps, odd.
        pooled: steps after pooling, read by the head.
        width: factor on all channels, for wider rungs of the ladder.
        refine: block that a student starting from an activation applies to it first: `residual`, a convolution,
            or `inverted`, an inverted residual, with others before each later convolution and the pooling.

    Example:
        >>> SequenceConvStudent(in_channels=3, outputs=5).features(torch.zeros(2, 20, 3)).shape
        torch.Size([2, 4])
    """

    dims = 1

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        channels: Sequence[int] = (4,),
        strides: Sequence[int] = (2,),
        kernel: int = 5,
        pooled: int = 1,
        width: float = 1.0,
        refine: Refinement | None = None,
    ) -> None:
        wide = scaled(channels, width)
        first, *rest = sequence_conv_stages(in_channels, wide, kernel=kernel, strides=strides, pooled=pooled)
        stages = [nn.Sequential(ChannelsFirst(), *first), *rest]
        super().__init__(stages=stages, head=nn.Linear(wide[-1] * pooled, outputs))
        _check_refinement(refine)
        self.refine, self.channels = refine, wide
