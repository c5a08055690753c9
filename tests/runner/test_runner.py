"""The runner by itself: without torch, on bad input, its command line."""

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.export_runs import KINDS, RUNGS, change_manifest, committed, exported_mlps, write_run
from torch import nn

from bdistil import Budget, ProgressiveEnsemble, Student
from bdistil.ensemble.calibration import Calibration
from bdistil.export import export_run
from bdistil.runner import RULES, BatchTimes, ExportedEnsemble, ExportError, StageClock
from bdistil.runner import Budget as RunnerBudget
from bdistil.runner.command import main
from bdistil.storage.run_directory import RunDirectory


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


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_array_is_one_message(tmp_path, capsys, content):
    (tmp_path / "x.npy").write_bytes(content)
    assert main([str(tmp_path), "--input", str(tmp_path / "x.npy")]) == 2
    assert "Expected `--input` to be a .npy file of numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 7), np.float32), r"`x`.*shape \(B, 6\).*got \(2, 7\)"),
        (np.zeros(6, np.float32), r"shape \(B, 6\).*got \(6,\)"),
        (np.zeros((0, 7), np.float32), r"shape \(B, 6\).*got \(0, 7\)"),
        ([[0.0] * 6], r"array.*got list"),
        (np.zeros((2, 6)), "dtype float32, got float64"),
        (np.array([[0] * 6, [np.nan] * 6], np.float32), "got 1 such samples of 2, the first at index 1"),
        (np.full((1, 6), np.inf, np.float32), "without NaN or infinity"),
        (np.ma.masked_invalid(np.full((1, 6), np.nan, np.float32)), "without a mask"),
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
        ({"stages": 2.5}, "`stages` of a budget to be a whole number >= 1, got 2.5"),
        ({"stages": True}, "`stages` of a budget to be a whole number >= 1, got True"),
        ({"macs": "1"}, "`macs` of a budget to be a number > 0, got '1'"),
        ({"confidence": True}, "got True"),
    ],
)
def test_a_budget_that_is_none_is_refused(limits, message):
    with pytest.raises(ExportError, match=message):
        RunnerBudget(**limits)


def test_fitted_thresholds_that_are_not_there(mlp):
    with pytest.raises(ExportError, match="found none"):
        ExportedEnsemble.load(mlp[1]).predict(np.zeros((1, 6), np.float32), RunnerBudget(confidence="fitted"))


# ---- exits: the answers are those of PyTorch, whatever the batch and the times


def clock(check=1e-6, compact=1e-6):
    return StageClock([BatchTimes(batch, [1e-3 * batch] * 4, [1e-3 * batch] * 4, check, compact) for batch in (1, 64)])


CLOCKS = {"none": None, "all pays": clock(), "no removal": clock(compact=1.0), "no check": clock(check=1.0),
          "some": clock(3e-3, 5e-3)}  # fmt: skip
LEVELS = {"max_prob": 0.4, "margin": 0.12, "entropy": 0.06, "agreement": 0.5}


