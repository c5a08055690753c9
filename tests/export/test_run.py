"""An exported ensemble against PyTorch, stage by stage and within budgets."""

import numpy as np
import pytest
import torch
from helpers.export_runs import KINDS, MACS, write_run

from bdistil import Budget, ProgressiveEnsemble
from bdistil.ensemble.budget import RULES, confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures
from bdistil.export.run import export_run
from bdistil.models.student import Student
from bdistil.runner import Budget as RunnerBudget
from bdistil.runner import ExportedEnsemble


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A run of each kind of student, its export, and samples."""
    make, shape = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    exits = ExitFigures("margin", (0.2, 0.3, 0.1, 0.0), "", (0.4, 0.3, 0.2, 0.1), 0.9, 0.9, 200.0)
    figures = Calibration(4, exits, temperatures=(0.5, 0.7, 0.9, 1.1), weights=(1.0, 0.5, 2.0, 0.7))
    run = write_run(folder / "run", make, shape, figures)
    export_run(run, folder / "out")
    ensemble, runner = ProgressiveEnsemble.load(run.root), ExportedEnsemble.load(folder / "out")
    runner.clock = None  # the run has no times either: which samples leave depends on them
    return ensemble, runner, torch.randn(40, *shape)


@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_every_stage_is_that_of_pytorch(exported, batch):
    ensemble, runner, x = exported
    theirs = list(ensemble.stages(x[:batch]))
    for stage, wanted in zip(runner.stages(x[:batch].numpy()), theirs, strict=True):
        assert (stage.index, stage.macs) == (wanted.index, wanted.macs)
        np.testing.assert_allclose(stage.logits, wanted.logits.numpy(), rtol=0, atol=1e-4)


def assert_same_prediction(exported, **limits):
    ensemble, runner, x = exported
    theirs, ours = ensemble.predict(x, Budget(**limits)), runner.predict(x.numpy(), RunnerBudget(**limits))
    np.testing.assert_array_equal(ours.stages, theirs.stages.numpy())
    np.testing.assert_array_equal(ours.macs, theirs.macs.numpy())
    np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), rtol=0, atol=1e-4)
    return ours


@pytest.mark.parametrize(
    ("limits", "stages"),
    [({}, 4), ({"stages": 2}, 2), ({"macs": 450}, 3), ({"macs": 1}, 1), ({"stages": 3, "macs": 300}, 2),
     ({"seconds": 60.0, "stages": 3}, 3), ({"seconds": 1e-9}, 1)],
)  # fmt: skip
def test_the_runner_keeps_limits_as_pytorch_does(exported, limits, stages):
    assert set(assert_same_prediction(exported, **limits).stages) == {stages}


@pytest.mark.parametrize("rule", RULES)
def test_the_runner_exits_as_pytorch_does(exported, rule):
    ensemble, _, x = exported
    first = next(ensemble.stages(x)).logits
    median = 0.6 if rule == "agreement" else float(confidence_of(first, rule, 0.5).quantile(0.5))  # between two samples
    assert len(set(assert_same_prediction(exported, confidence=median, rule=rule).stages)) >= 2


def test_the_runner_exits_at_fitted_thresholds(exported):
    assert len(set(assert_same_prediction(exported, confidence="fitted").stages)) >= 2


def test_the_manifest_describes_the_stages(exported):
    ensemble, runner, _ = exported
    manifest = runner.manifest
    assert manifest["temperatures"] == list(ensemble.calibration.temperatures)
    assert manifest["exits"]["thresholds"] == [0.2, 0.3, 0.1, 0.0]
    assert [stage["macs"] for stage in manifest["stages"]] == MACS
    assert manifest["parity"]["samples"] == 256
    assert max(manifest["parity"]["differences"]) <= 1e-4
    assert all(t["shape"][0] == "batch" for stage in manifest["stages"] for t in stage["inputs"] + stage["outputs"])
    links = [stage["links"] for stage in manifest["stages"]]
    takes_links = isinstance(ensemble.students[2], Student)
    assert links == ([[], [1], [2, 1], [3]] if takes_links else [[], [1], [], [2]])
