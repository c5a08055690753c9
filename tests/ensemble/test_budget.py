"""Stopping early: exit rules in a real prediction, deadlines, input that is no input, asyncio."""

import asyncio
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bdistil.ensemble.budget import RULES, Budget, add_votes, confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.evaluate import CONFIDENCES, sweep_budgets
from bdistil.models.inputs import InputSpec
from bdistil.models.student import Rung, Student
from bdistil.runner.stage_clock import BatchTimes, Deadline, StageClock

IN, L, T, B = 5, 4, 4, 40
MACS = [10, 25, 45, 70]
TEMPERATURES = (2.0, 1.5, 0.8, 0.5)


class Body(nn.Sequential):
    """Features of x, and how many rows came in each call."""

    def __init__(self):
        super().__init__(nn.Linear(IN, 6), nn.Tanh())
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x)


def times(stage=1e-3, check=1e-6, compact=1e-6, fixed=0.0, batches=(1, 64)):
    """A stage costs `stage` seconds a sample, and `fixed` beside."""
    per = tuple((fixed + stage * batch,) * T for batch in batches)
    return tuple(BatchTimes(batch, row, row, check, compact) for batch, row in zip(batches, per, strict=True))


@pytest.fixture
def ensemble():
    students = []
    for number in range(T):
        student = Student(Body(), nn.Linear(6, L)).link(students, Rung(1 if number else 0))
        student.head.weight.data.mul_(1 + 2 * number)
        students.append(student)
    return ProgressiveEnsemble(students, scale=2.5, macs=MACS, inputs=InputSpec((IN,), "float32"))


@pytest.fixture
def x():
    return torch.randn(B, IN)


def rows_seen(ensemble):
    return [sum(student.body.seen) for student in ensemble.students]


# ---- rules


def stages_by_hand(ensemble, x, rule, thresholds, temperatures):
    """The first stage, sample by sample, at which its confidence reaches the threshold."""
    found, votes, before = [T] * len(x), None, 0.0
    for number, stage in enumerate(ensemble.stages(x)):
        own, before = stage.total - before, stage.total
        votes = add_votes(votes, own)
        sure = confidence_of(stage.logits, rule, temperatures[number], votes)
        found = [min(f, number + 1) if s >= thresholds[number] else f for f, s in zip(found, sure, strict=True)]
    return found


LEVELS = {"max_prob": 0.55, "margin": 0.3, "entropy": 0.25, "agreement": 0.6}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fitted", [False, True])
def test_each_rule_decides_where_it_says(ensemble, x, rule, fitted):
    level = LEVELS[rule]
    thresholds = (0.9 * level, 0.8 * level, 1.1 * level, 0.0) if fitted else (level,) * T
    exits = ExitFigures(rule, thresholds, "", (0.25,) * T, 0.0, 0.0, 0.0)
    ensemble.calibration = Calibration(T, exits=exits, temperatures=TEMPERATURES)
    expected = stages_by_hand(ensemble, x, rule, thresholds, TEMPERATURES)
    assert len(set(expected)) >= 2 + (rule != "agreement")
    for student in ensemble.students:
        student.body.seen.clear()
    budget = Budget(confidence="fitted") if fitted else Budget(confidence=level, rule=rule)
    prediction = ensemble.predict(x, budget)
    assert prediction.stages.tolist() == expected
    assert rows_seen(ensemble) == [sum(e > number for e in expected) for number in range(T)]
    answers = torch.stack([stage.logits for stage in ensemble.stages(x)])
    torch.testing.assert_close(prediction.logits, answers[prediction.stages - 1, torch.arange(B)])


@pytest.mark.parametrize(
    ("budget", "calibration", "message"),
    [
        ({"confidence": "fitted"}, Calibration(T), "bdistil calibrate"),
        (
            {"confidence": "fitted", "rule": "entropy"},
            Calibration(T, exits=ExitFigures("margin", (0.5,) * T, "", (0.25,) * T, 0, 0, 0)),
            "rule 'margin', but the budget has rule='entropy'",
        ),
        ({"rule": "margin"}, Calibration(T), "without confidence"),
        ({"confidence": 0.5, "rule": "luck"}, Calibration(T), "max_prob, margin, entropy, agreement, got 'luck'"),
        ({"confidence": "sure"}, Calibration(T), "or 'fitted', got 'sure'"),
    ],
)
def test_budgets_that_contradict_themselves_or_the_ensemble(ensemble, x, budget, calibration, message):
    ensemble.calibration = calibration
    with pytest.raises(UserError, match=message):
        ensemble.predict(x, Budget(**budget))
    assert rows_seen(ensemble) == [0] * T


