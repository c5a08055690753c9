"""All stages as one graph, int8 weights, measured times, and a machine that has never seen torch."""

import json
import os
import shutil
import subprocess
import venv

import numpy as np
import pytest
import torch
import yaml
from helpers.export_runs import KINDS, mlp_student, write_run
from helpers.toys import Toys
from torch import nn

from bdistil import Budget, ProgressiveEnsemble, Student, UserError
from bdistil.ensemble.calibration import Calibration, ExitFigures, Promise, save_calibration
from bdistil.export.run import ExportOptions, export_run, export_summary
from bdistil.runner import BatchTimes, ExportedEnsemble, StageClock
from bdistil.runner import Budget as RunnerBudget
from bdistil.storage.run_directory import RunDirectory

QUICK = (("mlp", mlp_student, (6,)), ("gru", *KINDS["gru"]), ("segments", *KINDS["segments"]))


def toy_student(number):
    return Student(nn.Sequential(nn.Linear(8, 6 + number), nn.ReLU()), nn.Linear(6 + number, 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that names its data."""
    torch.manual_seed(3)
    run = write_run(tmp_path_factory.mktemp("toy") / "run", toy_student, (8,))
    run.config.write_text(yaml.safe_dump({"data": {"class_path": "helpers.toys.Toys"}}))
    return run


@pytest.mark.parametrize(("make", "shape"), [kind[1:] for kind in QUICK], ids=[kind[0] for kind in QUICK])
def test_the_graph_of_all_stages_gives_the_same_numbers_and_runs_where_it_is_faster(make, shape, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", make, shape)
    manifest = export_run(run, tmp_path / "out", ExportOptions(fuse="all"))
    fused = manifest["fused"]
    assert [(entry["first"], entry["last"]) for entry in fused["graphs"]] == [(1, 4)]
    assert fused["difference"] <= 1e-4
    assert fused["faster"] == (fused["latency"]["1"]["fused_ms"] < fused["latency"]["1"]["stages_ms"])
    ensemble, x = ProgressiveEnsemble.load(run.root), torch.randn(9, *shape)
    for faster in (True, False):
        runner = ExportedEnsemble(tmp_path / "out", {**manifest, "fused": {**fused, "faster": faster}}, 1)
        for stages in range(1, 5):
            if stages == 4 and faster:
                monkeypatch.setattr(runner, "_stages", None)  # nothing can run stage by stage
            answer = runner.predict(x.numpy(), RunnerBudget(stages=stages))
            np.testing.assert_allclose(answer.logits, ensemble(x, stages=stages).numpy(), atol=1e-4)
            assert set(answer.stages) == {stages}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_stands_beside_float(run, kind, tmp_path):
    plain = export_run(run, tmp_path / "float")
    manifest = export_run(run, tmp_path / "int8", ExportOptions(quantise=kind))
    found = manifest["quantised"]
    assert found["kind"] == kind
    x, y = Toys().parts["val"]
    stages = ProgressiveEnsemble.load(run.root).stages(x)
    wanted = [float((stage.logits.argmax(1) == y).float().mean()) for stage in stages]
    assert found["float"]["accuracy"] == pytest.approx(wanted, abs=1e-6)
    runner = ExportedEnsemble.load(tmp_path / "int8")
    ours = np.zeros(4)  # in the loader's batches, of which dynamic takes its ranges
    for rows in (slice(32), slice(32, 64)):
        ours += [(stage.logits.argmax(1) == y[rows].numpy()).mean() / 2 for stage in runner.stages(x[rows].numpy())]
    assert found["int8"]["accuracy"] == pytest.approx(list(ours), abs=1e-6)
    difference = runner.predict(x.numpy()).logits - ExportedEnsemble.load(tmp_path / "float").predict(x.numpy()).logits
    assert 0 < np.abs(difference).max() < 0.2
    assert found["float"]["bytes"] == sum(stage["bytes"] for stage in plain["stages"])
    assert sorted(path.name for path in (tmp_path / "int8").iterdir()) == sorted(
        ["manifest.json", "runner", *(stage["file"] for stage in manifest["stages"])]
    )


def test_an_int8_export_states_neither_promise_nor_parity_of_the_float_graphs_as_its_own(run, tmp_path):
    shutil.copytree(run.root, tmp_path / "run")
    own, promise = RunDirectory(tmp_path / "run"), Promise(1.0, 0.1, True, 100, 80, 0, 0.5, 90, None)
    exits = ExitFigures("max_prob", (0.9,) * 4, "", (0.25,) * 4, 0.9, 0.9, 200.0, promise=promise)
    save_calibration(own, Calibration(4, exits))
    for kind, words in ((None, "\nDifferences to PyTorch"), ("dynamic", "\nThe float graphs' differences to PyTorch")):
        manifest = export_run(own, tmp_path / f"{kind}", ExportOptions(quantise=kind))
        assert (manifest["exits"]["promise"] is None) == (kind is not None)
        assert list(manifest["exits"]["thresholds"]) == [0.9] * 4
        assert words in export_summary(manifest, tmp_path)


@pytest.mark.parametrize(
    "option", [{"fuse": "exit"}, {"normalisation": "Inside"}, {"quantise": "int8"}, {"format": "ONNX"}]
)
def test_an_option_that_is_none_is_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=f"Expected `{name}` to be one of .*, got '{value}'"):
        ExportOptions(**option)


def test_options_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(UserError, match="`--fuse` is for --format onnx"):
        ExportOptions(format="torch", fuse="all")
    with pytest.raises(UserError, match="give one of them"):
        ExportOptions(quantise="static", fuse="all")
    with pytest.raises(UserError, match="names none"):
        export_run(write_run(tmp_path / "run", mlp_student, (6,)), tmp_path / "out", ExportOptions(quantise="static"))
    assert not (tmp_path / "out").exists()


# ---- measured times


@pytest.fixture(scope="module")
def timed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("timed") / "out"
    export_run(run, out)
    return out


def test_the_manifest_carries_measured_times(timed):
    times = json.loads((timed / "manifest.json").read_text())["times"]
    assert [entry["batch"] for entry in times] == [1, 2, 8, 32, 256]
    for entry in times:
        assert len(entry["stages"]) == len(entry["late"]) == 4
        assert all(0 < median <= late for median, late in zip(entry["stages"], entry["late"], strict=True))


def test_a_deadline_is_kept_by_measured_times(timed):
    """Stages that are said to need 10 ms."""
    runner, x = ExportedEnsemble.load(timed), np.zeros((1, 8), np.float32)
    runner.clock = StageClock([BatchTimes(batch, [1e-3] * 4, [0.01] * 4, 1e-6, 1e-6) for batch in (1, 64)])
    assert runner.predict(x, RunnerBudget(seconds=0.005)).stages == 1  # one always answers
    assert runner.predict(x, RunnerBudget(seconds=1.0)).stages == 4
    assert runner.predict(x, RunnerBudget(seconds=0.009)).stages == 1


def test_samples_only_leave_where_that_pays(timed):
    x = torch.randn(64, 8).numpy()
    budget = RunnerBudget(confidence=0.45)
    runner = ExportedEnsemble.load(timed)
    runner.clock = None
    free = runner.predict(x, budget)
    assert len(set(free.stages.tolist())) > 2
    costs = np.array(runner.macs)
    np.testing.assert_array_equal(free.macs, costs[free.stages - 1])
    for compact, leaves in ((0.0, True), (1e9, False)):
        slow = [BatchTimes(batch, [1e-2 * batch] * 4, [1e-2] * 4, 1e-6, compact) for batch in (1, 64)]
        runner.clock = StageClock(slow)
        found = runner.predict(x, budget)
        np.testing.assert_array_equal(found.stages, free.stages)
        np.testing.assert_allclose(found.logits, free.logits, atol=1e-6)
        np.testing.assert_array_equal(found.macs, free.macs if leaves else np.full(64, costs[-1]))


# ---- elsewhere


@pytest.mark.slow
def test_a_fresh_environment_reaches_the_same_predictions(run, timed, tmp_path):
    """A venv that has only numpy and onnxruntime, and the exported folder."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "-q", "numpy", "onnxruntime"], check=True, env=environment)
    assert subprocess.run([python, "-c", "import torch"], env=environment, capture_output=True).returncode == 1
    x = torch.randn(50, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    ensemble = ProgressiveEnsemble.load(run.root)
    for given, budget in (([], Budget()), (["--stages", "2"], Budget(stages=2))):
        command = [python, timed / "runner", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", *given]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), ensemble.predict(x, budget).logits.numpy(), atol=1e-4)
