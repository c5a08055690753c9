"""The runner by itself: without torch, on bad input, its command line."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.export_runs import change_manifest, exported_mlps

from bdistil import Budget, ProgressiveEnsemble
from bdistil.export.runner import Budget as RunnerBudget
from bdistil.export.runner import ExportedEnsemble, ExportError
from bdistil.export.runner.command import main


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return exported_mlps(tmp_path_factory.mktemp("mlp"))


@pytest.fixture
def folder(mlp, tmp_path):
    shutil.copytree(mlp[1], tmp_path / "out")
    return tmp_path / "out"


BLOCKED = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "bdistil", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
sys.path.insert(0, ".")
from runner.command import main
assert "torch" not in sys.modules
sys.exit(main(sys.argv[1:]))
"""


def test_only_the_folder_is_needed(mlp, folder, tmp_path):
    """In a process that cannot import torch, onnx or bdistil."""
    run, out = mlp[0], folder
    change_manifest(out, lambda m: m.update(times=[]))  # the run has none either
    x = torch.randn(9, 6)
    np.save(tmp_path / "x.npy", x.numpy())
    command = [sys.executable, "-c", BLOCKED, ".", "--input", str(tmp_path / "x.npy")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*command, "--confidence", "0.5"], cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = ProgressiveEnsemble.load(run.root).predict(x, Budget(confidence=0.5))
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [int(line[0]) for line in lines] == wanted.logits.argmax(1).tolist()
    assert [int(line[1].split()[1]) for line in lines] == wanted.stages.tolist()


def test_the_command_line_writes_logits_and_answers_mistakes(mlp, tmp_path, capsys):
    run, out = mlp
    x = torch.randn(3, 6)
    np.save(tmp_path / "x.npy", x.numpy())
    given = ["--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]
    assert main([str(out), *given, "--stages", "2"]) == 0
    wanted = ProgressiveEnsemble.load(run.root)(x, stages=2)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted.numpy(), atol=1e-4)
    with open(tmp_path / "evil.npy", "wb") as file:
        np.save(file, np.array([print], dtype=object), allow_pickle=True)
    assert main([str(out), "--input", str(tmp_path / "evil.npy")]) == 2
    assert "allow_pickle=False" in capsys.readouterr().err
    assert main([str(tmp_path), "--input", str(tmp_path / "x.npy")]) == 2
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 7), np.float32), r"`x`.*shape \(B, 6\).*got \(2, 7\)"),
        (np.zeros(6, np.float32), r"shape \(B, 6\).*got \(6,\)"),
        (np.zeros((0, 6), np.float32), r"B >= 1, got \(0, 6\)"),
        ([[0.0] * 6], r"array.*got list"),
        (np.zeros((2, 6)), "dtype float32, got float64"),
        (np.array([[0] * 6, [np.nan] * 6], np.float32), "got 1 such samples of 2, the first at index 1"),
        (np.full((1, 6), np.inf, np.float32), "without NaN or infinity"),
    ],
)
def test_input_that_is_none_is_named(mlp, x, message):
    runner = ExportedEnsemble.load(mlp[1])
    for call in (runner.predict, lambda x: next(runner.stages(x))):
        with pytest.raises(ExportError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"stages": 0}, "`stages`.*got 0"),
        ({"macs": 0}, "`macs`.*got 0"),
        ({"seconds": float("nan")}, "`seconds`.*got nan"),
        ({"confidence": 2}, r"`confidence`.*\(0, 1\]"),
        ({"confidence": "sure"}, "'sure'"),
        ({"confidence": 0.5, "rule": "max"}, "'max'"),
        ({"rule": "margin"}, "with a confidence"),
    ],
)
def test_a_budget_that_is_none_is_refused(limits, message):
    with pytest.raises(ExportError, match=message):
        RunnerBudget(**limits)


def test_fitted_thresholds_that_are_not_there(mlp):
    with pytest.raises(ExportError, match="found none"):
        ExportedEnsemble.load(mlp[1]).predict(np.zeros((1, 6), np.float32), RunnerBudget(confidence="fitted"))


# ---- its arrays, which are bound once for each batch size


@pytest.fixture
def plain(mlp):
    """Runner, and a function that gives the logits of every stage by PyTorch."""
    ensemble = ProgressiveEnsemble.load(mlp[0].root)
    return ExportedEnsemble.load(mlp[1]), lambda x: [stage.logits.numpy() for stage in ensemble.stages(torch.tensor(x))]


def samples(*sizes):
    return [np.random.default_rng(size).standard_normal((size, 6)).astype(np.float32) for size in sizes]


def test_what_was_given_stays_when_the_runner_runs_on(plain):
    runner, wanted = plain
    first, second = samples(3), -samples(3)[0]
    stages, prediction = list(runner.stages(first[0])), runner.predict(first[0])
    runner.predict(second)
    list(runner.stages(second))
    for stage, logits in zip(stages, wanted(first[0]), strict=True):
        np.testing.assert_allclose(stage.logits, logits, atol=1e-5)
    np.testing.assert_allclose(prediction.logits, wanted(first[0])[-1], atol=1e-5)


def test_batches_in_turns_keep_apart(plain):
    """Two of one size, half-way through at the same time."""
    runner, wanted = plain
    one, two = samples(4)[0], -samples(4)[0]
    for first, second, *logits in zip(runner.stages(one), runner.stages(two), wanted(one), wanted(two), strict=True):
        np.testing.assert_allclose(first.logits, logits[0], atol=1e-5)
        np.testing.assert_allclose(second.logits, logits[1], atol=1e-5)


def test_threads_share_a_runner(plain):
    runner, wanted = plain
    batches = [np.random.default_rng(seed).standard_normal((256, 6)).astype(np.float32) for seed in range(50)]
    answers = [wanted(x)[-1] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for given, logits in zip(pool.map(runner.predict, batches * 20), answers * 20, strict=True):
            np.testing.assert_allclose(given.logits, logits, atol=1e-5)


@pytest.mark.parametrize("lay", [np.asfortranarray, lambda x: x[::-1], lambda x: np.repeat(x, 2, 1)[:, ::2]])
def test_a_batch_may_lie_in_memory_as_it_likes(plain, lay):
    runner, wanted = plain
    x = lay(samples(5)[0])
    np.testing.assert_allclose(runner.predict(x).logits, wanted(np.ascontiguousarray(x))[-1], atol=1e-5)
