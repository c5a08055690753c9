"""What the export refuses, and the two exporters of torch."""

import onnxruntime
import pytest
import torch
from helpers.export_runs import KINDS, L, mlp_student, write_run
from torch import nn

from bdistil import ProgressiveEnsemble, UserError
from bdistil.errors import RunError
from bdistil.export.graphs import EXPORTERS
from bdistil.export.run import ExportOptions, export_run
from bdistil.models.student import Student
from bdistil.runner import ExportedEnsemble, ExportError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(2)
    return write_run(tmp_path_factory.mktemp("mlp") / "run", mlp_student, (6,))


def test_an_export_is_only_replaced_with_overwrite(run, tmp_path):
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


def test_a_failed_export_leaves_nothing_and_the_older_one(run, tmp_path, monkeypatch):
    export_run(run, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr("bdistil.export.parity.TOLERANCE", -1.0)
    monkeypatch.setattr("bdistil.export.formats.EXPORTERS", {"torchscript": EXPORTERS["torchscript"]})
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
    with pytest.raises(RunError, match=r"(?s)torchscript: stage_01.* \[3, 5\], .*'batch'.*dynamo: .*constant"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_tracing_exporter_lacks_the_newer_one_has(tmp_path):
    """Pooling of 7 places to 2."""
    make = lambda number: Student(nn.Sequential(nn.AdaptiveAvgPool1d(2)), nn.Linear(2, L))  # noqa: E731
    run = write_run(tmp_path / "run", make, (7,))
    manifest = export_run(run, tmp_path / "out")
    assert manifest["exporter"] == "dynamo"
    for stage in manifest["stages"]:
        data = (tmp_path / "out" / stage["file"]).read_bytes()
        assert len(data) < 5000
        assert b".py" not in data  # of the source, by which the exporter tells where nodes are from


class Bytes(nn.Module):
    """Scales bytes to 0 … 1, which random numbers are not."""

    def forward(self, x):
        return x / 255 if x.max() > 10 else x


@pytest.mark.parametrize("decides", [Fickle, Bytes])
def test_a_student_that_decides_from_values_is_refused(decides, tmp_path):
    """Also where all random samples take one branch."""
    make = lambda number: Student(nn.Sequential(decides(), nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, L))  # noqa: E731
    run = write_run(tmp_path / "run", make, (6,))
    with pytest.raises(RunError, match=r"(?s)torchscript: Converting a tensor to a Python .*dynamo: "):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_that_fixes_the_batch_is_refused_as_pt2(tmp_path):
    make = lambda number: Student(nn.Sequential(nn.Linear(6, 4), FixedBatch()), nn.Linear(5, L))  # noqa: E731
    run = write_run(tmp_path / "run", make, (6,))
    with pytest.raises(Exception, match="constant"):
        export_run(run, tmp_path / "out", ExportOptions(format="torch"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["conv", "gru", "lstm"])
@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_both_exporters_give_graphs_with_open_batch(kind, exporter, tmp_path, monkeypatch):
    make, shape = KINDS[kind]
    run = write_run(tmp_path / "run", make, shape)
    monkeypatch.setattr("bdistil.export.formats.EXPORTERS", {exporter: EXPORTERS[exporter]})
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
