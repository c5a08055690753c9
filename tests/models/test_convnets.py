"""Convolutional networks: shapes, a convolution by hand, wider students, dropout and noise, and bad arguments."""

import pytest
import torch
from torch import nn

from bdistil.errors import UserError
from bdistil.models.convnets import (
    ChannelsFirst,
    Classifier,
    ConvStudent,
    SequenceConvNet,
    StridedConvNet,
    conv_stages,
    sequence_conv_stages,
)
from bdistil.models.mlp import MLP
from bdistil.models.student import Rung, run_student

M, C, L = 20, 3, 5


@pytest.fixture
def x():
    return torch.randn(4, M, C)


@pytest.mark.parametrize("pooled", [1, 2])
@pytest.mark.parametrize("side", [28, 9])
def test_shapes(pooled, side):
    x = torch.randn(3, 2, side, side)
    assert nn.Sequential(*conv_stages(2, (4, 6), pooled))(x).shape == (3, 6 * pooled**2)
    assert StridedConvNet((4, 6), in_channels=2, outputs=7, pooled=pooled)(x).shape == (3, 7)
    student = ConvStudent((4, 6), in_channels=2, outputs=7, pooled=pooled)
    assert student(x).shape == (3, 7)
    assert student.features(x).shape == (3, student.width) == (3, 6 * pooled**2)


def test_each_convolution_halves_the_side():
    shapes = []
    body = nn.Sequential(*conv_stages(1, (2, 3, 4), 1))
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    body(torch.randn(1, 1, 28, 28))
    assert shapes == [(2, 14, 14), (3, 7, 7), (4, 4, 4)]


@pytest.mark.parametrize(("width", "channels"), [(1.0, (4, 8)), (1.5, (6, 12)), (2, (8, 16)), (0.1, (1, 1))])
def test_width_widens_all_channels(width, channels):
    student = ConvStudent((4, 8), width=width)
    convs = [layer for layer in student.body.modules() if isinstance(layer, nn.Conv2d)]
    assert tuple(conv.out_channels for conv in convs) == channels
    first, second = channels
    weights = 9 * first + 9 * first * second + 2 * (first + second) + 4 * second * 10 + 10
    assert sum(p.numel() for p in student.parameters()) == weights


def test_the_student_links():
    x = torch.randn(2, 1, 28, 28)
    earlier = [ConvStudent().eval(), ConvStudent(width=2).eval()]
    student = ConvStudent().eval().link(earlier, Rung(2))
    assert student.join.project.in_features == 64 + 32
    assert run_student(student, earlier, x).shape == (2, 10)


def test_the_teacher_drops_out_in_training_only():
    net, x = StridedConvNet((4,), dropout=0.9), torch.randn(4, 1, 8, 8)
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


@pytest.mark.parametrize(
    ("make", "values", "got"),
    [
        (StridedConvNet, {"channels": ()}, r"\[\], 1, 2"),
        (StridedConvNet, {"channels": (4, 0)}, r"\[4, 0\], 1, 2"),
        (StridedConvNet, {"in_channels": 0}, r"\[32, 64, 128\], 0, 2"),
        (ConvStudent, {"channels": ()}, r"\[\], 1, 2"),
        (ConvStudent, {"in_channels": 0}, r"\[4, 8\], 0, 2"),
        (ConvStudent, {"pooled": 0}, r"\[4, 8\], 1, 0"),
    ],
)
def test_bad_arguments_are_named(make, values, got):
    with pytest.raises(UserError, match=rf"`channels`, `in_channels` and `pooled` >= 1, got {got}\."):
        make(**values)


def test_a_convolution_by_hand(x):
    """One convolution of stride 2: each window of 3 steps times the weights, batch norm at its start, ReLU, mean."""
    stages = sequence_conv_stages(C, [2], kernel=3, strides=[2], pooled=1)
    body = nn.Sequential(ChannelsFirst(), *stages).eval()
    padded = nn.functional.pad(x, (0, 0, 1, 1))
    weight = stages[0][0].weight
    steps = [(padded[:, t : t + 3, None, :] * weight.permute(2, 0, 1)).sum((1, 3)) for t in range(0, M, 2)]
    expected = (torch.stack(steps, 1) / (1 + 1e-5) ** 0.5).clamp_min(0).mean(1)
    torch.testing.assert_close(body(x), expected)


def test_noise_in_training_only(x):
    seen = []
    net = Classifier(nn.Flatten(), M * C, L, dropout=0.0, noise=0.5)
    net.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(x)
    net.eval()(x)
    Classifier(net.body, M * C, L, dropout=0.0)(x)
    assert 0.3 < (seen[0] - x).std() < 0.7
    assert seen[1] is x
    assert seen[2] is x


@pytest.mark.parametrize(
    ("make", "given", "got"),
    [
        (StridedConvNet, {"dropout": 2.0}, r"got 2\.0 and 0\.0"),
        (SequenceConvNet, {"in_channels": C, "outputs": L, "noise": -1.0}, r"got 0\.2 and -1\.0"),
        (MLP, {"features": C, "dropout": -0.1}, r"`dropout` in 0 … 1, got -0\.1"),
    ],
)
def test_impossible_dropout_and_noise_are_named(make, given, got):
    with pytest.raises(UserError, match=got):
        make(**given)