@pytest.mark.parametrize("times", CLOCKS)
@pytest.mark.parametrize("rule", RULES)
def test_answers_are_those_of_the_first_stage_that_is_sure(mlp, rule, times):
    ensemble, runner = ProgressiveEnsemble.load(mlp[0].root), ExportedEnsemble.load(mlp[1])
    ensemble.calibration, runner.clock = Calibration(4), CLOCKS[times]
    x, budget = torch.randn(90, 6), {"confidence": LEVELS[rule], "rule": rule}
    singles = [ensemble.predict(sample, Budget(**budget)) for sample in x.split(1)]
    stages = torch.cat([single.stages for single in singles])
    assert len(stages.unique()) > (rule != "agreement")
    for size in (1, 2, 5, 30, 90, None, 90):  # in between all that the guard has learned is forgotten
        if size is None:
            runner.clock = CLOCKS[times]
            continue
        found = [runner.predict(part.numpy(), RunnerBudget(**budget)) for part in x.split(size)]
        np.testing.assert_array_equal(np.concatenate([part.stages for part in found]), stages.numpy())
        logits = np.concatenate([part.logits for part in found])
        np.testing.assert_allclose(logits, torch.cat([single.logits for single in singles]).numpy(), atol=1e-4)
        for part in found:
            assert (part.macs >= np.array(runner.macs)[part.stages - 1]).all()
    if times == "no removal":
        assert len(set(part.macs.tolist())) == 1
    if times in ("none", "all pays"):
        np.testing.assert_array_equal(part.macs, np.array(runner.macs)[part.stages - 1])


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("limits", [{"stages": 2}, {"stages": 1}, {"macs": 250}, {"seconds": 1e-3}], ids=str)
def test_other_limits_leave_the_last_answer_to_who_is_undecided(mlp, limits, size):
    ensemble, runner = ProgressiveEnsemble.load(mlp[0].root), ExportedEnsemble.load(mlp[1])
    runner.clock = StageClock([BatchTimes(batch, [1e-3] * 4, [1.0] * 4, 1e-6, 1e-6) for batch in (1, 64)])
    most = 1 if "seconds" in limits else Budget(**limits).stages_within(runner.macs)
    x = torch.randn(7, 6)
    stages = np.minimum(ensemble.predict(x, Budget(confidence=0.45)).stages.numpy(), most)
    found = [runner.predict(part.numpy(), RunnerBudget(confidence=0.45, **limits)).stages for part in x.split(size)]
    np.testing.assert_array_equal(np.concatenate(found), stages)


@pytest.mark.parametrize("limits", [{}, {"stages": 2}, {"confidence": 0.5}, {"seconds": 1.0}], ids=str)
def test_a_batch_without_samples(mlp, limits):
    budget, runner = RunnerBudget(**limits), ExportedEnsemble.load(mlp[1])
    nobody = np.zeros((0, 6), np.float32)
    found = runner.predict(nobody, budget)
    assert found.logits.shape == (0, 5)
    assert found.stages.shape == found.macs.shape == (0,)
    assert [stage.logits.shape for stage in runner.stages(nobody)] == [(0, 5)] * 4


# ---- to other processes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda runner: pickle.loads(pickle.dumps(runner))])
def test_a_copy_opens_the_folder_again(mlp, copied, tmp_path, monkeypatch):
    monkeypatch.chdir(mlp[1].parent)
    runner = ExportedEnsemble.load("out")
    runner.clock = clock(compact=0.25)
    runner.predict(np.zeros((2, 6), np.float32), RunnerBudget(confidence=0.5))
    monkeypatch.chdir(tmp_path)
    other = copied(runner)
    assert other.graphs[0].session is not runner.graphs[0].session
    assert other.clock.compact(8) == pytest.approx(0.25)
    x = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    np.testing.assert_array_equal(other.predict(x).logits, runner.predict(x).logits)


def test_a_worker_that_is_spawned_answers(mlp):
    runner, x = ExportedEnsemble.load(mlp[1]), np.ones((3, 6), np.float32)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(runner.predict, x).result()
    np.testing.assert_allclose(found.logits, runner.predict(x).logits)


# ---- manifests that are not for it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": 2},
            "manifest.json has version 2, but this runner reads version 1: export the run again",
        ),
        ({"version": "1"}, "has version '1'"),
        ({"version": True}, "has version True"),
        ({"version": None}, "has version None"),
        ({"format": "other"}, "of format 'bdistil-export', got 'other'"),
    ],
)
def test_a_manifest_of_another_version_is_refused_in_one_sentence(folder, change, message):
    change_manifest(folder, lambda manifest: manifest.update(change))
    with pytest.raises(ExportError, match=message) as error:
        ExportedEnsemble.load(folder)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{}", "not json"])
