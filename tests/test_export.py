"""An exported ensemble against PyTorch: the graphs, the runner, what the export refuses."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from bdistil import Budget, ProgressiveEnsemble, UserError
from bdistil.anytime import AnytimeFigures, ExitFigures
from bdistil.blueprint import describe
from bdistil.ensemble import build_student
from bdistil.errors import RunError
from bdistil.exit_rules import RULES, sureness
from bdistil.export import ExportOptions, export_run
from bdistil.export_folder import seal
from bdistil.export_graphs import EXPORTERS, require_symbolic
from bdistil.run_directory import RunDirectory
from bdistil.runner import Budget as RunnerBudget
from bdistil.runner import ExportedEnsemble, ExportError, main
from bdistil.students import Rung, Student, run_student
from bdistil.zoo_sequences import RecurrentSegmentStudent

L = 5
RUNGS = [Rung(0), Rung(1), Rung(2, "hidden", 4), Rung(1, "residual")]
MACS = [100, 250, 420, 600]


class Recurrent(nn.Module):
    """Output of a recurrent net after the last step."""

    def __init__(self, kind, hidden):
        super().__init__()
        self.net = getattr(nn, kind)(3, hidden, batch_first=True)

    def forward(self, x):
        return self.net(x)[0][:, -1]


def conv_student(number):
    body = nn.Sequential(
        nn.Conv2d(1, 3 + number, 3, stride=2), nn.BatchNorm2d(3 + number), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return Student(body, nn.Linear(3 + number, L))


def mlp_student(number):
    return Student(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4 + number), nn.Tanh()), nn.Linear(4 + number, L)
    )


def recurrent_student(kind):
    return lambda number: Student(Recurrent(kind, 4 + number), nn.Linear(4 + number, L))


def plain_third(number):
    """Students of which one takes no links."""
    return nn.Sequential(nn.Flatten(), nn.Linear(6, L)) if number == 2 else mlp_student(number)


def segment_student(number):
    """Reads its quarter of the steps, from the state handed over."""
    return RecurrentSegmentStudent(3, L, segments=4, hidden=4 + number % 2)


KINDS = {
    "conv": (conv_student, (1, 9, 9)),
    "mlp": (mlp_student, (6,)),
    "lstm": (recurrent_student("LSTM"), (7, 3)),
    "gru": (recurrent_student("GRU"), (7, 3)),
    "plain": (plain_third, (6,)),
    "segments": (segment_student, (9, 3)),
}


def write_run(root, make, shape, figures=None):
    """A run directory of four committed rounds, with statistics of batch norm that are not those of the start."""
    run, students = RunDirectory(root), []
    for number, rung in enumerate(RUNGS):
        student = build_student(make, number, students, rung)
        run_student(student.train(), students, 1 + 2 * torch.randn(32, *shape))
        student.eval()
        run.commit(number, *committed(student, rung, number, shape))
        students.append(student)
    if figures:
        run.keep_anytime(figures)
    return run


def committed(student, rung, number, shape):
    """Tensors and record of a round, as a run keeps them."""
    plan, tensors = describe(student)
    record = {"scale": 2.5, "curve": {"macs": MACS[number]}, "input_shape": list(shape), "input_dtype": "float32",
              "rung": vars(rung), "blueprint": plan}  # fmt: skip
    return tensors, record


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A run of each kind of student, its export, and samples."""
    make, shape = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    exits = ExitFigures("margin", (0.2, 0.3, 0.1, 0.0), "", (0.4, 0.3, 0.2, 0.1), 0.9, 0.9, 200.0)
    figures = AnytimeFigures(4, exits, temperatures=(0.5, 0.7, 0.9, 1.1), weights=(1.0, 0.5, 2.0, 0.7))
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
    median = 0.6 if rule == "agreement" else float(sureness(first, rule, 0.5).quantile(0.5))  # between two samples
    assert len(set(assert_same_prediction(exported, confidence=median, rule=rule).stages)) >= 2


def test_the_runner_exits_at_fitted_thresholds(exported):
    assert len(set(assert_same_prediction(exported, confidence="fitted").stages)) >= 2


def test_the_manifest_says_what_is_there(exported):
    ensemble, runner, _ = exported
    manifest = runner.manifest
    assert manifest["temperatures"] == list(ensemble.figures.temperatures)
    assert manifest["exits"]["thresholds"] == [0.2, 0.3, 0.1, 0.0]
    assert [stage["macs"] for stage in manifest["stages"]] == MACS
    assert manifest["parity"]["samples"] == 256
    assert max(manifest["parity"]["differences"]) <= 1e-4
    assert all(t["shape"][0] == "batch" for stage in manifest["stages"] for t in stage["inputs"] + stage["outputs"])
    links = [stage["links"] for stage in manifest["stages"]]
    takes_links = isinstance(ensemble.students[2], Student)
    assert links == ([[], [1], [2, 1], [3]] if takes_links else [[], [1], [], [2]])


