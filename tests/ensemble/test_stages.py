"""Schedules: all bodies together on stacked parameters, and the ensembles that do not support it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import nn

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.stages import StackedBodies
from bdistil.ensemble.timing import measure_times
from bdistil.errors import UserError
from bdistil.models.student import Rung, Student

IN, L = 6, 4
ACTIVATIONS = (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2))


def make_ensemble(hidden=(16, 16, 16)):
    students = []
    for width in hidden:
        body = nn.Sequential(nn.Linear(IN, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        students.append(Student(body, nn.Linear(width, L)).link(students, Rung(1 if students else 0)))
    return ProgressiveEnsemble(students, scale=2.0)


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


def test_stacked_parameters_follow_the_ensemble():
    ensemble, x = make_ensemble(), torch.randn(9, IN)
    ensemble(x, schedule="all")
    ensemble, x = ensemble.double(), x.double()
    torch.testing.assert_close(ensemble(x, schedule="all"), ensemble(x, schedule="one"))


@pytest.mark.parametrize(
    "ensemble",
    [
        make_ensemble((16, 16, 8)),
        ProgressiveEnsemble([Student(nn.Sequential(nn.Linear(IN, 4), act), nn.Linear(4, L)) for act in ACTIVATIONS]),
        ProgressiveEnsemble([nn.Linear(IN, L), nn.Linear(IN, L)]),
    ],
    ids=["other widths", "another slope", "no Student"],
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
    times = measure_times(ensemble, torch.randn(4, 5, 2), batches=(4,))
    assert times[0].schedule in times[0].schedules
    assert "one" in times[0].schedules


class Projected(nn.Linear):
    """Reads x through a random matrix that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__(IN, 16)
        self.matrix = torch.randn(IN, IN)

    def forward(self, x):
        return super().forward(x @ self.matrix)


def test_students_whose_other_tensors_differ_run_one_after_the_other():
    ensemble = ProgressiveEnsemble([Student(Projected(), nn.Linear(16, L)) for _ in range(2)])
    with pytest.raises(UserError, match="Take schedule='one'"):
        ensemble(torch.randn(3, IN), schedule="all")


def test_stacked_parameters_follow_loaded_ones():
    ensemble, x = make_ensemble(), torch.randn(9, IN)
    ensemble(x, schedule="all")
    ensemble.load_state_dict(make_ensemble().state_dict())
    torch.testing.assert_close(ensemble(x, schedule="all"), ensemble(x, schedule="one"), atol=1e-5, rtol=1e-5)


def test_bodies_without_parameters_are_timed():
    ensemble = ProgressiveEnsemble([Student(nn.Flatten(), nn.Linear(IN, L)) for _ in range(2)])
    assert measure_times(ensemble, torch.randn(4, IN), batches=(4,))[0].schedule == "one"


@pytest.mark.parametrize("change", ["a student", "a tensor"])
def test_stacked_parameters_follow_their_students(change):
    ensemble, x = make_ensemble(), torch.randn(9, IN)
    ensemble(x, schedule="all")
    if change == "a student":
        ensemble.students[1].load_state_dict(make_ensemble().students[1].state_dict())
    else:
        ensemble.students[1].body[0].weight.data.mul_(2)
    torch.testing.assert_close(ensemble(x, schedule="all"), ensemble(x, schedule="one"), atol=1e-5, rtol=1e-5)


def test_threads_share_stacked_bodies(monkeypatch):
    """If both can be inside a body, one of them ends before the other goes on."""
    ensemble, x = make_ensemble(), torch.randn(9, IN)
    for student in ensemble.students:
        nn.init.normal_(student.body[1].weight)
    expected = ensemble(x, schedule="all")
    inside, ended, forward = threading.Barrier(2), threading.Event(), nn.BatchNorm1d.forward

    def halted(self, rows):
        with suppress(threading.BrokenBarrierError):
            if inside.wait(1) == 1:  # the second one to arrive
                ended.wait(10)
        return forward(self, rows)

    def answer(_):
        logits = ensemble(x, schedule="all")
        ended.set()
        return logits

    monkeypatch.setattr(nn.BatchNorm1d, "forward", halted)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(answer, range(2)))
    for answer in answers:
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
