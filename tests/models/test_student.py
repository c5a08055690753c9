"""Students and their links: what is added, what is read of earlier students, and what never reaches them."""

import copy

import pytest
import torch
from torch import nn

from bdistil.errors import UserError
from bdistil.models import ConvStudent, MLPStudent, RecurrentStudent, SequenceConvStudent
from bdistil.models.student import Rung, Student, linkable, linked_activations, linked_numbers, links_of, run_student

IN, L = 6, 3
WIDTHS = [4, 5, 2]  # D differs from student to student


def body(width):
    return nn.Sequential(nn.Linear(IN, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, width))


def a_student(width=4):
    return Student(body(width), nn.Linear(width, L))


@pytest.fixture
def earlier():
    """Three finished students, the oldest first."""
    students = [a_student(width) for width in WIDTHS]
    for student in students:
        student.body(torch.randn(32, IN) + 1)  # so that the statistics are not those of the start
    return [student.eval() for student in students]


@pytest.fixture
def x():
    return torch.randn(7, IN)


# ---- what links add


def features_of(students, x):
    """What links read, the most recent first."""
    return torch.cat([s.body(x) for s in reversed(students)], 1)


def test_concat_is_one_head_over_the_concatenation(earlier, x):
    student = a_student(3).eval().link(earlier, Rung(3))
    head = nn.Linear(3 + sum(WIDTHS), L)
    head.weight.data = torch.cat((student.head.weight, student.join.project.weight), 1).data
    head.bias.data = student.head.bias.data
    expected = head(torch.cat((student.body(x), features_of(earlier, x)), 1))
    torch.testing.assert_close(run_student(student, earlier, x), expected)
    assert student.join.project.weight.shape == (L, sum(WIDTHS))
    assert student.join.project.bias is None


def test_residual_adds_a_projection_to_the_features(earlier, x):
    student = a_student(3).eval().link(earlier, Rung(2, "residual"))
    project = student.join.project
    expected = student.head(student.body(x) + features_of(earlier[1:], x) @ project.weight.T + project.bias)
    torch.testing.assert_close(run_student(student, earlier, x), expected)
    assert project.weight.shape == (3, WIDTHS[1] + WIDTHS[2])


def test_hidden_joins_own_and_linked_activations_in_a_layer(earlier, x):
    student = a_student(3).eval().link(earlier, Rung(2, "hidden", hidden=9))
    first, _, second = student.join.project
    joined = torch.cat((student.body(x), features_of(earlier[1:], x)), 1)
    hidden = (joined @ first.weight.T + first.bias).clamp_min(0)
    expected = student.head(student.body(x)) + hidden @ second.weight.T + second.bias
    torch.testing.assert_close(run_student(student, earlier, x), expected)
    assert first.weight.shape == (9, 3 + WIDTHS[1] + WIDTHS[2])


def test_the_most_recent_student_is_read_first(earlier, x):
    student = a_student().link(earlier, Rung(2))
    assert student.join.project.in_features == WIDTHS[2] + WIDTHS[1]
    found = linked_activations(student, earlier, x)
    assert [f.shape[1] for f in found] == [WIDTHS[2], WIDTHS[1]]
    torch.testing.assert_close(found[0], earlier[2].body(x))
    torch.testing.assert_close(found[1], earlier[1].body(x))


@pytest.mark.parametrize("kind", ["concat", "residual", "hidden"])
def test_exported_features_are_those_before_links_join(earlier, x, kind):
    student = a_student().eval()
    before = student.features(x)
    student.link(earlier, Rung(2, kind))
    assert torch.equal(student.features(x), before)
    assert torch.equal(before, student.body(x))


