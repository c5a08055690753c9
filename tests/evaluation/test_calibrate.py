"""Fitting on a validation part: what is kept is what a prediction then does, on the samples it was fitted on."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil.ensemble import timing
from bdistil.ensemble.budget import RULES, Budget
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.calibrate import fit_anytime, format_calibration
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
    figures = fit_anytime(ensemble, loader, ExitTarget(rule, max_loss=1.0))
    exits = figures.exits
    assert exits.accuracy >= exits.full_accuracy - 0.01 - 1e-9
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


def test_temperatures_make_every_stage_mean_what_it_says(ensemble, data):
    x, y, loader = data
    figures = fit_anytime(ensemble, loader)
    for number, stage in enumerate(ensemble.stages(x)):
        before, after = figures.calibration_error[number]
        assert before == pytest.approx(calibration_error(stage.logits, y), abs=1e-6)
        assert after == pytest.approx(calibration_error(stage.logits, y, figures.temperature(number)), abs=1e-6)
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
        ({"max_loss": -1}, "`max_loss` in points >= 0"),
    ],
)
def test_targets_that_no_stage_fits(ensemble, data, limits, message):
    with pytest.raises(UserError, match=message):
        fit_anytime(ensemble, data[2], ExitTarget(**limits))


# ---- measured times and schedules


def test_times_are_measured_at_every_batch_and_decide_the_schedule(ensemble, data):
    figures = fit_anytime(ensemble, data[2])
    assert [times.batch for times in figures.times] == list(timing.BATCHES)
    for times in figures.times:
        assert 0 < min(times.stages) <= max(times.late)
        assert min(times.check, times.compact) > 0
        assert set(times.schedules) == {"one", "all"}
        assert times.schedule == "one" or times.schedules[times.schedule] < times.schedules["one"]
        assert figures.schedule(times.batch, "cpu") == times.schedule
    assert figures.schedule(7, "cuda") == "one"
