"""Early answers on sequences: segments, states handed over, what is read and what it costs, and whole runs."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.toys import TIMES, Hook, Killed, Toys, boost, by_hand, control, curve, digests, fit, settings_for
from torch import nn

from bdistil import Budget, ProgressiveEnsemble, Rung, Student
from bdistil.ensemble.calibration import Calibration
from bdistil.errors import UserError
from bdistil.metrics.cost import measure_cost
from bdistil.models.recurrent import RecurrentNet, RecurrentSegmentStudent
from bdistil.models.segment_student import SegmentStudent
from bdistil.models.student import build_student, linked_activations, run_student
from bdistil.runner import BatchTimes

M, C, L, H, T = 13, 3, 4, 5, 4

CELLS = {"gru": (nn.GRU, 3, 1), "lstm": (nn.LSTM, 4, 2), "rnn": (nn.RNN, 1, 1)}
ENDS = [3, 6, 9, 13]  # of 13 steps in 4 segments


def make(round, width=1.0, cell="gru"):
    return RecurrentSegmentStudent(C, L, T, H, cell, width)


def chain(cell="gru", rung=Rung(1), widths=(1.0,) * T):  # noqa: B008
    """Students of untrained weights, linked as in a run."""
    students = []
    for number, width in enumerate(widths):
        students.append(build_student(partial(make, width=width, cell=cell), number, students, rung).eval())
    return students


@pytest.fixture
def x():
    return torch.randn(6, M, C)


# ---- segments


@pytest.mark.parametrize(("segments", "steps"), [(4, 13), (8, 50), (1, 7), (7, 7), (5, 99)])
def test_segments_follow_each_other_to_the_end(segments, steps):
    students = []
    for _ in range(segments):
        students.append(SegmentStudent(nn.Identity(), nn.Linear(2, L), segments).link(students, Rung(0)))
    spans = [student.span(steps) for student in students]
    assert [step for low, high in spans for step in range(low, high)] == list(range(steps))
    sizes = [high - low for low, high in spans]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


# ---- the state that is handed over


@pytest.mark.parametrize("cell", CELLS)
def test_students_of_the_same_weights_are_one_net_over_the_whole_sequence(x, cell):
    """An independent reference: torch's own net, asked after the end of each segment."""
    students = chain(cell)
    for student in students[1:]:
        student.body.load_state_dict(students[0].body.state_dict())
    whole = CELLS[cell][0](C, H, batch_first=True)
    whole.load_state_dict(students[0].body.net.state_dict())
    for number, (student, end) in enumerate(zip(students, ENDS, strict=True)):
        state = whole(x[:, :end])[1]
        expected = torch.cat(state, -1)[0] if cell == "lstm" else state[0]
        linked = linked_activations(student, students[:number], x)
        torch.testing.assert_close(student.features(x, linked), expected)
        torch.testing.assert_close(run_student(student, students[:number], x), student.head(expected))


def test_without_a_link_a_student_starts_from_nothing(x):
    students = chain(rung=Rung(0))
    assert [s.links for s in students] == [0] * T
    torch.testing.assert_close(students[2].features(x), students[2].body.net(x[:, 6:9])[1][0])


def test_a_state_of_another_width_goes_through_a_layer(x):
    students = chain(widths=(1.0, 2.0, 3.0))
    assert [s.width for s in students] == [H, 2 * H, 3 * H]
    state = students[0].features(x)
    expected = students[1].body(x[:, 3:6], state @ students[1].adapt.weight.T + students[1].adapt.bias)
    torch.testing.assert_close(students[1].features(x, [state]), expected)


def test_a_wider_class_joins_states_at_the_head_as_well(x):
    students = chain(rung=Rung(2, "hidden", 7), widths=(1.0,) * 3)
    linked = linked_activations(students[2], students[:2], x)
    own = students[2].body(x[:, 6:9], linked[0])
    hidden = students[2].join.project[0](torch.cat((own, *linked), 1)).clamp_min(0)
    expected = students[2].head(own) + students[2].join.project[2](hidden)
    torch.testing.assert_close(run_student(students[2], students[:2], x), expected)
    assert (students[2].links, students[2].states_read) == (2, 1)


def test_no_gradient_reaches_an_earlier_student(x):
    students = chain()
    run_student(students[2], students[:2], x).square().sum().backward()
    assert all(p.grad is None for s in students[:2] for p in s.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in students[2].parameters())


# ---- what is read


def test_a_stage_knows_nothing_of_the_steps_after_it(x):
    ensemble = ProgressiveEnsemble(chain())
    for number, stage in enumerate(ensemble.stages(x)):
        spoilt = x.clone()
        spoilt[:, ENDS[number] :] = 99.0
        assert torch.equal(ensemble(spoilt, stages=number + 1), stage.logits)
        spoilt[:, ENDS[number] - 1] = 99.0
        assert not torch.equal(ensemble(spoilt, stages=number + 1), stage.logits)


