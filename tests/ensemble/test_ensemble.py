"""The ensemble against the mean of its students, budgets and the work that they save, save and load."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bdistil.ensemble.budget import Budget
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError, UserError
from bdistil.models.student import Rung, Student, build_student, run_student
from bdistil.storage.blueprint import describe
from bdistil.storage.run_directory import RunDirectory

IN, L, T, B = 5, 4, 4, 40
MACS = [10, 25, 45, 70]
SCALE = 2.5
RUNGS = [Rung(0), Rung(1), Rung(2, "hidden"), Rung(2, "residual")]


class Body(nn.Module):
    """Features of x, and how many rows were asked for in each call."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(IN, width), nn.BatchNorm1d(width)
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return torch.tanh(self.norm(self.layer(x)))


def make_student(number):
    # The later a student, the surer.
    student = Student(Body(3 + number), nn.Linear(3 + number, L))
    student.head.weight.data.mul_(1 + 2 * number)
    return student


def make_students(plain=None):
    """Linked students; `plain` is the number of one that is any other module."""
    students = []
    for number, rung in enumerate(RUNGS):
        student = nn.Linear(IN, L) if number == plain else build_student(make_student, number, students, rung)
        run_student(student, students, torch.randn(32, IN) + 1)  # statistics that are not those of the start
        students.append(student)
    return students


def forget(ensemble):
    for student in ensemble.students:
        student.body.seen.clear()


def rows_seen(ensemble):
    """Rows that each student's body worked on since `forget`."""
    return [sum(student.body.seen) for student in ensemble.students]


@pytest.fixture
def ensemble():
    ensemble = ProgressiveEnsemble(make_students(), scale=SCALE, macs=MACS)
    forget(ensemble)
    return ensemble


@pytest.fixture
def x():
    return torch.randn(B, IN)


def prefixes(students, x):
    """Logits (T, B, L) of every prefix: the mean of the students' own answers."""
    answers = [run_student(student, students[:number], x) for number, student in enumerate(students)]
    return [SCALE * sum(answers[: k + 1]) / (k + 1) for k in range(len(answers))]


# ---- prefixes


@pytest.mark.parametrize("plain", [None, 0, 2])
def test_prefixes_are_means_of_the_students(plain, x):
    students = make_students(plain)
    ensemble = ProgressiveEnsemble(students, scale=SCALE, macs=MACS)
    expected = prefixes([s.eval() for s in students], x)
    stages = list(ensemble.stages(x))
    assert [stage.index for stage in stages] == [1, 2, 3, 4]
    assert [stage.macs for stage in stages] == MACS == ensemble.macs
    for stage, logits in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.logits, logits)
        torch.testing.assert_close(ensemble(x, stages=stage.index), logits)
        torch.testing.assert_close(ensemble.predict(x, Budget(stages=stage.index)).logits, logits)
    torch.testing.assert_close(ensemble(x), expected[-1])
    assert len(ensemble) == T


def test_stages_run_when_they_are_asked_for(ensemble, x):
    stages = ensemble.stages(x)
    for number in range(T + 1):
        assert rows_seen(ensemble) == [B] * number + [0] * (T - number)
        stage = next(stages, None)
    assert stage is None


def test_each_body_runs_once_however_many_link_to_it(ensemble, x):
    ensemble(x)
    assert rows_seen(ensemble) == [B] * T
    forget(ensemble)
    ensemble(x, stages=2)
    assert rows_seen(ensemble) == [B, B, 0, 0]


@pytest.mark.parametrize("stages", [0, -1, T + 1])
def test_stages_that_are_not_there(ensemble, x, stages):
    with pytest.raises(UserError, match=rf"`stages` to be in 1 … {T}, got {stages}\."):
        ensemble(x, stages=stages)


def test_students_are_finished(ensemble, x):
    before = ensemble(x)
    assert ensemble.train() is ensemble
    assert not any(module.training for module in ensemble.modules())
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert not ensemble(x.requires_grad_()).requires_grad
    assert torch.equal(ensemble(x), before)  # in train mode, batch norm would have moved


