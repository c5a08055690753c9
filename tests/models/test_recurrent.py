"""Networks for sequences: shapes, what they read, what they cost, and arguments that cannot be."""

import pytest
import torch

from bdistil.errors import UserError
from bdistil.metrics.cost import measure_cost
from bdistil.models.convnets import SequenceConvNet, SequenceConvStudent
from bdistil.models.recurrent import RecurrentBody, RecurrentNet, RecurrentStudent
from bdistil.models.student import Rung, run_student
from bdistil.storage.blueprint import describe, rebuild

M, C, L = 20, 3, 5


@pytest.fixture
def x():
    return torch.randn(4, M, C)


NETS = {
    "conv net": lambda: SequenceConvNet(C, L, (4, 6, 8), (1, 2, 2), pooled=2),
    "gru net": lambda: RecurrentNet(C, L, 6),
    "lstm net, two ways, 2 layers": lambda: RecurrentNet(C, L, 6, "lstm", 2, True),
    "conv student": lambda: SequenceConvStudent(C, L, (2, 4), (2, 2), kernel=3),
    "rnn student": lambda: RecurrentStudent(C, L, 3, "rnn"),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())
def test_logits_of_sequences_and_a_copy_from_its_description(make, x):
    net = make().eval()
    logits = net(x)
    assert logits.shape == (4, L)
    torch.testing.assert_close(rebuild(*describe(net))(x), logits)


def test_a_recurrent_body_gives_what_it_knows_after_the_last_step(x):
    body = RecurrentBody(C, 4, "lstm", layers=2)
    torch.testing.assert_close(body(x), body.net(x)[0][:, -1])
    both = RecurrentBody(C, 4, "gru", bidirectional=True)
    out = both.net(x)[0]
    torch.testing.assert_close(both(x), torch.cat((out[:, -1, :4], out[:, 0, 4:]), 1))


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3), ("rnn", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_multiply_adds_of_recurrent_nets(cell, gates, directions):
    net = RecurrentNet(32, 13, 64, cell, bidirectional=directions == 2)
    expected = 99 * directions * gates * 64 * (32 + 64) + 13 * 64 * directions
    assert measure_cost(net, (torch.randn(1, 99, 32),)).macs == expected
    assert cell != "lstm" or directions == 2 or expected == 2_433_024 + 13 * 64
    second = 99 * directions * gates * 64 * (64 * directions + 64)
    deep = RecurrentNet(32, 13, 64, cell, layers=2, bidirectional=directions == 2)
    assert measure_cost(deep, (torch.randn(1, 99, 32),)).macs == expected + second


def test_the_students_link(x):
    earlier = [SequenceConvStudent(C, L, (2,), (1,)).eval(), RecurrentStudent(C, L, 3).eval()]
    student = RecurrentStudent(C, L, 4, width=1.5).eval().link(earlier, Rung(2))
    assert student.width == 6
    assert student.join.project.in_features == 3 + 2
    assert run_student(student, earlier, x).shape == (4, L)
    assert SequenceConvStudent(C, L, (2, 4), (1, 1), width=2).width == 8


@pytest.mark.parametrize("kind", [SequenceConvNet, RecurrentNet])
@pytest.mark.parametrize(("options", "moves"), [({"noise": 0.5}, True), ({"dropout": 0.5}, True), ({}, False)])
def test_teachers_see_noise_and_dropout_in_training_only(x, kind, options, moves):
    net = kind(C, L, **{"dropout": 0.0, **options})
    assert torch.equal(net(x), net(x)) is not moves
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceConvStudent(C, L, ()), r"`channels` and as many `strides`.*got \[\]"),
        (lambda: SequenceConvStudent(C, L, (2,), (1, 1)), r"got \[2\], \[1, 1\]"),
        (lambda: SequenceConvStudent(C, L, kernel=4), r"an odd `kernel`, got .* and 4\."),
        (lambda: SequenceConvNet(0, L), r"`in_channels` .*>= 1.*, 0, 1 and 5\."),
        (lambda: SequenceConvNet(C, L, pooled=0), r"`pooled` >= 1"),
        (lambda: RecurrentNet(C, L, cell="qrnn"), r"`cell` to be one of gru, lstm, rnn.*got 'qrnn'"),
        (lambda: RecurrentStudent(0, L), r"`in_channels`, `hidden` and `layers` >= 1"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
