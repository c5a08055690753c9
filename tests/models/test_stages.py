"""Students of stages: links to activations by hand, what may be linked, costs, and what is exported."""

import copy

import pytest
import torch
from torch import nn

from bdistil import ProgressiveEnsemble, Rung, Student, UserError
from bdistil.metrics.cost import measure_cost
from bdistil.models import CifarResNet, ConvStudent, MLPStudent, RecurrentStudent, SequenceConvStudent, WideResNet
from bdistil.models.convnets import InvertedResidual
from bdistil.models.stages import FEATURES
from bdistil.models.student import build_student, link_macs, linked_activations, run_student, sources
from bdistil.storage.blueprint import describe, rebuild

SIDE, L = 12, 5


def make(round=0, width=1.0):
    return ConvStudent((3, 4, 6), in_channels=2, outputs=L, pooled=1, width=width)


def chain(rung, count=3, make=make, x=None):
    students = []
    for number in range(count):
        students.append(build_student(make, number, students, Rung(0) if not number else rung, x).eval())
    return students


@pytest.fixture
def x():
    return torch.randn(2, 2, SIDE, SIDE)


def test_deep_adds_a_projection_before_the_relu_of_each_stage(x):
    first, second, _ = chain(Rung(1, "deep"), x=x)
    theirs = first.activations(x)
    value = x
    for key, stage in enumerate(second.body.stages[:3]):
        conv, norm, relu = stage
        value = relu(norm(conv(value)) + second.body.projections[str(key)](theirs[key]))
    features = second.body.stages[3](value)
    expected = second.head(features) + theirs[FEATURES] @ second.join.project.weight.T
    torch.testing.assert_close(run_student(second, [first], x), expected)
    assert [tuple(p.weight.shape) for p in second.body.projections.values()] == [
        (3, 3, 1, 1),
        (4, 4, 1, 1),
        (6, 6, 1, 1),
    ]


def test_start_replaces_the_first_stages(x):
    first, second, third = chain(Rung(1, "start", at=2), x=x)
    theirs = first.activations(x)
    expected = second.head(second.body.stages[1](second.body.stages[0](theirs[1])))
    expected = expected + theirs[FEATURES] @ second.join.project.weight.T
    torch.testing.assert_close(run_student(second, [first], x), expected)
    assert len(second.body.stages) == 2
    assert second.reads == third.reads == [(1, 1), (1, FEATURES)]
    assert torch.equal(second.activations(x, linked_activations(second, [first], x))[1], theirs[1])


def test_start_with_a_refinement_hands_on_what_it_made_of_the_map(x):
    refined = lambda round, width=1.0: ConvStudent((3, 4, 6), 2, L, 1, refine="residual")  # noqa: E731
    first, second, third = chain(Rung(1, "start", at=2), make=refined, x=x)
    start = second.body.refinement(first.activations(x)[1])
    assert not torch.equal(start, first.activations(x)[1])
    assert torch.equal(linked_activations(third, [first, second], x)[0], start)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_an_inverted_student_has_a_block_where_it_starts_and_before_all_further_stages(x, kind):
    def make(round, width=1.0):
        if kind == "images":
            return ConvStudent((3, 4, 6), 2, L, 1, refine="inverted")
        return SequenceConvStudent(2, L, (3, 4, 6), (2, 2, 2), 3, refine="inverted")

    x = x if kind == "images" else x.flatten(2).transpose(1, 2)
    first, second, third = chain(Rung(1, "start", at=1), make=make, x=x)
    assert not any(isinstance(module, InvertedResidual) for module in first.modules())
    theirs, (conv2, (block3, *conv3), (block4, *pool)) = first.activations(x), second.body.stages
    start = second.body.refinement
    assert {type(block) for block in (start, block3, block4)} == {InvertedResidual}
    assert torch.equal(start(theirs[0]), torch.relu(theirs[0] + start.block(theirs[0])))
    value = nn.Sequential(block3, *conv3, block4, *pool)(conv2(start(theirs[0])))
    expected = second.head(value) + theirs[FEATURES] @ second.join.project.weight.T
    torch.testing.assert_close(run_student(second, [first], x), expected)
    assert torch.equal(linked_activations(third, [first, second], x)[0], start(theirs[0]))