def test_costs_of_each_student_alone_are_refused():
    with pytest.raises(UserError, match=r"cumulative `macs`, .* got \[42, 42, 42\]"):
        ProgressiveEnsemble([nn.Linear(6, 7) for _ in range(3)], macs=[42, 42, 42])


def test_costs_that_nobody_counted():
    assert ProgressiveEnsemble(make_students()).macs == [0] * T


# ---- budgets


def assert_is_what_it_says(ensemble, prediction, x):
    """Each sample has the answer of the prefix that it reports, and its cost."""
    expected = torch.stack(list(prefixes(ensemble.students, x)))
    torch.testing.assert_close(prediction.logits, expected[prediction.stages - 1, torch.arange(len(x))])
    assert torch.equal(prediction.macs, torch.tensor(MACS)[prediction.stages - 1])
    assert prediction.stages.dtype == prediction.macs.dtype == torch.int64
    assert prediction.stages.shape == prediction.macs.shape == (len(x),)


@pytest.mark.parametrize(
    ("budget", "stages"),
    [
        (None, 4),
        (Budget(), 4),
        (Budget(stages=1), 1),
        (Budget(stages=3), 3),
        (Budget(stages=99), 4),
        (Budget(macs=1), 1),  # at least one stage
        (Budget(macs=24), 1),
        (Budget(macs=25), 2),
        (Budget(macs=1000), 4),
        (Budget(stages=3, macs=25), 2),  # the first to bind wins
        (Budget(stages=1, macs=25), 1),
        (Budget(seconds=1e-9), 1),
        (Budget(stages=2, seconds=1e9), 2),
    ],
    ids=str,
)
def test_limits_that_are_the_same_for_all_samples(ensemble, x, budget, stages):
    prediction = ensemble.predict(x, budget)
    assert rows_seen(ensemble) == [B] * stages + [0] * (T - stages)
    assert prediction.stages.tolist() == [stages] * B
    assert_is_what_it_says(ensemble, prediction, x)


@pytest.mark.parametrize(("seconds", "stages"), [(0.5, 1), (1.9, 1), (2.0, 2), (2.9, 2), (3.0, 3), (5.9, 3), (6.0, 4)])
def test_no_student_starts_that_would_end_too_late(ensemble, x, monkeypatch, seconds, stages):
    # A clock by which the students take 1, 1, 2 and 1 seconds: the longest so far is what the next is taken to need.
    now = [100.0]
    for module in ("ensemble", "stages"):
        monkeypatch.setattr(f"bdistil.ensemble.{module}.time", SimpleNamespace(perf_counter=lambda: now[0]))
    for student, taken in zip(ensemble.students, (1.0, 1.0, 2.0, 1.0), strict=True):
        student.head.register_forward_hook(lambda *_, taken=taken: now.__setitem__(0, now[0] + taken))
    prediction = ensemble.predict(x, Budget(seconds=seconds))
    assert rows_seen(ensemble) == [B] * stages + [0] * (T - stages)
    assert prediction.stages.tolist() == [stages] * B
    assert_is_what_it_says(ensemble, prediction, x)


def test_seconds_are_real_seconds(ensemble, x):
    for student in ensemble.students:
        student.head.register_forward_hook(lambda *_: time.sleep(0.05))
    prediction = ensemble.predict(x, Budget(seconds=0.07))
    assert prediction.stages.tolist() == [1] * B


def stages_by_hand(ensemble, x, confidence, at_most=T):
    """The first prefix, sample by sample, whose largest probability reaches the confidence."""
    sure = torch.stack([p.softmax(-1).amax(-1) >= confidence for p in prefixes(ensemble.students, x)[: at_most - 1]])
    return [next((k + 1 for k, s in enumerate(column) if s), at_most) for column in sure.T.tolist()]