@pytest.mark.parametrize(("number", "links"), [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_first_rounds_get_fewer_links(earlier, number, links):
    student = a_student()
    assert student.link(earlier[:number], Rung(2)) is student
    assert student.links == links_of(student) == links
    assert (student.join is None) == (links == 0)


def test_a_rung_without_links_adds_nothing(earlier, x):
    student = a_student().eval().link(earlier, Rung(0))
    assert links_of(student) == 0
    assert torch.equal(run_student(student, earlier, x), student.head(student.body(x)))


# ---- what never reaches an earlier student


@pytest.mark.parametrize("kind", ["concat", "residual", "hidden"])
def test_training_leaves_earlier_students_alone(earlier, x, kind):
    before = copy.deepcopy([s.state_dict() for s in earlier])
    student = a_student().link(earlier, Rung(3, kind))
    assert not any(f.requires_grad for f in linked_activations(student, earlier, x))
    run_student(student, earlier, x).square().sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for s in earlier for p in s.parameters())
    for student_before, s in zip(before, earlier, strict=True):
        assert all(torch.equal(student_before[name], value) for name, value in s.state_dict().items())


def test_a_link_runs_bodies_and_no_heads(earlier, x):
    calls = []
    for number, s in enumerate(earlier):
        s.body.register_forward_hook(lambda *_, number=number: calls.append(f"body {number}"))
        s.head.register_forward_hook(lambda *_, number=number: calls.append(f"head {number}"))
    run_student(a_student().link(earlier, Rung(2)), earlier, x)
    assert calls == ["body 2", "body 1"]


# ---- any other module


def test_a_plain_module_takes_no_links(earlier, x):
    plain = nn.Linear(IN, L)
    assert links_of(plain) == 0
    assert linked_activations(plain, earlier, x) == []
    assert torch.equal(run_student(plain, earlier, x), plain(x))


def test_a_plain_module_exports_no_features(earlier, x):
    mixed = [earlier[0], nn.Linear(IN, L), earlier[2], nn.Identity()]
    assert linkable(mixed) == [earlier[2], earlier[0]]
    assert [linked_numbers(mixed, links) for links in range(4)] == [[], [2], [2, 0], [2, 0]]
    student = a_student().eval().link(mixed, Rung(2))
    assert student.links == 2
    torch.testing.assert_close(
        run_student(student, mixed, x),
        student.head(student.body(x)) + features_of([earlier[0], earlier[2]], x) @ student.join.project.weight.T,
    )
    assert a_student().link([nn.Identity()], Rung(1)).links == 0


# ---- refusals


@pytest.mark.parametrize(
    ("body", "got"), [(nn.Linear(IN, 5), r"\(7, 5\)"), (nn.Unflatten(1, (3, 2)), r"\(7, 3, 2\)"), (nn.Flatten(0), "42")]
)
def test_body_of_another_shape(x, body, got):
    with pytest.raises(UserError, match=rf"features \(B, 4\), got \(?{got}.*flatten or a pooling"):
        Student(body, nn.Linear(4, L))(x)


@pytest.mark.parametrize("given", [{}, {"features": 4}, {"outputs": L}])
def test_a_head_that_does_not_say_its_sizes(given):
    message = (
        rf"`features` and `outputs` .*not nn.Linear, got Sequential with features={given.get('features')}, outputs="
    )
    with pytest.raises(UserError, match=message):
        Student(body(4), nn.Sequential(nn.Linear(4, L)), **given)


def test_a_head_whose_sizes_are_given(earlier, x):
    head = nn.Sequential(nn.ReLU(), nn.Linear(4, L))
    student = Student(body(4), head, features=4, outputs=L).eval().link(earlier, Rung(1))
    expected = head(student.body(x)) + earlier[2].body(x) @ student.join.project.weight.T
    torch.testing.assert_close(run_student(student, earlier, x), expected)


# ---- rungs


@pytest.mark.parametrize(
    ("rung", "name"),
    [
        (Rung(), "F0"),
        (Rung(1), "F1"),
        (Rung(2, "hidden"), "F2-hidden"),
        (Rung(1, "residual"), "F1-residual"),
        (Rung(0, "hidden"), "F0"),
        (Rung(1, width=1.5), "F1 x1.5"),
        (Rung(0, width=2.0), "F0 x2"),
        (Rung(2, "hidden", width=0.5), "F2-hidden x0.5"),
    ],
)
def test_names_of_rungs(rung, name):
    assert rung.name == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"links": -1}, "`links` of a rung to be >= 0, got -1"),
        ({"kind": "sum"}, "'hidden', 'deep', 'start', got 'sum'"),
        ({"hidden": 0}, "`hidden` >= 1 and `width` > 0 of a rung, got 0 and 1.0"),
        ({"width": 0.0}, "`hidden` >= 1 and `width` > 0 of a rung, got 32 and 0.0"),
        ({"width": -1.5}, "got 32 and -1.5"),
    ],
)
def test_values_that_no_rung_has(values, message):
    with pytest.raises(UserError, match=message):
        Rung(**values)


@pytest.mark.parametrize(
    ("make", "given", "got"),
    [
        (ConvStudent, {"channels": [0, 3]}, r"got \[0, 3\]"),
        (ConvStudent, {"channels": [-4, 3]}, r"got \[-4, 3\]"),
        (SequenceConvStudent, {"in_channels": 3, "outputs": 2, "channels": [0]}, r"got \[0\]"),
        (MLPStudent, {"features": 3, "hidden": [-2]}, r"and \[-2\]"),
        (RecurrentStudent, {"in_channels": 3, "outputs": 2, "hidden": 0}, "'gru', 3, 0"),
        (ConvStudent, {"width": 0.0}, r"`width` of a student to be > 0, got 0\.0"),
        (MLPStudent, {"features": 3, "width": -1.0}, r"`width` of a student to be > 0, got -1\.0"),
    ],
)
def test_channels_below_one_are_refused_not_rounded_up(make, given, got):
    with pytest.raises(UserError, match=got):
        make(**given)