@pytest.mark.parametrize("refine", ["residual", "inverted"])
def test_a_wider_student_widens_the_map_that_it_starts_from_and_a_narrower_one_narrows_it(x, refine):
    def make(width):
        return ConvStudent((3, 4, 6), 2, L, 1, width, refine=refine)

    students = [make(1)]
    for width in (2, 1):
        students.append(make(width).link(students, Rung(1, "deep", at=1, width=width), x).eval())
    first, second, third = students[0].eval(), *students[1:]
    maps = [linked_activations(student, students[:n], x)[0] for n, student in ((1, second), (2, third))]
    assert [m.shape[1] for m in maps] == [3, 6]
    conv, norm = second.body.refinement.shortcut
    own = second.body.refinement.block if refine == "inverted" else lambda x: norm_of(second)(conv_of(second)(x))
    norm_of, conv_of = (lambda s: s.body.refinement.norm), (lambda s: s.body.refinement.conv)
    torch.testing.assert_close(maps[1], torch.relu(norm(conv(maps[0])) + own(maps[0])))
    assert run_student(third, [first, second], x).shape == (len(x), L)


@pytest.mark.parametrize("refine", ["residual", "inverted"])
def test_a_block_between_equal_channels_has_no_weights_of_a_shortcut(refine):
    """So that students that were committed without it are rebuilt."""
    student = ConvStudent((3, 4), 2, L, 1, refine=refine).link(
        [ConvStudent((3, 4), 2, L, 1)], Rung(1, "start", at=1), torch.zeros(1, 2, SIDE, SIDE)
    )
    assert not hasattr(student.body.refinement, "shortcut")


