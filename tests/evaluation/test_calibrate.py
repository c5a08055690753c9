"""Fitting on a validation part: what is kept is what a prediction then does, on the samples it was fitted on."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil.ensemble import timing
from bdistil.ensemble.budget import RULES, Budget
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.stages import StackedBodies
from bdistil.errors import UserError
from bdistil.evaluation.calibrate import ExitTarget, fit_anytime, format_calibration
from bdistil.evaluation.temperature import calibration_error
from bdistil.models.student import Rung, Student

IN, L, T, N = 6, 4, 3, 400
MACS = [100, 250, 450]


def make_ensemble(hidden=(16, 16, 16), body=None):
    students = []
    for width in hidden:
        inside = body() if body else nn.Sequential(nn.Linear(IN, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        student = Student(inside, nn.Linear(width, L)).link(students, Rung(1 if students else 0))
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
    with pytest.raises(UserError, match="class numbers"):
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


def conv():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(16))


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_schedules_give_the_same_numbers(kind, monkeypatch):
    x = torch.randn(9, IN) if kind == "dense" else torch.randn(9, 1, 6, 6)
    students = make_ensemble((16,) * 5).students if kind == "dense" else []
    while len(students) < 5:
        body = conv()
        body(x)
        students.append(Student(body, nn.Linear(16, L)).link(students, Rung(min(len(students), 2))))
    ensemble = ProgressiveEnsemble(students, scale=2.0)
    calls = []
    call = StackedBodies.__call__
    monkeypatch.setattr(StackedBodies, "__call__", lambda self, x: calls.append(1) or call(self, x))
    for stages in (1, 2, 4, 5):
        calls.clear()
        torch.testing.assert_close(
            ensemble(x, stages, schedule="all"), ensemble(x, stages, schedule="one"), atol=1e-5, rtol=1e-5
        )
        assert len(calls) == (stages == 5)  # no body runs beyond the prefix


def test_stacked_parameters_follow_the_ensemble(ensemble, data):
    x = data[0].double()
    ensemble(data[0], schedule="all")
    ensemble.double()
    torch.testing.assert_close(ensemble(x, schedule="all"), ensemble(x, schedule="one"))


@pytest.mark.parametrize(
    "ensemble",
    [make_ensemble((16, 16, 8)), ProgressiveEnsemble([nn.Linear(IN, L), nn.Linear(IN, L)])],
    ids=["other widths", "no Student"],
)
def test_students_that_differ_run_one_after_the_other(ensemble):
    with pytest.raises(UserError, match="Take schedule='one'"):
        ensemble(torch.randn(3, IN), schedule="all")
    with pytest.raises(UserError, match="one of one, all, got 'al'"):
        ensemble(torch.randn(3, IN), schedule="al")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 16, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


def test_operators_that_cannot_be_stacked_leave_one_after_the_other():
    students = [Student(Recurrent(), nn.Linear(16, L)) for _ in range(2)]
    ensemble = ProgressiveEnsemble(students)
    times = timing.measure_times(ensemble, torch.randn(4, 5, 2), batches=(4,))
    assert times[0].schedule in times[0].schedules
    assert "one" in times[0].schedules
