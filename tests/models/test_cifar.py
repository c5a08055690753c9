"""CIFAR networks: sizes that the literature gives, and multiply-adds counted by hand."""

import pytest
import torch
from torch import nn

from bdistil.errors import UserError
from bdistil.metrics.cost import measure_cost
from bdistil.models.cifar import CifarResNet, PadShortcut, WideBlock, WideResNet
from bdistil.models.student import Rung, run_student
from bdistil.storage.blueprint import describe, rebuild

WIDE = (32, 64, 128, 256)


def conv_macs(inside, outside, side, kernel=3):
    return inside * outside * kernel**2 * side**2


def resnet_macs(depth, channels, outputs, project=True):
    """Multiply-adds of a ResNet on 32x32, layer by layer."""
    blocks = (depth - 2) // 6
    total, inside, side = conv_macs(3, channels[0], 32), channels[0], 32
    for stage, outside in enumerate(channels[1:]):
        side = 32 // 2**stage
        total += conv_macs(inside, outside, side) + (2 * blocks - 1) * conv_macs(outside, outside, side)
        changed = inside != outside or stage > 0
        total += conv_macs(inside, outside, side, 1) if project and changed else 0
        inside = outside
    return total + inside * outputs


def wide_macs(depth, widen, outputs):
    blocks, inside, total = (depth - 4) // 6, 16, conv_macs(3, 16, 32)
    for stage, outside in enumerate((16 * widen, 32 * widen, 64 * widen)):
        side = 32 // 2**stage
        total += conv_macs(inside, outside, side) + (2 * blocks - 1) * conv_macs(outside, outside, side)
        total += conv_macs(inside, outside, side, 1) if inside != outside else 0
        inside = outside
    return total + inside * outputs


# Parameters as papers and public training code on CIFAR give them, to the last digit where they do.
KNOWN = [
    (lambda: CifarResNet(20, shortcut="pad"), 269_722, resnet_macs(20, (16, 16, 32, 64), 10, project=False)),
    (lambda: CifarResNet(56, shortcut="pad"), 853_018, resnet_macs(56, (16, 16, 32, 64), 10, project=False)),
    (lambda: CifarResNet(20, outputs=100), 278_324, resnet_macs(20, (16, 16, 32, 64), 100)),
    (lambda: CifarResNet(56, outputs=100), 861_620, resnet_macs(56, (16, 16, 32, 64), 100)),
    (lambda: CifarResNet(8, WIDE, 100), 1_233_540, resnet_macs(8, WIDE, 100)),
    (lambda: CifarResNet(32, WIDE, 100), 7_433_860, resnet_macs(32, WIDE, 100)),
    (lambda: WideResNet(16, 2, 100), 703_284, wide_macs(16, 2, 100)),
    (lambda: WideResNet(40, 2, 100), 2_255_156, wide_macs(40, 2, 100)),
    (lambda: WideResNet(40, 1, 100), 569_780, wide_macs(40, 1, 100)),
]


@pytest.mark.parametrize(("make", "params", "macs"), KNOWN, ids=lambda value: str(value) if type(value) is int else "")
def test_parameters_and_multiply_adds(make, params, macs):
    network = make()
    assert sum(p.numel() for p in network.parameters()) == params
    assert measure_cost(network, (torch.randn(1, 3, 32, 32),)).macs == macs


def test_the_pad_shortcut_by_hand():
    x = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    out = PadShortcut(2, 5, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert out[0, 1].tolist() == [[0, 2], [8, 10]]
    assert out[0, 2].tolist() == [[16, 18], [24, 26]]
    assert out[0, [0, 3, 4]].abs().sum() == 0


def test_a_wide_block_by_hand():
    """What a new shape is projected from is behind batch norm and ReLU, as in the authors' code."""
    block, x = WideBlock(2, 4, 2).eval(), torch.randn(3, 2, 8, 8)
    scale = (1 + 1e-5) ** -0.5  # of batch norm at its start
    first = (x * scale).clamp_min(0)
    expected = block.conv2((block.conv1(first) * scale).clamp_min(0)) + block.project(first)
    torch.testing.assert_close(block(x), expected)


def test_convolutions_start_as_he_says():
    """By what leaves them: 16 to 64 channels by a 3x3 kernel have a standard deviation of (2 / (9 * 64)) ** 0.5."""
    body = CifarResNet(8, (16, 16, 64, 64)).body
    weight = next(m.weight for m in body.modules() if isinstance(m, nn.Conv2d) and m.weight.shape == (64, 16, 3, 3))
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("make", [lambda: CifarResNet(8, (4, 4, 8, 8)), lambda: WideResNet(10, 0.25)])
def test_as_students_they_take_links_and_come_back_from_a_file(make):
    earlier, student = make().eval(), make().link([], Rung(1))
    student = make().link([earlier], Rung(1)).eval()
    x = torch.randn(2, 3, 32, 32)
    nn.init.normal_(student.join.project.weight)
    logits = run_student(student, [earlier], x)
    assert student.features(x).shape == (2, student.head.in_features)
    assert logits.shape == (2, 10)
    assert not torch.equal(logits, student.head(student.features(x)))
    assert torch.equal(rebuild(*describe(student))(x, [earlier.features(x)]), logits)


@pytest.mark.parametrize("make", [CifarResNet, WideResNet])
def test_wider_rungs(make):
    assert make(width=2).width == 2 * make().width


def test_images_of_another_size():
    assert CifarResNet(8, (4, 4, 8, 8), 200)(torch.randn(1, 3, 64, 64)).shape == (1, 200)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CifarResNet(21), r"6 n \+ 2 \(8, 14, …\), got 21"),
        (lambda: CifarResNet(2), "got 2"),
        (lambda: CifarResNet(20, (16, 32, 64)), r"four numbers >= 1.*\[16, 32, 64\]"),
        (lambda: CifarResNet(20, (32, 16, 32, 64), shortcut="pad"), "grow"),
        (lambda: WideResNet(20), r"6 n \+ 4 \(10, 16, …\), got 20"),
        (lambda: WideResNet(16, 0), "`widen` > 0, got 0"),
    ],
)
def test_networks_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