def test_a_refinement_that_changes_the_map_in_place_is_refused(x):
    class Hasty(ConvStudent):
        def refinement(self, activation):
            return nn.Sequential(nn.Hardtanh(inplace=True), nn.Conv2d(3, 3, 1))

    with pytest.raises(UserError, match="The refinement of the student changes its input in place"):
        chain(Rung(1, "start", at=1), make=lambda round, width=1.0: Hasty((3, 4, 6), 2, L, 1), x=x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_from_the_cache_have_the_layout_of_the_weights(x, layout):
    first, second, _ = chain(Rung(1, "deep", at=1), x=x)
    second.to(memory_format=layout)
    linked = [activation.contiguous() for activation in linked_activations(second, [first], x)]
    seen = []
    for layer in (second.body.stages[0][0], second.body.projections["1"]):
        layer.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    answer = second(x, linked)
    assert [given.is_contiguous(memory_format=layout) for given in seen] == [True, True]
    torch.testing.assert_close(answer, run_student(second.to(memory_format=torch.contiguous_format), [first], x))


def test_an_unknown_refinement_is_refused():
    with pytest.raises(UserError, match="Expected `refine` to be one of residual, inverted, or None, got True"):
        ConvStudent((3, 4), refine=True)


def test_both_together(x):
    first, second, _ = chain(Rung(1, "deep", at=1), x=x)
    assert second.reads == [(1, 0), (1, 1), (1, 2), (1, FEATURES)]
    theirs = first.activations(x)
    value = theirs[0]
    for key, stage in enumerate(second.body.stages[:2], 1):
        conv, norm, relu = stage
        value = relu(norm(conv(value)) + second.body.projections[str(key)](theirs[key]))
    expected = second.head(second.body.stages[2](value)) + theirs[FEATURES] @ second.join.project.weight.T
    torch.testing.assert_close(run_student(second, [first], x), expected)


@pytest.mark.parametrize("rung", [Rung(1, "deep"), Rung(1, "start", at=1)])
def test_no_gradient_reaches_an_earlier_student(rung, x):
    *earlier, last = chain(rung, x=x)
    run_student(last.train(), earlier, x).sum().backward()
    assert all(p.grad is None for student in earlier for p in student.parameters())
    used = [name for name, p in last.named_parameters() if p.grad is not None]
    assert used == [name for name, _ in last.named_parameters()]  # nothing is left over that DDP would wait for


def test_each_body_runs_once(x):
    students = chain(Rung(1, "deep"), count=4, x=x)
    calls = []
    for number, student in enumerate(students):
        student.body.stages[-1].register_forward_hook(lambda *_, number=number: calls.append(number))
    run_student(students[3], students[:3], x)
    assert sorted(calls) == [0, 1, 2, 3]


def test_a_student_pays_for_its_own_stages_and_its_links(x):
    first, second, third = chain(Rung(1, "start", at=2), x=x)
    cost = measure_cost(second, (x[:1], linked_activations(second, [first], x[:1])))
    assert cost.macs == 9 * 4 * 6 * 2 * 2 + 6 * L + 6 * L  # convolution on the 3x3 map to 2x2, head, link
    assert link_macs(cost.by_module) == 6 * L
    first, second, third = chain(Rung(1, "deep"), x=x)
    cost = measure_cost(third, (x[:1], linked_activations(third, [first, second], x[:1])))
    assert link_macs(cost.by_module) == 3 * 3 * 36 + 4 * 4 * 9 + 6 * 6 * 4 + 6 * L


MAKERS = {
    "conv, inverted": (lambda round, width=1.0: ConvStudent((3, 4), 2, L, 1, width, "inverted"), (2, SIDE, SIDE)),
    "images": (lambda round: ConvStudent((3, 4), 2, L), (2, SIDE, SIDE)),
    "resnet": (lambda round: CifarResNet(8, (3, 3, 4, 5), L), (3, SIDE, SIDE)),
    "wide": (lambda round: WideResNet(10, 0.25, L), (3, SIDE, SIDE)),
    "sequences": (lambda round: SequenceConvStudent(2, L, (3, 4), (1, 2)), (9, 2)),
    "tables": (lambda round: MLPStudent(7, (6, 5, 4), L), (7,)),
    "tokens": (lambda round: Student(stages=[nn.Linear(2, 3), nn.Tanh(), nn.Flatten()], head=nn.Linear(27, L)), (9, 2)),
}


@pytest.mark.parametrize("rung", [Rung(1, "deep"), Rung(1, "start", at=1), Rung(1, "deep", at=1)])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_networks_that_come_along_have_stages(kind, rung):
    torch.manual_seed(3)
    make, shape = MAKERS[kind]
    x = torch.randn(16, *shape)
    students = chain(rung, make=make, x=x)
    for number in (1, 2):
        student, earlier = students[number], students[:number]
        assert any(key != FEATURES for _, key in sources(student, earlier))
        linked = linked_activations(student, earlier, x)
        again = rebuild(*describe(student))
        assert torch.equal(again(x, linked), student(x, linked))
        linked[0] = linked[0] + 1
        assert not torch.allclose(student(x, linked), again(x, linked_activations(student, earlier, x)))


def test_projections_between_students_of_other_widths():
    x = torch.randn(2, 7)
    wider = lambda round: MLPStudent(7, (6 + round, 5, 4 + round), L)  # noqa: E731
    students = chain(Rung(1, "deep"), make=wider, x=x)
    assert students[2].body.projections["0"].weight.shape == (8, 7)
    assert run_student(students[2], students[:2], x).shape == (2, L)
    with pytest.raises(UserError, match=r"Stage 2 of the student cannot take its input of \(2, 6\)"):
        chain(Rung(1, "start", at=1), make=wider, x=x)


def test_a_link_over_steps_takes_any_number_of_them():
    students = chain(
        Rung(1, "deep"), make=lambda round: SequenceConvStudent(2, L, (3, 4), (1, 2)), x=torch.randn(2, 9, 2)
    )
    assert run_student(students[2], students[:2], torch.randn(3, 14, 2)).shape == (3, L)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_a_recurrent_student_starts_from_a_projection_of_the_state(cell):
    x = torch.randn(2, 9, 2)
    first, second, _ = chain(Rung(1, "deep"), make=lambda round: RecurrentStudent(2, L, 3 + round, cell), x=x)
    state = second.adapt(first.features(x))[None]
    out, _ = second.body.net(x, (state, 0 * state) if cell == "lstm" else state)
    expected = second.head(out[:, -1]) + first.features(x) @ second.join.project.weight.T
    torch.testing.assert_close(run_student(second, [first], x), expected)


def test_a_class_with_features_of_its_own_answers_by_them_everywhere(x):
    """It was trained by them, so that its stages alone would be another student."""

    class Scaled(ConvStudent):
        def features(self, x, linked=()):
            return super().features(2 * x, linked)

    students = chain(Rung(1, "deep"), make=lambda round: Scaled((3, 4, 6), 2, L, 1), x=x)
    assert students[1].reads == [(1, FEATURES)]
    by_hand = run_student(students[0], [], x)
    assert torch.equal(next(ProgressiveEnsemble(students).stages(x)).logits, by_hand)
    torch.testing.assert_close(by_hand, students[0].head(students[0].body(2 * x)))


@pytest.mark.parametrize("rung", [Rung(1, "deep"), Rung(1, "start", at=1)])
def test_a_link_changes_nothing_in_the_earlier_student(rung, x):
    first, before = make().train(), {}
    before |= {name: value.clone() for name, value in first.state_dict().items()}
    make().link([first], rung, x)
    assert first.training
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())