def test_a_sweep_of_confidences_is_by_the_rule_of_the_budget():
    budgets = sweep_budgets("confidence", Budget(rule="margin", stages=2), MACS, None, 1)
    assert [budget.confidence for budget in budgets] == list(CONFIDENCES)
    assert {(budget.rule, budget.stages) for budget in budgets} == {("margin", 2)}


@pytest.mark.parametrize("batch", [1, 16, 64, 256])
def test_a_sweep_of_seconds_reaches_from_the_first_stage_to_all(batch):
    calibration = Calibration(T, times=times(fixed=1e-3))
    seconds = [b.seconds for b in sweep_budgets("seconds", Budget(), MACS, calibration, batch)]
    late = [calibration.clock("cpu").late(stage, batch) for stage in range(T)]
    assert (seconds[0], seconds[-1]) == (pytest.approx(late[0]), pytest.approx(1.2 * sum(late)))
    assert late[0] == pytest.approx(1e-3 + batch * 1e-3, rel=0.5)


def test_a_sweep_of_seconds_needs_times_of_the_cpu():
    for calibration in (None, Calibration(T), Calibration(T, times=times(), device="cuda")):
        with pytest.raises(UserError, match="measured stage times"):
            sweep_budgets("seconds", Budget(), MACS, calibration, 1)


def test_weights_are_those_of_the_students_in_each_prefix(ensemble, x):
    totals = [stage.total for stage in ensemble.stages(x)]
    own = [now - before for now, before in zip(totals, [0.0, *totals], strict=False)]
    weights = (1.0, 0.5, 2.0, 1.5)
    ensemble.calibration = Calibration(T, weights=weights)
    for k, stage in enumerate(ensemble.stages(x), 1):
        expected = 2.5 * sum(w * f for w, f in zip(weights[:k], own, strict=False)) / sum(weights[:k])
        torch.testing.assert_close(stage.logits, expected)
        torch.testing.assert_close(ensemble.predict(x, Budget(stages=k)).logits, expected)


# ---- measured times


@pytest.mark.parametrize(
    ("batch", "seconds"), [(1, 3.0), (2, 5.0), (4, 9.0), (0.5, 1.5), (8, 18.0)], ids=str
)  # 1 and 4 measured; on from the last in proportion
def test_times_between_the_batches_measured(batch, seconds):
    clock = StageClock((BatchTimes(1, (3.0,), (3.5,), 0, 0), BatchTimes(4, (9.0,), (9.5,), 0, 0)))
    assert clock.stage(0, batch) == seconds


# ---- deadlines


@pytest.mark.parametrize(("slower", "seconds", "stages"), [(1, 3.0, 2), (1, 3.6, 3), (2, 6.9, 2), (2, 7.2, 3)])
def test_a_stage_is_taken_to_need_what_it_kept_to_and_more_on_a_slower_machine(slower, seconds, stages):
    """Stages of 1 s that keep to 1.2 s when measured; here each takes its 1.2 s times a factor."""
    now = [0.0]
    row = BatchTimes(1, (1.0,) * T, (1.2,) * T, 0, 0)
    deadline = Deadline(seconds, StageClock((row,)), lambda: now[0], 0.0)
    done = 0
    while done < T and deadline.allows(done, 1):
        now[0] += 1.2 * slower
        deadline.done(done, 1)
        done += 1
    assert done == stages


