"""Exits: the answer to a sample is that of the first stage that is sure of it; the guard decides about time only."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from bdistil.ensemble.budget import RULES, Budget, add_votes, confidence_of
from bdistil.ensemble.calibration import Calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.models.student import Rung, Student
from bdistil.runner import exits
from bdistil.runner.confidence import confidence_of_one
from bdistil.runner.stage_clock import BatchTimes, Guard, StageClock

IN, L, T, B = 5, 4, 4, 40
MACS = [10, 25, 45, 70]
TEMPERATURES = (2.0, 1.5, 0.8, 0.5)
LEVELS = {"max_prob": 0.55, "margin": 0.3, "entropy": 0.12, "agreement": 0.6}


def times(stage=1e-3, check=1e-6, compact=1e-6, batches=(1, 64)):
    """A stage costs `stage` seconds a sample."""
    return tuple(BatchTimes(batch, (stage * batch,) * T, (stage * batch,) * T, check, compact) for batch in batches)


SHARES = dict.fromkeys(RULES, ((0.0, 0.25, 0.25, 0.25, 0.25), (1.0, 0.25, 0.25, 0.25, 0.25)))
CLOCKS = {
    "none": Calibration(T),
    "all pays": Calibration(T, times=times(), shares=SHARES),
    "no removal": Calibration(T, times=times(compact=1.0), shares=SHARES),
    "no check": Calibration(T, times=times(check=1.0), shares=SHARES),
    "large stages": Calibration(T, times=times(1e-3, check=6e-3, compact=8e-3), shares=SHARES),
    "learned": Calibration(T, times=times(check=1.0)),
    "checks alone": Calibration(T, times=times(compact=1.0)),
    "elsewhere": Calibration(T, times=times(check=1.0), shares=SHARES, device="cuda"),
}


class Counted(nn.Sequential):
    """Features of x, and how many rows came in each call."""

    def __init__(self):
        super().__init__(nn.Linear(IN, 6), nn.Tanh())
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x)


@pytest.fixture
def ensemble():
    torch.manual_seed(3)
    students = []
    for number in range(T):
        student = Student(Counted(), nn.Linear(6, L)).link(students, Rung(1 if number else 0))
        student.head.weight.data.mul_(1 + 2 * number)
        students.append(student)
    return ProgressiveEnsemble(students, scale=2.5, macs=MACS)


@pytest.fixture
def x():
    return torch.randn(B, IN, generator=torch.Generator().manual_seed(4))


def by_hand(ensemble, x, rule, level):
    """Stage and logits of each sample, by itself, at the first stage whose confidence reaches the level."""
    stages, logits = [], []
    for sample in x.split(1):
        votes, before = None, 0.0
        for stage in ensemble.stages(sample):
            votes, before = add_votes(votes, stage.total - before), stage.total
            temperature = ensemble.calibration.temperature(stage.index - 1)
            if confidence_of(stage.logits, rule, temperature, votes).item() >= level:
                break
        stages.append(stage.index)
        logits.append(stage.logits)
    return stages, torch.cat(logits)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("rule", RULES)
def test_answers_depend_neither_on_the_batch_nor_on_times(ensemble, x, rule, clock):
    level = LEVELS[rule]
    ensemble.calibration = replace(CLOCKS[clock], temperatures=TEMPERATURES)
    expected, logits = by_hand(ensemble, x, rule, level)
    assert len(set(expected)) >= 2 + (rule != "agreement")
    budget = Budget(confidence=level, rule=rule)
    for size in (1, 2, 3, 16, B, None, B):  # in between all that the guard has learned is forgotten
        if size is None:
            ensemble.calibration = replace(ensemble.calibration)
            continue
        found = [ensemble.predict(part, budget) for part in x.split(size)]
        assert torch.cat([part.stages for part in found]).tolist() == expected
        torch.testing.assert_close(torch.cat([part.logits for part in found]), logits)
        for part in found:
            assert (part.macs >= torch.tensor(MACS)[part.stages - 1]).all()


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("rule", RULES)
def test_one_sample_is_as_sure_alone_as_in_a_batch(rule, classes):
    """Also where float32 saturates, and at thresholds that are confidences themselves."""
    torch.manual_seed(0)
    heads = [nn.Linear(IN, classes) for _ in range(3)]
    for head in heads:
        head.weight.data.mul_(20)
    ensemble, x = ProgressiveEnsemble(heads), torch.randn(300, IN)
    answers = [stage.logits for stage in ensemble.stages(x)]
    found = confidence_of(answers[0], rule, votes=add_votes(None, answers[0]))
    levels = [1.0, 0.9999999, 0.5, float(found[found > 0].median()) if (found > 0).any() else 0.7]
    for level in levels:
        budget = Budget(confidence=level, rule=rule)
        whole = ensemble.predict(x, budget).stages
        single = torch.cat([ensemble.predict(sample, budget).stages for sample in x.split(1)])
        assert (whole != single).sum() <= 3  # by rounding: the one at the threshold, and those near 1


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "agreement"])
def test_confidence_in_python_is_that_of_numpy(rule):
    logits = torch.randn(20, 7, dtype=torch.float64) * 3
    alone = [confidence_of_one(row, rule, 1 / 1.3) for row in logits.tolist()]
    torch.testing.assert_close(torch.tensor(alone, dtype=torch.float64), confidence_of(logits, rule, 1.3))


def rows_seen(ensemble):
    return [sum(student.body.seen) for student in ensemble.students]


def test_what_was_run_is_reported_beside_what_answered(ensemble, x):
    budget = Budget(confidence=0.6)
    answered = ensemble.predict(x, budget).stages
    assert len(answered.unique()) > 2
    for name, ran in (("none", answered), ("no removal", torch.full((B,), T)), ("no check", torch.full((B,), T))):
        ensemble.calibration = CLOCKS[name]
        for student in ensemble.students:
            student.body.seen.clear()
        prediction = ensemble.predict(x, budget)
        assert torch.equal(prediction.stages, answered)
        assert torch.equal(prediction.macs, torch.tensor(MACS)[ran - 1])
        assert rows_seen(ensemble) == [int((ran > number).sum()) for number in range(T)]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_samples_is_answered(ensemble, x, rule, clock):
    ensemble.calibration = CLOCKS[clock]
    prediction = ensemble.predict(x[:0], Budget(confidence=0.9, rule=rule))
    assert prediction.logits.shape == (0, L)
    assert prediction.stages.tolist() == []


def test_all_decided_is_the_end_whatever_removal_costs(ensemble, x):
    ensemble.calibration = Calibration(T, times=times(compact=1.0))
    prediction = ensemble.predict(x, Budget(confidence=1e-6))
    assert prediction.stages.tolist() == [1] * B
    assert rows_seen(ensemble) == [B, 0, 0, 0]


@pytest.mark.parametrize("limits", [{"stages": 2}, {"macs": 30}, {"stages": 1}], ids=str)
@pytest.mark.parametrize("size", [1, B])
def test_within_other_limits_the_last_stage_answers_who_is_left(ensemble, x, limits, size):
    most = Budget(**limits).stages_within(MACS)
    expected = [min(stage, most) for stage in by_hand(ensemble, x, "max_prob", 0.6)[0]]
    found = [ensemble.predict(part, Budget(confidence=0.6, **limits)) for part in x.split(size)]
    assert torch.cat([part.stages for part in found]).tolist() == expected
    assert max(max(part.macs.tolist()) for part in found) <= MACS[most - 1]


def test_a_late_stage_is_not_started_and_the_last_answers(ensemble, x):
    ensemble.calibration = Calibration(T, times=times(stage=1.0, check=9.0), shares=SHARES)
    prediction = ensemble.predict(x[:1], Budget(confidence=0.9999999, seconds=0.5))
    assert prediction.stages.tolist() == [1]  # the second is said to take 1 s
    assert torch.equal(prediction.logits, ensemble(x[:1], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_answers_have_the_dtype_of_the_students(ensemble, x, dtype):
    ensemble.to(dtype)
    prediction = ensemble.predict(x.to(dtype), Budget(confidence=0.6))
    assert prediction.logits.dtype == dtype
    answers = torch.stack([stage.logits for stage in ensemble.stages(x.to(dtype))])
    expected = answers[prediction.stages - 1, torch.arange(B)]
    torch.testing.assert_close(prediction.logits.double(), expected.double(), rtol=2e-2, atol=2e-2)


def test_an_ensemble_that_has_served_is_copied_and_pickled(ensemble, x):
    ensemble.calibration = CLOCKS["all pays"]
    expected = ensemble.predict(x, Budget(confidence=0.6)).stages
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(other.predict(x, Budget(confidence=0.6)).stages, expected)


# ---- the guard


def guard(shares=None, allowed=T, **costs):
    return Guard(StageClock(times(**costs)), allowed, shares)


@pytest.mark.parametrize(
    ("batch", "shares", "check", "first"),
    [
        (16, (0.9, 0.1, 0.0, 0.0), 13e-3, 1),  # 43 ms are saved, three times the cost
        (16, (0.9, 0.1, 0.0, 0.0), 16e-3, 4),
        (16, (0.0, 0.0, 0.0, 1.0), 1e-3, 4),
        (16, (0.0, 0.5, 0.0, 0.5), 1e-3, 2),  # nobody is decided before
        (1, (0.5, 0.0, 0.0, 0.5), 0.47e-3, 1),  # 1.5 ms of 3 are saved
        (1, (0.5, 0.0, 0.0, 0.5), 0.53e-3, 4),
        (1, (0.2, 0.2, 0.2, 0.4), 0.23e-3, 2),  # 0.6 ms at the first, 0.8 at the second
    ],
)
def test_the_rule_is_evaluated_where_that_is_expected_to_pay(batch, shares, check, first):
    assert guard(shares, check=check).next_check(0, batch, batch) == first


def test_without_times_or_shares_it_is_evaluated_after_each_stage():
    assert [Guard(None, T, (0.0, 0.0, 0.0, 1.0)).next_check(number, 8, 8) for number in range(3)] == [1, 2, 3]
    assert [guard(check=1.0).next_check(number, 8, 8) for number in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("left", range(1, 16))
def test_removal_pays_from_the_crossover_on(left):
    # Each sample less saves 1 ms in each of the two stages to come; taking others out costs 5 ms, which counts
    # three times.
    assert guard(compact=5e-3).removes(2, 16, left) == (2 * (16 - left) > 3 * 5)


def test_shares_are_interpolated_between_thresholds():
    rows = ((0.5, 0.8, 0.1, 0.1), (0.9, 0.4, 0.3, 0.3))
    calibration = Calibration(3, shares={"max_prob": rows})
    for threshold, expected in (
        (0.5, rows[0][1:]),
        (0.9, rows[1][1:]),
        (0.7, (0.6, 0.2, 0.2)),
        (0.1, rows[0][1:]),
        (1.0, rows[1][1:]),
    ):
        assert calibration.shares_at("max_prob", threshold) == pytest.approx(expected)
    assert calibration.shares_at("margin", 0.5) is None


def test_a_single_sample_of_many_classes_goes_the_way_of_a_batch(monkeypatch):
    monkeypatch.setattr(exits, "FEW", 2)
    torch.manual_seed(1)
    ensemble, x = ProgressiveEnsemble([nn.Linear(IN, L) for _ in range(3)], scale=9.0), torch.randn(30, IN)
    whole = ensemble.predict(x, Budget(confidence=0.8)).stages
    single = [ensemble.predict(sample, Budget(confidence=0.8)).stages for sample in x.split(1)]
    assert torch.cat(single).tolist() == whole.tolist()
    assert len(set(whole.tolist())) > 1


def test_the_number_of_budgets_that_are_kept_is_bounded(ensemble, x):
    for number in itertools.islice(range(1, 1000), 200):
        ensemble.predict(x[:2], Budget(confidence=number / 1000))
    assert len(ensemble._plans) <= 64


# ---- convolutions without oneDNN


class Switch(nn.Linear):
    """Whether oneDNN was on in each call, by the number of rows."""

    def __init__(self):
        super().__init__(IN, L)
        self.seen = {}

    def forward(self, x):
        self.seen[len(x)] = torch.backends.mkldnn.enabled
        return super().forward(x)


def test_small_batches_run_without_onednn_where_that_was_measured_to_be_faster(x, monkeypatch):
    ensemble = ProgressiveEnsemble([Switch() for _ in range(2)])
    small, large = times(batches=(2, 8))
    ensemble.calibration = Calibration(T, times=(replace(small, native=True), large))
    assert torch.backends.mkldnn.enabled
    for size in (1, 2, 3, 8):
        ensemble.predict(x[:size])
    assert ensemble.students[1].seen == {1: False, 2: False, 3: True, 8: True}
    assert torch.backends.mkldnn.enabled
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    ensemble.predict(x[:2])
    assert not torch.backends.mkldnn.enabled  # the user's own switch stays
    monkeypatch.undo()
    ensemble.students[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensemble.predict(x[:2])
    assert torch.backends.mkldnn.enabled