def test_without_stages_the_link_is_to_features(x):
    plain = lambda round: Student(nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE**2, 3)), nn.Linear(3, L))  # noqa: E731
    _, second, _ = chain(Rung(1, "deep"), make=plain, x=x)
    assert second.reads == [(1, FEATURES)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"links": 2, "kind": "deep"}, "`links` of a rung of kind 'deep' to be 1, got 2"),
        ({"links": 0, "kind": "start", "at": 1}, "`links` of a rung of kind 'start' to be 1, got 0"),
        ({"links": 1, "kind": "start"}, "`at` of a rung to be >= 1 for kind 'start'.*got 0"),
        ({"links": 1, "at": 1}, "and 0 for others, got 1 with kind 'concat'"),
    ],
)
def test_rungs_that_mean_nothing(options, message):
    with pytest.raises(UserError, match=message):
        Rung(**options)


def test_names():
    assert [Rung(1, "deep").name, Rung(1, "deep", at=1).name, Rung(1, "start", at=2, width=1.5).name] == [
        "F1-deep", "F1-deep1", "F1-start2 x1.5",
    ]  # fmt: skip


def test_what_does_not_fit_together_is_said(x):
    first = make().link([], Rung(0))
    with pytest.raises(UserError, match=r"an example `x` beside a rung of kind 'deep'"):
        make().link([first], Rung(1, "deep"))
    with pytest.raises(UserError, match=r"not the last of this one's 4, got 4; .* after stages \[1, 2, 3\]"):
        make().link([first], Rung(1, "start", at=4), x)
    other = ConvStudent((3, 4), 2, L)
    other.body.stages[1][0].stride = 1
    with pytest.raises(UserError, match=r"one resolution after stage 2, got \(4, 6, 6\) and \(4, 3, 3\)"):
        other.link([first], Rung(1, "deep"), x)
    with pytest.raises(UserError, match=r"has those after stages 1, the one before after 1, 2, 3"):
        ConvStudent((3,), 2, L).link([first], Rung(1, "deep", at=1), x)
    changing = Student(
        stages=[nn.Conv2d(2, 3, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(6))],
        head=nn.Linear(6, L),
    )
    changing.body(x)
    with pytest.raises(UserError, match="Stage 2 of the student changes its input in place"):
        changing.link([copy.deepcopy(changing)], Rung(1, "start", at=1), x)


@pytest.mark.parametrize("parts", [{}, {"head": nn.Linear(2, 2)}, {"body": nn.Identity(), "stages": [nn.Identity()]}])
def test_a_student_is_a_body_or_stages_and_a_head(parts):
    with pytest.raises(UserError, match=r"Expected Student\(body, head\) or Student\(stages="):
        Student(**parts)