@pytest.mark.parametrize(
    "more", [{}, {"stages": 3}, {"macs": 30}, {"stages": 3, "macs": 30}, {"seconds": 1e9}], ids=str
)
@pytest.mark.parametrize("confidence", [1e-6, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_decided_samples_leave(ensemble, x, confidence, more):
    at_most = Budget(**more).stages_within(MACS)
    expected = stages_by_hand(ensemble, x, confidence, at_most)
    forget(ensemble)
    prediction = ensemble.predict(x, Budget(confidence=confidence, **more))
    # A body saw the samples that were not decided before it, and no other.
    assert rows_seen(ensemble) == [sum(k >= number + 1 for k in expected) for number in range(T)]
    assert all(0 not in student.body.seen for student in ensemble.students)
    assert prediction.stages.tolist() == expected
    assert_is_what_it_says(ensemble, prediction, x)


def test_the_samples_of_these_tests_leave_at_every_stage(ensemble, x):
    assert {k for c in (0.4, 0.5, 0.6, 0.8) for k in stages_by_hand(ensemble, x, c)} == {1, 2, 3, 4}


@pytest.mark.parametrize("budget", [None, Budget(stages=2), Budget(confidence=0.5)], ids=str)
def test_a_batch_of_none(ensemble, budget):
    prediction = ensemble.predict(torch.randn(0, IN), budget)
    assert prediction.logits.shape == (0, L)
    assert prediction.stages.shape == prediction.macs.shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": 0}, "`stages` of a budget to be a whole number >= 1, got 0"),
        ({"macs": 0}, "`macs` of a budget to be a number > 0, got 0"),
        ({"macs": -3}, "`macs` of a budget to be a number > 0, got -3"),
        ({"seconds": 0.0}, "`seconds` of a budget to be a number > 0, got 0.0"),
        ({"confidence": 0.0}, r"`confidence` of a budget to be in \(0, 1\] or 'fitted', got 0.0"),
        ({"confidence": 1.5}, r"`confidence` of a budget to be in \(0, 1\] or 'fitted', got 1.5"),
        ({"confidence": float("nan")}, "got nan"),
        ({"confidence": True}, "got True"),
        ({"confidence": "0.9"}, "got '0.9'"),
        ({"stages": 2.5}, "`stages` of a budget to be a whole number >= 1, got 2.5"),
        ({"stages": True}, "`stages` of a budget to be a whole number >= 1, got True"),
        ({"macs": True}, "got True"),
        ({"seconds": "1"}, "`seconds` of a budget to be a number > 0, got '1'"),
        ({"seconds": float("nan")}, "`seconds` of a budget to be a number > 0, got nan"),
    ],
)
def test_budgets_that_make_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        Budget(**values)


def test_numbers_of_numpy_are_limits(ensemble, x):
    budget = Budget(stages=np.int64(2), macs=np.float64(1e9), confidence=np.float32(0.5))
    expected = ensemble.predict(x, Budget(stages=2, confidence=0.5))
    assert torch.equal(ensemble.predict(x, budget).stages, expected.stages)


# ---- save and load


def commit(run, students, blueprint=True):
    run.prepare()
    for number, student in enumerate(students):
        plan, tensors = describe(student.eval()) if blueprint else (None, student.state_dict())
        record = {
            "rung": vars(RUNGS[number]),
            "scale": SCALE,
            "curve": {"macs": MACS[number]},
            "blueprint": plan,
            "indescribable": None if blueprint else "test_ensemble.<locals>.Local cannot be imported by name",
        }
        run.commit(number, tensors, record)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def saved(run, x):
    """A run of linked students, and their answers."""
    students = make_students()
    commit(run, students)
    return run, ProgressiveEnsemble(students, scale=SCALE)(x)


@pytest.mark.parametrize("student", [None, make_student])
def test_a_run_loads_with_the_same_bits(saved, x, student):
    run, expected = saved
    state = torch.get_rng_state()
    ensemble = ProgressiveEnsemble.load(run.root, student=student)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ensemble(x), expected)
    assert (len(ensemble), ensemble.scale, ensemble.macs) == (T, SCALE, MACS)
    assert not ensemble.training
    assert not any(p.requires_grad for p in ensemble.parameters())


def test_a_student_that_only_its_function_can_make(run, x):
    students = make_students()
    expected = ProgressiveEnsemble(students, scale=SCALE)(x)
    commit(run, students, blueprint=False)
    message = r"student of round 1 .*\(test_ensemble.<locals>.Local cannot.*student=make_student"
    with pytest.raises(UserError, match=message):
        ProgressiveEnsemble.load(run.root)
    assert torch.equal(ProgressiveEnsemble.load(run.root, student=make_student)(x), expected)