def test_a_manifest_that_is_none_is_named(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ExportError, match=r"Expected .*manifest.json to be the manifest of an export"):
        ExportedEnsemble.load(folder)


def test_a_manifest_without_a_version_is_refused(folder):
    change_manifest(folder, lambda manifest: manifest.pop("version"))
    with pytest.raises(ExportError, match="has version 'none'"):
        ExportedEnsemble.load(folder)


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


# ---- no samples, and too few steps


class Pooled(nn.Sequential):
    """Needs seven steps."""

    def __init__(self):
        super().__init__(nn.Conv1d(3, 4, 3, stride=2), nn.MaxPool1d(3), nn.AdaptiveMaxPool1d(1), nn.Flatten())

    def forward(self, x):
        return super().forward(x.transpose(1, 2))


EDGES = """
import sys; sys.path.insert(0, ".")
import numpy as np
from runner import Budget, ExportedEnsemble, ExportError
ensemble = ExportedEnsemble.load(".")
x = np.zeros((4, 9, 3), np.float32)
for budget in (Budget(), Budget(confidence=0.5), Budget(seconds=1.0)):
    assert ensemble.predict(x[:0], budget).logits.shape == (0, 5)
assert [len(stage.logits) for stage in ensemble.stages(x[:0])] == [0] * 4
for steps in range(9):
    try:
        ensemble.predict(x[:, :steps])
    except ExportError as error:
        print(error)
"""


@pytest.mark.parametrize(("kind", "least"), [("lstm", 1), ("gru", 1), ("segments", 4), ("pooled", 7)])
def test_without_samples_or_steps_nothing_runs(kind, least, tmp_path):
    """onnxruntime ends the process in a GRU or LSTM, and pools nothing to a number: in a process of its own."""
    make, shape = KINDS.get(kind, (lambda number: Student(Pooled(), nn.Linear(4, 5)), (12, 3)))
    run = write_run(tmp_path / "run", make, shape)
    for number in range(4):  # lengths that vary
        path = run.folder(number) / "round.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "input_shape": [[8, 12], 3]}))
    export_run(run, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", EDGES], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [f"Expected `x` of at least {least} along axis 1, got (4, {steps}, 3)." for steps in range(least)]
    assert done.stdout.splitlines() == expected


def test_seconds_count_from_the_call(mlp, monkeypatch):
    """Also while x is checked, which takes long for large batches."""
    runner = ExportedEnsemble.load(mlp[1])
    check = runner.check
    monkeypatch.setattr(runner, "check", lambda x: time.sleep(0.3) or check(x))
    assert runner.predict(np.zeros((4, 6), np.float32), RunnerBudget(seconds=0.2)).stages.tolist() == [1] * 4


class Tokens(nn.Module):
    """Mean of embedded token ids (B, 4)."""

    def __init__(self, number=0):
        super().__init__()
        self.table = nn.Embedding(10, 5)

    def forward(self, x):
        return self.table(x).mean(1)


def test_token_ids_that_pytorch_refuses_are_refused(tmp_path):
    """ONNX counts negative indices from the end."""
    run, student = RunDirectory(tmp_path / "run"), Student(Tokens(), nn.Linear(5, 5)).eval()
    tensors, record = committed(student, RUNGS[0], 0, (4,))
    run.commit(0, tensors, {**record, "input_dtype": "int64"})
    export_run(run, tmp_path / "out")
    runner, x = ExportedEnsemble.load(tmp_path / "out"), np.zeros((2, 4), np.int64)
    assert runner.predict(x).logits.shape == (2, 5)
    x[1, 2] = -1
    with pytest.raises(ExportError, match=r"`x` without negative numbers, as indices of an embedding, got -1"):
        runner.predict(x)


def test_batches_are_measured_in_any_order(mlp, monkeypatch):
    runner = ExportedEnsemble.load(mlp[1])
    assert [entry["batch"] for entry in runner.measure((8, 1), repeats=2)] == [1, 8]
