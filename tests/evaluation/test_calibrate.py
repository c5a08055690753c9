"""Fitting on a validation part: what is kept is what a prediction then does, on the samples it was fitted on."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil.ensemble import timing
from bdistil.ensemble.budget import NEVER, RULES, Budget
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.calibrate import LEVELS, fit_anytime, format_calibration
from bdistil.evaluation.risk_control import held_back
from bdistil.evaluation.temperature import calibration_error
from bdistil.evaluation.thresholds import ExitTarget
from bdistil.models.student import Rung, Student

IN, L, T, N = 6, 4, 3, 400
MACS = [100, 250, 450]


def make_ensemble():
    students = []
    for _ in range(T):
        body = nn.Sequential(nn.Linear(IN, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        student = Student(body, nn.Linear(16, L)).link(students, Rung(1 if students else 0))
        students.append(student)
    return ProgressiveEnsemble(students, scale=2.0, macs=MACS)


@pytest.fixture
def ensemble():
    return make_ensemble()


@pytest.fixture
def data(ensemble):
    """Labels that the last prefix mostly says, so that early stages are worth less."""
    x = torch.randn(N, IN)
    y = torch.multinomial(torch.softmax(6 * ensemble(x), -1), 1).flatten()
    return x, y, DataLoader(TensorDataset(x, y), batch_size=150)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)


@pytest.mark.parametrize("rule", RULES)
def test_thresholds_hold_on_the_samples_that_they_were_fitted_on(ensemble, data, rule):
    x, y, loader = data
    figures = fit_anytime(ensemble, loader, ExitTarget(rule, max_loss=1.0, delta="none"))
    exits = figures.exits
    assert exits.accuracy >= exits.full_accuracy - 0.01 - 1e-9
    assert exits.promise is None
    ensemble.calibration = type(figures)(
        T, exits=exits, temperatures=figures.temperatures
    )  # without times: all may leave
    prediction = ensemble.predict(x, Budget(confidence="fitted"))
    assert (prediction.logits.argmax(-1) == y).double().mean().item() == pytest.approx(exits.accuracy)
    assert prediction.macs.double().mean().item() == pytest.approx(exits.average_macs)
    share = prediction.stages.bincount(minlength=T + 1)[1:] / N
    torch.testing.assert_close(share.double(), torch.tensor(exits.decided_share, dtype=torch.float64))
    assert (ensemble(x).argmax(-1) == y).double().mean().item() == pytest.approx(exits.full_accuracy)


def test_an_average_of_macs_is_kept(ensemble, data):
    figures = fit_anytime(ensemble, data[2], ExitTarget(average_macs=200))
    assert figures.exits.average_macs <= 200
    assert figures.exits.target == "average at most 200 MACs"
    assert "200 MACs" in format_calibration(figures, MACS)


@pytest.mark.parametrize("delta", ["none", 0.1])
def test_temperatures_make_every_stage_mean_what_it_says(ensemble, data, delta):
    x, y, loader = data
    figures = fit_anytime(ensemble, loader, ExitTarget(delta=delta))
    rest = torch.arange(N) if delta == "none" else torch.from_numpy(held_back(N, 1.0, delta))
    assert len(x[rest]) == (N if delta == "none" else 0.8 * N)
    for number, stage in enumerate(ensemble.stages(x)):
        before, after = figures.calibration_error[number]
        logits, labels = stage.logits[rest], y[rest]
        assert before == pytest.approx(calibration_error(logits, labels), abs=1e-6)
        assert after == pytest.approx(calibration_error(logits, labels, figures.temperature(number)), abs=1e-6)
    assert figures.calibration_error[-1][1] < figures.calibration_error[-1][0] / 2  # labels were drawn at a sixth


def test_weights_only_where_they_are_asked_for_and_win(ensemble, data):
    x, y, loader = data
    equal = ensemble(x)
    ensemble.students[1].head.weight.data.normal_(0, 3)  # a student that spoils all prefixes that it is in
    assert fit_anytime(ensemble, loader).weights == ()
    spoilt = (ensemble(x).argmax(-1) == y).double().mean()
    weights = fit_anytime(ensemble, loader, weights=True).weights
    assert weights[1] < 0.5
    assert (ensemble(x).argmax(-1) == y).double().mean() > spoilt
    assert not torch.allclose(ensemble(x), equal)


@pytest.mark.parametrize("labels", [torch.randn(N), torch.zeros(N, 2, dtype=torch.long)], ids=["numbers", "several"])
def test_labels_that_are_no_classes(ensemble, data, labels):
    with pytest.raises(UserError, match="class number"):
        fit_anytime(ensemble, DataLoader(TensorDataset(data[0], labels), batch_size=150))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_loss": 0.1, "average_macs": 200}, "one of `max_loss` and `average_macs`"),
        ({"average_macs": 99}, "`average_macs` >= 100"),
        ({"rule": "maxprob"}, "`rule` to be one of max_prob, margin, entropy, agreement, got 'maxprob'"),
        ({"max_loss": -1}, "`max_loss` in points >= 0"),
        ({"delta": 1.0}, "`delta` to be in 0 … 1 or 'none', got 1.0"),
        ({"delta": "never"}, "`delta` to be in 0 … 1 or 'none', got 'never'"),
        ({"average_macs": 200, "delta": 0.1}, "`delta` is for `max_loss`, got delta=0.1"),
    ],
)
def test_targets_that_no_stage_fits(ensemble, data, limits, message):
    with pytest.raises(UserError, match=message):
        fit_anytime(ensemble, data[2], ExitTarget(**limits))


# ---- promises


def test_a_promise_is_fitted_on_one_part_and_tested_on_the_other(ensemble, data):
    x, y, loader = data
    figures = fit_anytime(ensemble, loader, ExitTarget(max_loss=3.0, delta=0.2))
    exits, promise, tested = figures.exits, figures.exits.promise, torch.from_numpy(held_back(N, 3.0, 0.2))
    assert promise.kept
    assert (promise.samples, promise.validation) == (320, N)
    assert exits.thresholds[0] == exits.thresholds[1] < NEVER
    assert exits.target == "lose at most 3 points with probability 0.8"
    ensemble.calibration = replace(figures, times=())
    prediction = ensemble.predict(x, Budget(confidence="fitted"))
    right, whole = prediction.logits.argmax(-1) == y, ensemble(x).argmax(-1) == y
    assert int((whole & ~right)[tested].sum()) == promise.spoiled
    assert 100 * float((whole.double() - right.double())[tested].mean()) == pytest.approx(exits.held_out_loss)
    assert right.double().mean().item() == pytest.approx(exits.accuracy)
    assert prediction.macs.double().mean().item() == pytest.approx(exits.average_macs)
    y_other = y.clone()
    y_other[tested] = (y[tested] + 1) % L
    other_loader = DataLoader(TensorDataset(x, y_other), batch_size=150)
    other = fit_anytime(ensemble, other_loader, ExitTarget(max_loss=3.0, delta=0.2))
    assert other.temperatures == figures.temperatures  # no label of the tested samples is fitted on


def test_too_few_samples_for_a_promise_run_all_stages(ensemble, data):
    x, y, _ = data
    figures = fit_anytime(ensemble, DataLoader(TensorDataset(x[:200], y[:200]), batch_size=150))
    assert not figures.exits.promise.kept
    assert figures.exits.average_macs == MACS[-1]
    assert figures.exits.accuracy == figures.exits.full_accuracy
    assert ensemble.predict(x, Budget(confidence="fitted")).stages.tolist() == [T] * N
    text = format_calibration(figures, MACS)
    assert "200 validation samples cannot support losing at most 1 point of accuracy with probability 0.9" in text
    assert "(at least 287 are needed): all stages run." in text


def test_the_report_says_what_is_promised_and_what_a_tighter_promise_needs(ensemble, data):
    fitted = fit_anytime(ensemble, data[2], ExitTarget(max_loss=3.0, delta=0.2))
    text = format_calibration(fitted, MACS)
    assert re.search(r"^max_prob, to lose at most 3 points with probability 0.8: accuracy 0\.\d+", text, re.M)
    assert "New samples like these lose at most 3 points of accuracy with probability 0.8: of 320 that were not" in text
    assert "A promise of" not in text  # of 1.5 points, for which 133 samples are enough
    more = str(replace(fitted.exits.promise, needed_for_half=413))
    assert "A promise of 1.5 points needs at least 413 validation samples; there are 400." in more
    naive = format_calibration(fit_anytime(ensemble, data[2], ExitTarget(max_loss=3.0, delta="none")), MACS)
    assert "to lose at most 3 points of the validation part (naive)" in naive
    assert "A naive fit, which promises nothing for new samples: fitted on one half" in naive


@pytest.mark.parametrize("rule", RULES)
def test_shares_are_those_of_the_exits_at_each_threshold(ensemble, data, rule):
    figures = fit_anytime(ensemble, data[2])
    ensemble.calibration = replace(figures, times=())
    for level in (0.5, 0.9):
        stages = ensemble.predict(data[0], Budget(confidence=level, rule=rule)).stages
        share = stages.bincount(minlength=T + 1)[1:] / N
        assert figures.shares_at(rule, level) == pytest.approx(share.tolist(), abs=2 / N)
    assert [row[0] for row in figures.shares[rule]] == list(LEVELS)


# ---- measured times and schedules


def test_times_are_measured_at_every_batch_and_decide_the_schedule(ensemble, data):
    figures = fit_anytime(ensemble, data[2])
    assert [times.batch for times in figures.times] == list(timing.BATCHES)
    for times in figures.times:
        assert 0 < min(times.stages) <= max(times.late)
        assert times.check > 0
        assert (times.compact > 0) == (times.batch > 1)
        assert set(times.schedules) == {"one", "all"}
        assert times.schedule == "one" or times.schedules[times.schedule] < times.schedules["one"]
        assert figures.schedule(times.batch, "cpu") == times.schedule
    assert figures.schedule(7, "cuda") == "one"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda x, y: zip(x.split(150), y.split(150), strict=True), "read more than once, got a zip"),
        (lambda x, y: [(x, torch.full_like(y, -100))], f"with labelled samples, got {N} samples"),
    ],
)
def test_a_refused_fit_leaves_the_calibration_as_it_is(ensemble, data, batches, message):
    x, y, loader = data
    before = fit_anytime(ensemble, loader)
    with pytest.raises(UserError, match=message):
        fit_anytime(ensemble, batches(x, y))
    assert ensemble.calibration is before


def test_samples_without_a_label_are_those_of_the_run(ensemble, data):
    x, y, _ = data
    batches = [(x, torch.where(torch.arange(N) < 100, 255, y))]
    with pytest.raises(UserError, match="ignore_index"):
        fit_anytime(ensemble, batches)
    assert fit_anytime(ensemble, batches, ignore_index=255).exits.promise.validation == N - 100


@pytest.mark.parametrize("limits", [{"average_macs": 200}, {"delta": "none"}])
def test_costs_that_nobody_counted_are_not_saved(ensemble, data, limits):
    with pytest.raises(UserError, match="whose `macs` are known"):
        fit_anytime(ProgressiveEnsemble(ensemble.students), data[2], ExitTarget(**limits))