def test_seconds_count_from_the_call_and_not_from_the_first_stage(ensemble, x, monkeypatch):
    """The look at x takes 1 s, a student 1 s: of 3.5 s one student has used 2, and the next would end at 3."""
    now = [0.0]
    for module in ("ensemble", "stages"):
        monkeypatch.setattr(f"bdistil.ensemble.{module}.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(InputSpec, "check", lambda *_: now.__setitem__(0, now[0] + 1))
    for student in ensemble.students:
        student.head.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    assert ensemble.predict(x, Budget(seconds=3.5)).stages.tolist() == [2] * B


# ---- features that later students read


@pytest.mark.parametrize("links", [[0, 0, 0, 0], [0, 1, 0, 2], [0, 1, 2, 3], [0, 1, None, 2]], ids=str)
def test_those_who_stay_take_along_what_is_still_read(x, links):
    students = []
    for number in links:
        plain = number is None
        student = nn.Linear(IN, L) if plain else Student(Body(), nn.Linear(6, L)).link(students, Rung(number))
        students.append(student)
    ensemble = ProgressiveEnsemble(students, macs=MACS)
    runner, rows = ensemble.stage_runner(x), np.arange(0, B, 3)
    expected = [stage.logits[rows] for stage in ensemble.stages(x)]
    for number in range(T):
        stage = runner.step()
        torch.testing.assert_close(stage.logits, expected[number] if number else next(ensemble.stages(x)).logits)
        if number == 0:
            runner.keep(rows)
        elif number < T - 1:
            runner.keep(np.arange(len(rows)))
            reads = [n or 0 for n in links[number + 1 :]]
            assert len(runner.activations) <= max(reads)


# ---- asyncio and interruption


def slow(ensemble, seconds):
    for student in ensemble.students:
        student.body.register_forward_hook(lambda *_: time.sleep(seconds))


def test_a_timeout_leaves_the_best_answer_so_far(ensemble, x):
    expected = [stage.logits for stage in ensemble.stages(x)]
    slow(ensemble, 0.1)
    ticks, best = 0, None

    async def answer():
        nonlocal best
        async for stage in ensemble.astages(x):
            best = stage

    async def beside():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def both():
        clock = asyncio.create_task(beside())
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(answer(), 0.25)
        clock.cancel()

    asyncio.run(both())
    assert best.index == 2
    torch.testing.assert_close(best.logits, expected[1])
    assert ticks >= 10  # the event loop ran while students did
    assert len(ensemble.students[3].body.seen) == 1  # never started again


def test_asynchronous_stages_are_the_stages(ensemble, x):
    async def answers():
        return [stage async for stage in ensemble.astages(x)]

    for stage, expected in zip(asyncio.run(answers()), ensemble.stages(x), strict=True):
        assert (stage.index, stage.macs) == (expected.index, expected.macs)
        assert torch.equal(stage.logits, expected.logits)
        assert not stage.logits.requires_grad


def test_an_interrupt_leaves_the_best_answer(ensemble, x):
    ensemble.students[2].body.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    best = None
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for stage in ensemble.stages(x):
            best = stage
    assert best.index == 2
    assert [len(student.body.seen) for student in ensemble.students] == [1, 1, 1, 0]
    stages = ensemble.stages(x)
    next(stages)
    stages.close()
    assert next(stages, None) is None


# ---- input that is none


def broken(x, value):
    x = x.clone()
    x[3, 1] = x[7, 0] = value
    return x


@pytest.mark.parametrize("ask", ["forward", "predict", "stages"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, 1:], r"`x` of shape \(B, 5\), as in training, got \(40, 4\)"),
        (lambda x: x[0], r"got \(5,\)\. One sample is x\[None\]"),
        (lambda x: x.double(), r"`x` of dtype float32, as in training, got torch.float64"),
        (lambda x: x.long(), r"dtype float32, as in training, got torch.int64"),
        (lambda x: broken(x, float("nan")), r"NaN or infinity, got 2 such samples of 40, the first at index 3"),
        (lambda x: broken(x, float("inf")), r"NaN or infinity, got 2 such samples of 40, the first at index 3"),
    ],
    ids=["shape", "one sample", "double", "integers", "nan", "inf"],
)
def test_an_input_that_is_none_is_named(ensemble, x, spoil, message, ask):
    with pytest.raises(UserError, match=message):
        next(iter(getattr(ensemble, ask)(spoil(x))))
    assert rows_seen(ensemble) == [0] * T


def test_finite_numbers_whose_sum_is_not_are_an_input(ensemble):
    assert ensemble(torch.full((2, IN), 3e38)).shape == (2, L)


def test_temperatures_alone_leave_the_others_alone(ensemble, x):
    ensemble.calibration = replace(Calibration(T), temperatures=TEMPERATURES)
    expected = stages_by_hand(ensemble, x, "max_prob", (0.6,) * T, TEMPERATURES)
    assert ensemble.predict(x, Budget(confidence=0.6)).stages.tolist() == expected


def test_a_budget_of_macs_needs_macs():
    students = [nn.Linear(IN, 3) for _ in range(2)]
    with pytest.raises(UserError, match=r"`macs` are known for a budget of 5 .*macs=\["):
        ProgressiveEnsemble(students).predict(torch.zeros(1, IN), Budget(macs=5))
    with pytest.raises(UserError, match="one number for each of 2 students, got 3"):
        ProgressiveEnsemble(students, macs=[1, 2, 3])


def test_an_ensemble_in_another_type_reads_x_in_it():
    students = [Student(nn.Linear(IN, 8), nn.Linear(8, L)) for _ in range(2)]
    inputs = InputSpec(parts={"x": InputSpec((IN,), "float32"), "n": InputSpec((), "int64")})
    ensemble = ProgressiveEnsemble(students, inputs=InputSpec((IN,), "float32"), macs=[1, 2])
    x = torch.randn(6, IN)
    wanted = ensemble.predict(x, Budget(confidence=0.4)).logits
    found = ensemble.bfloat16().predict(x.bfloat16(), Budget(confidence=0.4)).logits
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)
    with pytest.raises(UserError, match="dtype bfloat16"):
        ensemble(x)
    assert inputs.in_type(torch.float16).parts["n"].dtype == "int64"
