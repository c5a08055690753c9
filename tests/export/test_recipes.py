"""Every recipe whose data come with a package is exported, with parity on its own samples."""

import json
from importlib import import_module
from inspect import getsource

import numpy as np
import pytest
import torch
import yaml

from bdistil import Budget, ProgressiveEnsemble
from bdistil.cli.app import main
from bdistil.cli.recipe_files import recipes
from bdistil.runner import Budget as RunnerBudget
from bdistil.runner import ExportedEnsemble, ExportError

SHORT = [
    "--model.boosting.rounds", "2", "--trainer.max_epochs", "1", "--model.teacher.epochs", "1",
    "--trainer.accelerator", "cpu", "--tracking.mode", "disabled",
]  # fmt: skip


def embedded():
    """Names of the recipes whose data module reads a packaged file."""
    named = {name: yaml.safe_load(path.read_text())["data"]["class_path"] for name, path in recipes().items()}
    modules = {name: import_module(path.rpartition(".")[0]) for name, path in named.items()}
    return [name for name, module in modules.items() if "packaged_file" in getsource(module)]


def test_the_search_finds_recipes():
    assert "digits" in embedded()


CHOSEN = [pytest.param(name, marks=[] if name == "digits" else pytest.mark.slow) for name in embedded()]


@pytest.mark.parametrize("recipe", CHOSEN)
def test_a_recipe_is_exported_with_parity(recipe, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["fit", "--config", recipe, *SHORT, "--run_dir", str(run)]) == 0
    assert main(["export", "--run_dir", str(run), "--format", "onnx", "--output", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"{manifest['parity']['samples']} samples of the validation part" in capsys.readouterr().out
    assert max(manifest["parity"]["differences"]) <= 1e-4
    ensemble, runner = ProgressiveEnsemble.load(run), ExportedEnsemble.load(out)
    x = torch.randn(8, *ensemble.inputs.shape)
    real = manifest["task"] == "regression"
    if real:
        with pytest.raises(ExportError, match="no `confidence` for real outputs"):
            runner.predict(x.numpy(), RunnerBudget(confidence=0.3))
    for limits in ({}, {"stages": 1}, *([] if real else [{"confidence": 0.3}])):
        theirs, ours = ensemble.predict(x, Budget(**limits)), runner.predict(x.numpy(), RunnerBudget(**limits))
        np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(ours.stages, theirs.stages.numpy())
    if manifest["normalisation"]:
        given = ["--output", str(tmp_path / "raw"), "--normalisation", "inside"]
        assert main(["export", "--run_dir", str(run), *given]) == 0
        mean, deviation = (np.float32(manifest["normalisation"][key]) for key in ("mean", "deviation"))
        raw = ExportedEnsemble.load(tmp_path / "raw").predict(x.numpy() * deviation + mean)
        np.testing.assert_allclose(raw.logits, ensemble(x).numpy(), atol=1e-4)