class Arriving:
    """A stream: steps come when they are asked for."""

    def __init__(self, x):
        self.x, self.shape, self.asked = x, x.shape, []

    def __getitem__(self, where):
        rows, steps = where
        assert rows == slice(None)
        self.asked.append((steps.start, steps.stop))
        return self.x[where]


def test_steps_are_asked_for_when_their_stage_is(x):
    ensemble, stream = ProgressiveEnsemble(chain()), Arriving(x)
    expected = list(ensemble.stages(x))
    for number, stage in enumerate(ensemble.stages(stream)):
        assert stream.asked == list(zip([0, *ENDS], ENDS, strict=False))[: number + 1]
        assert torch.equal(stage.logits, expected[number].logits)


def test_a_calibrated_ensemble_reads_a_stream(x):
    times = BatchTimes(1, (1e-3,) * T, (1e-3,) * T, 1e-6, 1e-6)
    ensemble = ProgressiveEnsemble(chain(), calibration=Calibration(T, times=(times,)))
    assert torch.equal(ensemble(Arriving(x)), ensemble(x))


def test_an_exit_ends_the_reading_of_a_sample(x):
    """Counts every step that goes into a body: those of the segments up to the exit, not one more."""
    ensemble = ProgressiveEnsemble(chain())
    read = []
    for student in ensemble.students:
        student.body.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[0] * inputs[0].shape[1]))
    sure = torch.stack([stage.logits.softmax(-1).amax(-1) for stage in ensemble.stages(x)])
    read.clear()
    found = ensemble.predict(x, Budget(confidence=float(sure[:2].median())))
    assert found.stages.unique().numel() > 1
    assert sum(read) == sum(ENDS[stage - 1] for stage in found.stages.tolist()) < len(x) * M
    read.clear()
    ensemble.predict(x, Budget(stages=2))
    assert sum(read) == len(x) * ENDS[1]


def test_bodies_that_wait_for_a_state_do_not_run_together(x):
    ensemble = ProgressiveEnsemble(chain()[1:2])
    with pytest.raises(UserError, match="runs bodies of one shape together"):
        ensemble(x, schedule="all")


# ---- what it costs


@pytest.mark.parametrize("cell", CELLS)
def test_multiply_adds_of_a_stage_are_those_of_its_steps(cell):
    _, gates, states = CELLS[cell]
    students, x = chain(cell), torch.randn(1, M, C)
    for number, student in enumerate(students):
        linked = (linked_activations(student, students[:number], x),) if number else ()
        steps = ENDS[number] - [0, *ENDS][number]
        assert measure_cost(student, (x, *linked)).macs == steps * gates * H * (C + H) + states * H * L


def test_segments_of_an_lstm_cost_what_the_whole_does():
    students, costs, x = [], [], torch.randn(1, 99, 32)
    for number in range(8):
        make_one = partial(RecurrentSegmentStudent, 32, 13, 8, 64, "lstm")
        student = build_student(lambda _, make_one=make_one: make_one(), number, students, Rung(1)).eval()
        inputs = (x, linked_activations(student, students, x)) if number else (x,)
        costs.append(measure_cost(student, inputs).macs - 13 * 2 * 64)
        students.append(student)
    assert sum(costs) == 2_433_024
    assert costs[:2] == [12 * 4 * 64 * 96] * 2


# ---- whole runs