def test_a_class_that_is_gone(saved, x):
    run, expected = saved
    path = run.folder(2) / "round.json"
    path.write_text(path.read_text().replace("test_ensemble.Body", "gone.Body"))
    with pytest.raises(UserError, match=r"gone\.Body, which cannot be imported .*student=make_student"):
        ProgressiveEnsemble.load(run.root)
    assert torch.equal(ProgressiveEnsemble.load(run.root, student=make_student)(x), expected)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("student.safetensors", None, r"student\.safetensors of a committed round is missing"),
        ("student.safetensors", lambda b: b[:-8], r"student\.safetensors of a committed round is torn: \d+ bytes, \d+"),
        ("student.safetensors", lambda b: b[:-1] + b"~", r"student\.safetensors .* has changed since it was written"),
        ("round.json", None, r"round\.json of a committed round is missing or torn"),
        ("round.json", lambda b: b[: len(b) // 2], r"round\.json of a committed round is missing or torn"),
        ("round.json", lambda b: b"", r"round\.json of a committed round is missing or torn"),
        ("round.json", lambda b: b"\xff" * len(b), r"round\.json of a committed round is missing or torn"),
    ],
    ids=["weights gone", "weights torn", "weights changed", "record gone", "half", "empty", "no text"],
)
def test_a_damaged_round_is_named_and_kept(saved, name, damage, message):
    run, _ = saved
    path = run.folder(1) / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    before = {p: p.stat().st_size for p in run.root.rglob("*")}
    with pytest.raises(RunError, match=rf"rounds/001/{message}.*Nothing was deleted\. Put the file back"):
        ProgressiveEnsemble.load(run.root)
    assert {p: p.stat().st_size for p in run.root.rglob("*")} == before


def test_a_round_that_is_gone(saved):
    run, _ = saved
    (run.folder(1)).rename(run.root / "elsewhere")
    with pytest.raises(RunError, match=r"rounds/001 is missing, but later rounds are there"):
        ProgressiveEnsemble.load(run.root)


@pytest.mark.parametrize("prepared", [True, False])
def test_nothing_to_load(run, prepared):
    if prepared:
        run.prepare()
    there = "No round is committed in" if prepared else "There is no folder"
    with pytest.raises(UserError, match=there + r" `run_dir` .*run\. Train one with `bdistil fit`"):
        ProgressiveEnsemble.load(run.root)
    assert run.root.exists() == prepared


def make_regression():
    torch.manual_seed(0)
    return ProgressiveEnsemble(
        [Student(nn.Linear(IN, 4), nn.Linear(4, 1)) for _ in range(2)], scale=[100.0], offset=[200_003.0]
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_units_of_a_regression_stay_in_float32(half, x):
    """In bfloat16 the offset would be 199,680, in float16 infinite."""
    expected = make_regression()(x)
    torch.testing.assert_close(make_regression().to(half)(x.to(half)), expected, atol=2.0, rtol=0)
    torch.testing.assert_close(make_regression().to(half).float()(x), expected, atol=2.0, rtol=0)


def test_a_regression_is_materialised_from_meta(x):
    other = make_regression().to("meta").to_empty(device="cpu")
    other.load_state_dict(make_regression().state_dict())
    assert torch.equal(other(x), make_regression()(x))


def test_a_state_dict_has_the_units_of_a_regression(x):
    saved = make_regression()
    other = ProgressiveEnsemble(
        [Student(nn.Linear(IN, 4), nn.Linear(4, 1)) for _ in range(2)], scale=[1.0], offset=[0.0]
    )
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))
    plain = ProgressiveEnsemble([Student(nn.Linear(IN, 4), nn.Linear(4, 1)) for _ in range(2)])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"scale\", \"offset\""):
        plain.load_state_dict(saved.state_dict())


def test_a_confidence_alone_is_no_budget(ensemble, x):
    with pytest.raises(UserError, match=r"Expected a Budget, got 0\.9: predict\(x, Budget\(confidence=0\.9\)\)"):
        ensemble.predict(x, 0.9)
