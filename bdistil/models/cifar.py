"""Networks for images of 32x32 in the layout that the literature on CIFAR has, as teachers and as students.

ResNets: K. He et al., arXiv 1512.03385, section 4.2. Wide ResNets: S. Zagoruyko and N. Komodakis, arXiv 1605.07146.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.layers import scaled
from bdistil.models.student import Student

Shortcut = Literal["project", "pad"]


def conv3x3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    """A convolution 3x3 that keeps the side, or halves it by a stride of 2."""
    return nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Every second pixel, and zeros for the channels that are new: a shortcut without weights.

    Args:
        inside: channels.
        outside: channels, as many or more.
        stride: of the block.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outside - inside) // 2
        self.after = outside - inside - self.before

    def forward(self, x: Tensor) -> Tensor:
        """(B, outside, H / stride, W / stride) of x (B, inside, H, W)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, ReLU behind their sum.

    Args:
        inside: channels.
        outside: channels.
        stride: of the first convolution.
        shortcut: where the shape changes: `project` by a convolution 1x1, `pad` with zeros.
    """

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
        """(B, outside, H / stride, W / stride) of x (B, inside, H, W)."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two convolutions, and a shortcut; a new shape is projected behind the ReLU.

    Args:
        inside: channels.
        outside: channels.
        stride: of the first convolution.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), conv3x3(inside, outside, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outside), conv3x3(outside, outside)
        self.project = None if inside == outside else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, outside, H / stride, W / stride) of x (B, inside, H, W)."""
        first = F.relu(self.norm1(x))
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(first))))
        return out + (x if self.project is None else self.project(first))


def blocks_a_stage(depth: int, step: int, rest: int, kind: str) -> int:
    """How many blocks each of the three stages has.

    Args:
        depth: as in the name of the network.
        step: convolutions of three blocks.
        rest: other layers that the name counts.
        kind: for the message.

    Raises:
        UserError: no such network.
    """
    blocks, over = divmod(depth - rest, step)
    if over or blocks < 1:
        raise UserError(f"Expected `depth` of a {kind} to be {step} n + {rest} ({rest + step}, {rest + 2 * step}, …), "
                        f"got {depth}.")  # fmt: skip
    return blocks


class CifarResNet(Student):
    """A ResNet of three stages: ResNet-20 is ``depth=20``, ResNet-32x4 ``depth=32, channels=[32, 64, 128, 256]``.

    It maps images (B, 3, H, W) to logits (B, L), and as a student exports its pooled features.

    Args:
        depth: 6 n + 2, with n blocks a stage.
        channels: of the first convolution and of the three stages.
        outputs: L.
        shortcut: `project` as the literature on distillation has it, `pad` as the first authors have on CIFAR.
        width: factor on all channels, for wider rungs of the ladder.

    Raises:
        UserError: a depth or a number of channels that cannot be.
    """

    def __init__(
        self,
        depth: int = 20,
        channels: Sequence[int] = (16, 16, 32, 64),
        outputs: int = 10,
        shortcut: Shortcut = "project",
        width: float = 1.0,
    ) -> None:
        blocks = blocks_a_stage(depth, 6, 2, "CifarResNet")
        if len(channels) != 4 or min(channels) < 1 or (shortcut == "pad" and [*channels] != sorted(channels)):
            raise UserError(f"Expected `channels` to be four numbers >= 1, and to grow where `shortcut` is 'pad', got "
                            f"{[*channels]}.")  # fmt: skip
        first, *stages = scaled(channels, width)
        layers: list[nn.Module] = [conv3x3(3, first), nn.BatchNorm2d(first), nn.ReLU(inplace=True)]
        inside = first
        for number, outside in enumerate(stages):
            for block in range(blocks):
                layers.append(BasicBlock(inside, outside, 2 if number and not block else 1, shortcut))
                inside = outside
        body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(_started(body), nn.Linear(inside, outputs))


class WideResNet(Student):
    """A wide ResNet: WRN-40-2 is ``depth=40, widen=2``.

    It maps images (B, 3, H, W) to logits (B, L), and as a student exports its pooled features.

    Args:
        depth: 6 n + 4, with n blocks a stage.
        widen: factor on the 16, 32 and 64 channels of the stages, not on the first convolution.
        outputs: L.
        width: factor on all channels, for wider rungs of the ladder.

    Raises:
        UserError: a depth or factor that cannot be.
    """

    def __init__(self, depth: int = 16, widen: float = 1.0, outputs: int = 10, width: float = 1.0) -> None:
        blocks = blocks_a_stage(depth, 6, 4, "WideResNet")
        if widen <= 0:
            raise UserError(f"Expected `widen` > 0, got {widen}.")
        first, *stages = scaled([16, *(round(count * widen) for count in (16, 32, 64))], width)
        layers: list[nn.Module] = [conv3x3(3, first)]
        inside = first
        for number, outside in enumerate(stages):
            for block in range(blocks):
                layers.append(WideBlock(inside, outside, 2 if number and not block else 1))
                inside = outside
        tail = [nn.BatchNorm2d(inside), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(_started(nn.Sequential(*layers, *tail)), nn.Linear(inside, outputs))


def _started(body: nn.Sequential) -> nn.Sequential:
    """The body with He's start of its convolutions, by what leaves them."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body