# ---- the runner without torch


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """A run of MLPs without fitted figures, and its exported folder."""
    folder = tmp_path_factory.mktemp("mlp")
    torch.manual_seed(2)
    run = write_run(folder / "run", mlp_student, (6,))
    export_run(run, folder / "out")
    return run, folder / "out"


BLOCKED = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "bdistil", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
import runner
assert "torch" not in sys.modules
sys.exit(runner.main(sys.argv[1:]))
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
        ({"rule": "margin"}, "beside a confidence"),
    ],
)
def test_a_budget_that_is_none_is_refused(limits, message):
    with pytest.raises(ExportError, match=message):
        RunnerBudget(**limits)


def test_fitted_thresholds_that_are_not_there(mlp):
    with pytest.raises(ExportError, match="found none"):
        ExportedEnsemble.load(mlp[1]).predict(np.zeros((1, 6), np.float32), RunnerBudget(confidence="fitted"))


# ---- a folder that was tampered with


@pytest.fixture
def folder(mlp, tmp_path):
    shutil.copytree(mlp[1], tmp_path / "out")
    return tmp_path / "out"


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def hash_of(folder, number):
    return json.loads((folder / "manifest.json").read_text())["stages"][number]["sha256"]


def refuses(folder, *message):
    with pytest.raises(ExportError) as caught:
        ExportedEnsemble.load(folder)
    for part in message:
        assert part in str(caught.value)


def test_a_missing_stage_is_named_with_its_hash(folder):
    (folder / "stage_02.onnx").unlink()
    refuses(folder, "stage_02.onnx is missing", hash_of(folder, 1))


def test_a_truncated_stage_is_named_with_its_hash(folder):
    path = folder / "stage_03.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    refuses(folder, "stage_03.onnx is", " of ", hash_of(folder, 2))


def test_swapped_stages_are_named_with_their_hashes(folder):
    one, two = folder / "stage_02.onnx", folder / "stage_03.onnx"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refuses(folder, "stage_02.onnx is", hash_of(folder, 1), hash_of(folder, 2))


def test_stages_swapped_in_the_manifest_read_other_tensors(folder):
    change_manifest(folder, lambda m: m["stages"][1].update(m["stages"][2] | {"inputs": m["stages"][1]["inputs"]}))
    refuses(folder, "stage_03.onnx reads")


@pytest.mark.parametrize("name", ["../out2/stage_01.onnx", "/etc/passwd", "..", "", "a/b.onnx", "..\\x.onnx"])
def test_no_path_leaves_the_folder(folder, name):
    shutil.copytree(folder, folder.with_name("out2"))
    change_manifest(folder, lambda m: m["stages"][0].update(file=name))
    refuses(folder, "no path may leave it", repr(name))


def test_no_link_leaves_the_folder(folder):
    target = folder.with_name("elsewhere.onnx")
    (folder / "stage_01.onnx").rename(target)
    (folder / "stage_01.onnx").symlink_to(target)
    refuses(folder, "no path may leave it")


def test_a_graph_cannot_read_weights_from_another_file(folder, monkeypatch):
    """ONNX knows weights in files beside the graph; a graph of ours has none, and one is refused."""
    secret = folder.with_name("secret.bin")
    secret.write_bytes(bytes(4 * 6 * 8))
    monkeypatch.chdir(folder)
    path = folder / "stage_01.onnx"
    graph = onnx.load(str(path))
    weight = next(t for t in graph.graph.initializer if list(t.dims) == [8, 6])
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", str(4 * 6 * 8))):
        weight.external_data.add(key=key, value=value)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    path.write_bytes(graph.SerializeToString())
    change_manifest(folder, lambda m: m["stages"][0].update(seal(path)))
    refuses(folder, "stage_01.onnx cannot be run")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "x", "version": 1}', '{"format": "bdistil-export", "version": 2}']
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    refuses(folder, "manifest.json")


def test_a_manifest_that_is_not_whole_is_refused(folder):
    change_manifest(folder, lambda m: m.pop("times"))
    refuses(folder, "manifest.json is not whole")


def test_nothing_in_a_folder_is_a_pickle(mlp, tmp_path):
    run, out = mlp
    export_run(run, tmp_path / "pt2", ExportOptions(format="torch"))
    files = [(path.name, path.read_bytes()) for folder in (out, tmp_path / "pt2") for path in folder.iterdir()]
    for name, _ in list(files):
        if name.endswith(".pt2"):
            archive = zipfile.ZipFile(tmp_path / "pt2" / name)
            files += [(entry, archive.read(entry)) for entry in archive.namelist()]
    assert len(files) > 20
    for name, data in files:
        assert data[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), name
        assert not (name.endswith(".pt") and data), name
        if not name.endswith(".pt2"):
            assert data[:4] != b"PK\x03\x04", name


