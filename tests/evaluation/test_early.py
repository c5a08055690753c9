"""The figures of early classification, by hand and against loops, and in `bdistil evaluate`."""

import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bdistil import Budget, ProgressiveEnsemble, Rung, UserError
from bdistil.ensemble.calibration import Calibration
from bdistil.evaluation.early import early_figures, early_row
from bdistil.models.convnets import ConvStudent
from bdistil.models.recurrent import RecurrentSegmentStudent
from bdistil.models.student import build_student

CONFIDENCE = torch.tensor([[0.95, 0.2, 0.3, 0.1], [0.5, 0.9, 0.2, 0.1], [0.99, 0.1, 0.9, 0.1], [0.9, 0.9, 0.9, 0.89]])
RIGHT = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
ENDS, M = [3, 6, 8, 12], 12


def test_figures_by_hand():
    """Read 3, 6, 8 and 12 of 12 steps; the last sample is never decided and is answered at its last step."""
    row = early_row(CONFIDENCE, RIGHT, ENDS, M, 0.9)
    assert row == {"decided_by_55": 0.5, "decided_by_75": 0.75, "accuracy": 0.75, "steps_saved": round(1 - 29 / 48, 4)}


def test_a_fraction_that_ends_on_a_step_includes_it():
    """Samples decided at steps 55, 56 and 75 of 100, and one that never is."""
    confidence = torch.eye(4)
    confidence[3, 3] = 0.0
    row = early_row(confidence, torch.ones(4, 4, dtype=torch.bool), [55, 56, 75, 100], 100, 0.9)
    assert (row["decided_by_55"], row["decided_by_75"]) == (0.25, 0.75)


def test_steps_saved_are_those_of_the_formula():
    confidence = torch.rand(99, 50)
    row = early_row(confidence, confidence > 0, range(1, 100), 99, 0.98)
    read = [next((k for k, p in enumerate(sample, 1) if p >= 0.98), 99) for sample in confidence.T]
    assert row["steps_saved"] == pytest.approx(1 - sum(read) / (50 * 99), abs=1e-4)
    assert early_row(torch.zeros(3, 2), torch.ones(3, 2) > 0, [1, 2, 3], 3, 0.5)["steps_saved"] == 0.0


@pytest.fixture(scope="module")
def ensemble():
    students = []
    for number in range(4):
        students.append(build_student(lambda _: RecurrentSegmentStudent(3, 5, 4, 6), number, students, Rung(1)))
        torch.nn.init.normal_(students[-1].head.weight, std=4.0)
    return ProgressiveEnsemble(students)


def test_figures_of_an_ensemble_against_a_loop_over_samples(ensemble):
    x, y = torch.randn(40, 12, 3), torch.randint(0, 5, (40,))
    found = early_figures(ensemble, DataLoader(TensorDataset(x, y), 7), 0.6)
    assert list(found) == [f"early@{p:g}" for p in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)]
    for p in (0.7, 0.8, 0.9):
        by_55, by_75, right, read = 0, 0, 0, 0
        for sample, label in zip(x, y, strict=True):
            for stage in ensemble.stages(sample[None]):
                sure = float(stage.logits.softmax(-1).max()) >= p
                if sure or stage.index == 4:
                    break
            steps = 3 * stage.index
            by_55, by_75 = by_55 + (sure and steps <= 6.6), by_75 + (sure and steps <= 9)
            right, read = right + int(stage.logits.argmax() == label), read + steps
        expected = {"decided_by_55": by_55 / 40, "decided_by_75": by_75 / 40, "accuracy": right / 40}
        assert found[f"early@{p:g}"] == pytest.approx({**expected, "steps_saved": 1 - read / 480}, abs=1e-4)
        assert 0 < by_55 < by_75 < 40


def test_figures_are_those_of_predict(ensemble):
    x, y = torch.randn(40, 12, 3), torch.randint(0, 5, (40,))
    served = ProgressiveEnsemble(ensemble.students, calibration=Calibration(4, temperatures=(3.0, 2.0, 0.5, 1.5)))
    found = early_figures(served, DataLoader(TensorDataset(x, y), 7), 0.6)["early@0.6"]
    prediction = served.predict(x, Budget(confidence=0.6))
    assert 0 < found["steps_saved"] < 0.75
    assert found["steps_saved"] == pytest.approx(1 - float(prediction.stages.double().mean()) / 4, abs=1e-4)
    assert found["accuracy"] == pytest.approx(float((prediction.logits.argmax(1) == y).double().mean()), abs=1e-4)


def test_other_ensembles_have_no_such_figures():
    loader = DataLoader(TensorDataset(torch.randn(4, 1, 9, 9), torch.zeros(4).long()))
    assert early_figures(ProgressiveEnsemble([ConvStudent()]), loader) == {}


def test_no_fitted_threshold_is_taken_for_a_number(ensemble):
    loader = DataLoader(TensorDataset(torch.randn(4, 12, 3), torch.zeros(4).long()))
    assert len(early_figures(ensemble, loader, "fitted")) == 7
    json.dumps(early_figures(ensemble, loader))


@pytest.mark.parametrize("flip", [False, True])
def test_lengths_that_vary_from_batch_to_batch(ensemble, flip):
    batches = [(torch.randn(5, steps, 3), torch.randint(0, 5, (5,))) for steps in (12, 20)]
    found = early_figures(ensemble, batches[:: -1 if flip else 1])["early@0.9"]
    alone = [early_figures(ensemble, [batch])["early@0.9"] for batch in batches]
    assert found["accuracy"] == pytest.approx(sum(row["accuracy"] for row in alone) / 2, abs=1e-4)
    read = sum(5 * steps * (1 - row["steps_saved"]) for steps, row in zip((12, 20), alone, strict=True))
    assert found["steps_saved"] == pytest.approx(1 - read / 160, abs=1e-4)


def test_figures_need_labels(ensemble):
    with pytest.raises(UserError, match="Expected labels"):
        early_figures(ensemble, [(torch.randn(5, 12, 3), None)])