class Hums(Toys):
    """192 training, 64 validation and 64 test sequences of 13 steps, labelled by the toy teacher."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.parts = {}
        for name, count in (("train", 192), ("val", 64), ("test", 64)):
            x = torch.randn(count, M, C, generator=generator).cumsum(1) / 2
            with torch.no_grad():
                self.parts[name] = (x, make_teacher()(x).argmax(-1))


def make_teacher():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return RecurrentNet(C, L, 12, dropout=0.0).eval().requires_grad_(False)


def early(run_dir, **options):
    options = {"teacher": make_teacher(), "student": make, "settings": settings_for(T, lr=0.02), **options}
    return control(run_dir, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early") / "run"
    return fit(early(folder), Hums(), epochs=3), folder


def test_a_run_loads_without_the_code_that_made_it(run):
    controller, folder = run
    x = Hums().parts["test"][0]
    loaded = ProgressiveEnsemble.load(folder)
    assert [s.number for s in loaded.students] == list(range(T))
    assert torch.equal(loaded(x), controller.ensemble(x))
    stages = list(loaded.stages(x))
    assert [stage.macs for stage in stages] == loaded.macs
    assert loaded.macs[0] == 3 * 3 * H * (C + H) + H * L


def test_the_ledger_has_the_errors_of_the_committed_students(run):
    controller, _ = run
    x = Hums().parts["train"][0]
    ledger = controller.plan.module.ledger
    hand = by_hand(controller.ensemble, make_teacher(), x)
    error = hand.error
    ledger.open(len(x))
    ledger.use(T)
    torch.testing.assert_close(ledger.rows(torch.arange(len(x)))[1], error, atol=1e-4, rtol=1e-4)


def kill_in_round(folder, number):
    """Trains until the second epoch of a round, from 0."""

    def kill(trainer, module):
        if (module.number, trainer.current_epoch) == (number, 1):
            raise Killed

    with pytest.raises(Killed):
        fit(early(folder), Hums(), epochs=3, callbacks=lambda: [Hook(on_train_epoch_start=kill)])
    assert len(digests(folder)) == number


@pytest.mark.parametrize("lost", ["nothing", "ledger"])
def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path, lost):
    """Also where errors and states have to be made again from the committed students."""
    folder = tmp_path / "run"
    kill_in_round(folder, 2)
    if lost == "ledger":
        for file in folder.glob("ledger/*/*.f32"):
            if not file.name.startswith("teacher"):
                file.unlink()
        assert not list(folder.glob("ledger/*/features*"))
    fit(early(folder), Hums(), epochs=3)
    assert digests(folder) == digests(run[1])
    assert curve(folder, without=TIMES) == curve(run[1], without=TIMES)


def test_no_earlier_body_runs_while_a_round_is_trained(tmp_path):
    """What makes a step cost the same in round 2 and in round 20."""
    calls, handles = [], []

    def watch(trainer, module):
        handles.extend(s.body.register_forward_hook(lambda *_: calls.append(module.number)) for s in module.earlier)

    def leave(trainer, module):
        for handle in handles:
            handle.remove()

    hooks = lambda: [Hook(on_train_start=watch, on_train_end=leave)]  # noqa: E731
    fit(early(tmp_path / "run"), Hums(), epochs=1, callbacks=hooks)
    assert len(handles) == 0 + 1 + 2 + 3
    assert calls == []


def test_recomputed_state_says_the_same_of_the_first_rounds(run, tmp_path):
    """States, errors and answers of the teacher are made for every batch there."""
    settings = settings_for(2, lr=0.02, state="recompute")
    controller = boost(
        tmp_path / "run", Hums(), teacher=make_teacher(), student=make, settings=settings, trainer={"epochs": 3}
    )
    x = Hums().parts["test"][0]
    expected = ProgressiveEnsemble.load(run[1])
    torch.testing.assert_close(controller.ensemble(x), expected(x, stages=2), atol=2e-3, rtol=2e-3)
    rows = curve(tmp_path / "run")
    student, head = 3 * 3 * H * (C + H), H * L
    teacher = int(rows[0]["macs"])
    seen = 3 * 192
    first, second = (int(row["train_macs"]) for row in rows[1:])
    assert first == seen * (3 * (student + head) + teacher)
    # The second also runs the first student, for its state and its error.
    assert second == first + seen * (student + head)


# ---- what cannot be


def test_more_rounds_than_segments_are_refused_before_training(tmp_path):
    controller = early(tmp_path, settings=settings_for(T + 1))
    with pytest.raises(UserError, match=r"`rounds` .* at most 4, as many as RecurrentSegmentStudent has segments"):
        fit(controller, Hums())


def test_what_cannot_be(x):
    with pytest.raises(UserError, match=r"`segments` to be >= 1, got 0"):
        RecurrentSegmentStudent(C, L, 0)
    with pytest.raises(UserError, match=r"M >= 4 steps for as many segments, got \(6, 3, 3\)"):
        make(0)(x[:, :3])
    assert make(0)(x[:, :4]).shape == (6, L)
    with pytest.raises(UserError, match=r"at most 4 students for as many segments, got 5"):
        make(4).link(chain(), Rung(1))
    with pytest.raises(UserError, match=r"only SegmentStudents before a SegmentStudent, got Student"):
        make(1).link([Student(nn.Flatten(), nn.Linear(M * C, L))], Rung(1))
    wrong = SegmentStudent(nn.GRU(C, H, batch_first=True), nn.Linear(H + 1, L), T)
    wrong.body = nn.Identity()
    wrong.body.forward = lambda x, state: x[:, -1]
    with pytest.raises(UserError, match=r"body to return features \(B, 6\), got \(6, 3\)"):
        wrong(x)


# ---- the guide


def test_the_guide_is_true():
    """Its Python runs word for word; a stage that is sure ends the stream."""
    guide = (Path(__file__).parents[2] / "docs" / "sequences.md").read_text(encoding="utf-8")
    students, stream = re.findall(r"```python\n(.*?)```", guide, re.S)
    scope = {"__name__": "mine"}
    exec(students, scope)
    made = []
    for number in range(8):
        made.append(build_student(scope["make_student"], number, made, Rung(1)))
    asked = []
    scope["wait_for"] = lambda low, high: (asked.append((low, high)), torch.randn(1, high - low, 6))[1]
    scope["ensemble"] = ProgressiveEnsemble(made)
    exec(stream, scope)
    assert asked == [student.span(50) for student in made]
    asked.clear()
    torch.nn.init.constant_(made[0].head.bias[:1], 50.0)
    exec(stream, scope)
    assert asked == [(0, 6)]
