"""ResNets and wide ResNets for images of 32x32, as in the literature on CIFAR, as teachers and as students.

ResNets: K. He et al., arXiv 1512.03385, section 4.2. Wide ResNets: S. Zagoruyko and N. Komodakis, arXiv 1605.07146.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.student import Student, scaled

Shortcut = Literal["project", "pad"]


def conv3x3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution, or halves it with stride 2."""
    return nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """A shortcut without weights: strided pixels, and zeros for the new channels."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outside - inside) // 2
        self.after = outside - inside - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, inside, H, W) to (B, outside, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, with ReLU after their sum; the first convolution has the stride."""

    def __init__(self, inside: int, outside: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inside, outside, stride), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = conv3x3(outside, outside), nn.BatchNorm2d(outside)
        if inside == outside and stride == 1:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(inside, outside, stride)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, inside, H, W) to (B, outside, H / stride, W / stride)."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two convolutions, and a shortcut; a new shape is projected after the ReLU."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), conv3x3(inside, outside, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outside), conv3x3(outside, outside)
        self.project = None if inside == outside else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, inside, H, W) to (B, outside, H / stride, W / stride)."""
        first = F.relu(self.norm1(x))
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(first))))
        return out + (x if self.project is None else self.project(first))


def _blocks(
    depth: int, rest: int, channels: Sequence[int], block: Callable[[int, int, int], nn.Module], kind: str
) -> list[nn.Sequential]:
    """Three stages of n blocks each, where depth = 6 n + rest; the second and third stage start with stride 2.

    `block` builds a block from input channels, output channels and stride; `channels` lists those of the input and of
    the three stages.
    """
    count, over = divmod(depth - rest, 6)
    if over or count < 1:
        raise UserError(f"Expected `depth` of a {kind} to be 6 n + {rest} ({rest + 6}, {rest + 12}, …), got {depth}.")
    stages = []
    for stage, (inside, outside) in enumerate(pairwise(channels)):
        first = block(inside, outside, 2 if stage else 1)
        stages.append(nn.Sequential(first, *(block(outside, outside, 1) for _ in range(count - 1))))
    return stages


def _initialised(*stages: nn.Module) -> list[nn.Module]:
    """Applies He initialisation (fan-out) to the convolutions of the stages and returns the stages."""
    for module in nn.ModuleList(stages).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return [*stages]


def _pool(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class CifarResNet(Student):
    """A ResNet of three stages: ResNet-20 is ``depth=20``, ResNet-32x4 ``depth=32, channels=[32, 64, 128, 256]``.

    Maps images (B, 3, H, W) to logits (B, L). As a student it has five stages: the first convolution, the three
    stages, and the pooling to features.

    Args:
        depth: 6 n + 2, with n blocks per stage.
        channels: output channels of the first convolution and of the three stages.
        outputs: L.
        shortcut: where the shape changes, `project` with a 1x1 convolution, as in the literature on distillation, or
            `pad` with zeros, as in the original paper on CIFAR.
        width: factor on all channels, for wider rungs of the ladder.

    Raises:
        UserError: an impossible depth or number of channels.

    Example:
        >>> import torch
        >>> CifarResNet(8, channels=(4, 4, 8, 8)).features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        depth: int = 20,
        channels: Sequence[int] = (16, 16, 32, 64),
        outputs: int = 10,
        shortcut: Shortcut = "project",
        width: float = 1.0,
    ) -> None:
        if len(channels) != 4 or min(channels) < 1 or (shortcut == "pad" and [*channels] != sorted(channels)):
            raise UserError(f"Expected `channels` to be four numbers >= 1, and to grow where `shortcut` is 'pad', got "
                            f"{[*channels]}.")  # fmt: skip
        first, *stages = scaled(channels, width)
        stem = nn.Sequential(conv3x3(3, first), nn.BatchNorm2d(first), nn.ReLU(inplace=True))
        block = partial(BasicBlock, shortcut=shortcut)
        blocks = _blocks(depth, 2, [first, *stages], block, "CifarResNet")
        super().__init__(stages=_initialised(stem, *blocks, _pool()), head=nn.Linear(stages[-1], outputs))


class WideResNet(Student):
    """A wide ResNet: WRN-40-2 is ``depth=40, widen=2``.

    Maps images (B, 3, H, W) to logits (B, L). As a student it has five stages: the first convolution, the three
    stages, and the pooling to features.

    Args:
        depth: 6 n + 4, with n blocks per stage.
        widen: factor on the 16, 32 and 64 channels of the stages, not on the first convolution.
        outputs: L.
        width: factor on all channels, for wider rungs of the ladder.

    Raises:
        UserError: an impossible depth or factor.

    Example:
        >>> import torch
        >>> WideResNet(10, widen=0.25).features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(self, depth: int = 16, widen: float = 1.0, outputs: int = 10, width: float = 1.0) -> None:
        if widen <= 0:
            raise UserError(f"Expected `widen` > 0, got {widen}.")
        first, *stages = scaled([16, *scaled((16, 32, 64), widen)], width)
        stem, last = conv3x3(3, first), stages[-1]
        blocks = _blocks(depth, 4, [first, *stages], WideBlock, "WideResNet")
        # The norm returns a new tensor, so the in-place ReLU after it does not change the activation before.
        end = _pool(nn.BatchNorm2d(last), nn.ReLU(inplace=True))
        super().__init__(stages=_initialised(stem, *blocks, end), head=nn.Linear(last, outputs))