# ---- what the export refuses


def test_an_export_is_only_replaced_when_told_to(mlp, tmp_path):
    run, _ = mlp
    export_run(run, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").stat().st_ino
    with pytest.raises(UserError, match="--overwrite true"):
        export_run(run, tmp_path / "out")
    export_run(run, tmp_path / "out", ExportOptions(overwrite=True))
    assert (tmp_path / "out" / "manifest.json").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no export"):
        export_run(run, tmp_path / "mine", ExportOptions(overwrite=True))


def test_a_failed_export_leaves_nothing_and_the_older_one(mlp, tmp_path, monkeypatch):
    run, _ = mlp
    export_run(run, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr("bdistil.export_parity.TOLERANCE", -1.0)
    monkeypatch.setattr("bdistil.export.EXPORTERS", {"torchscript": EXPORTERS["torchscript"]})
    with pytest.raises(RunError, match=r"Stage 1 as exported differs from PyTorch by .* at batch 1"):
        export_run(run, tmp_path / "out", ExportOptions(overwrite=True))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class FixedBatch(nn.Module):
    """Writes the batch size of the example into its shape: the silent specialisation."""

    def forward(self, x):
        return torch.cat((x, x.new_ones(int(x.shape[0]), 1) * 2), 1)


class Fickle(nn.Module):
    """Decides from the values of a batch, which a trace does not follow."""

    def forward(self, x):
        return x * 2 if x[0, 0] > 0 else x * 3


def test_a_student_that_fixes_the_batch_is_refused(tmp_path):
    """The tracing exporter keeps the batch of its example without a word; other batch sizes show it."""
    make = lambda number: Student(nn.Sequential(nn.Linear(6, 4), FixedBatch()), nn.Linear(5, L))  # noqa: E731
    run = write_run(tmp_path / "run", make, (6,))
    with pytest.raises(RunError, match=r"(?s)torchscript: Stage 1 .*batch of 1.*dynamo: .*constant"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_tracing_exporter_lacks_the_newer_one_has(tmp_path):
    """Pooling of 7 places to 2."""
    make = lambda number: Student(nn.Sequential(nn.AdaptiveAvgPool1d(2)), nn.Linear(2, L))  # noqa: E731
    run = write_run(tmp_path / "run", make, (7,))
    assert export_run(run, tmp_path / "out")["exporter"] == "dynamo"


def test_a_student_that_decides_from_values_is_refused(tmp_path):
    make = lambda number: Student(nn.Sequential(nn.Linear(6, 4), Fickle()), nn.Linear(4, L))  # noqa: E731
    run = write_run(tmp_path / "run", make, (6,))
    with pytest.raises(RunError, match=r"(?s)torchscript: Stage 1 .*differs from PyTorch.*dynamo: "):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_is_fixed_at_one_batch_is_refused():
    with pytest.raises(RunError, match="takes `x` with a batch of 1 only"):
        require_symbolic({"total_1": "batch", "x": 1})


@pytest.mark.parametrize("kind", ["conv", "gru", "lstm"])
@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_both_exporters_give_graphs_with_open_batch(kind, exporter, tmp_path, monkeypatch):
    make, shape = KINDS[kind]
    run = write_run(tmp_path / "run", make, shape)
    monkeypatch.setattr("bdistil.export.EXPORTERS", {exporter: EXPORTERS[exporter]})
    manifest = export_run(run, tmp_path / "out")
    assert manifest["exporter"] == exporter
    for stage in manifest["stages"]:
        session = onnxruntime.InferenceSession(str(tmp_path / "out" / stage["file"]))
        assert all(isinstance(tensor.shape[0], str) for tensor in session.get_inputs())


def test_torch_files_are_equal_too(tmp_path):
    run = write_run(tmp_path / "run", *KINDS["lstm"])
    manifest = export_run(run, tmp_path / "out", ExportOptions(format="torch"))
    assert max(manifest["parity"]["differences"]) <= 1e-4
    x = torch.randn(4, 7, 3)
    first = torch.export.load(tmp_path / "out" / "stage_01.pt2").module()(x)[0]
    stage = next(ProgressiveEnsemble.load(run.root).stages(x))
    torch.testing.assert_close(first, stage.total)
    with pytest.raises(ExportError, match="format onnx, got 'torch'"):
        ExportedEnsemble.load(tmp_path / "out")
