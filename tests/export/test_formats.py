"""One ExecuTorch program with a method a stage."""

from importlib.util import find_spec

import pytest
import torch
from helpers.export_runs import KINDS, MACS, write_run

from bdistil import ProgressiveEnsemble, UserError
from bdistil.cli.app import main
from bdistil.errors import RunError
from bdistil.export.run import ExportOptions, export_run
from bdistil.runner import ExportedEnsemble, ExportError

needed = pytest.mark.skipif(
    find_spec("executorch") is None, reason="needs ExecuTorch: pip install 'bdistil[executorch]'"
)
# Of torch, ExecuTorch and what it imports, to themselves.
theirs = pytest.mark.filterwarnings("ignore")


@needed
@theirs
@pytest.mark.parametrize("kind", ["conv", "mlp", "plain", "lstm", "gru"])
def test_a_method_a_stage_gives_the_numbers_of_pytorch(kind, tmp_path):
    from executorch.runtime import Runtime

    torch.manual_seed(6)
    make, shape = KINDS[kind]
    run = write_run(tmp_path / "run", make, shape)
    manifest = export_run(run, tmp_path / "out", ExportOptions(format="executorch"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ensemble.pte", "manifest.json"]
    assert manifest["parity"] | {"differences": ()} == {
        "samples": 32, "source": "random numbers, as the run names no data", "batches": (1,), "differences": (),
    }  # fmt: skip
    assert max(manifest["parity"]["differences"]) <= 1e-4
    program = Runtime.get().load_program(str(tmp_path / "out" / "ensemble.pte"))
    assert program.method_names == {stage["method"] for stage in manifest["stages"]}
    ensemble, x = ProgressiveEnsemble.load(run.root), torch.randn(1, *shape)
    values = {"x": x}
    for stage, wanted, macs in zip(manifest["stages"], ensemble.stages(x), MACS, strict=True):
        assert stage["macs"] == macs
        assert [tensor["shape"][0] for tensor in stage["inputs"] + stage["outputs"]] == [1] * (
            len(stage["inputs"]) + len(stage["outputs"])
        )
        given = program.load_method(stage["method"]).execute([values[tensor["name"]] for tensor in stage["inputs"]])
        values |= {tensor["name"]: value.clone() for tensor, value in zip(stage["outputs"], given, strict=True)}
        logits = values[stage["outputs"][0]["name"]] * stage["factor"]
        torch.testing.assert_close(logits, wanted.logits, rtol=0, atol=1e-4)
    with pytest.raises(ExportError, match="format onnx, got 'executorch'"):
        ExportedEnsemble.load(tmp_path / "out")


@needed
@theirs
def test_a_program_of_other_numbers_is_refused(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", *KINDS["mlp"])
    monkeypatch.setattr("bdistil.export.parity.TOLERANCE", -1.0)
    with pytest.raises(RunError, match="Stage 1 as exported differs"):
        export_run(run, tmp_path / "out", ExportOptions(format="executorch"))
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", *KINDS["mlp"])
    monkeypatch.setattr("bdistil.export.run.installed_versions", lambda names: {})
    given = ["export", "--run_dir", str(run.root), "--output", str(tmp_path / "out"), "--format"]
    assert main([*given, "executorch"]) == 2
    assert "`executorch`, which is not installed. pip install 'bdistil[executorch]'" in capsys.readouterr().err
    assert main([*given, "onnx"]) == 2
    assert "pip install 'bdistil[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"fuse": "exits"}, {"quantise": "static"}])
def test_options_of_onnx_are_refused(option):
    with pytest.raises(UserError, match="is for --format onnx, got --format executorch"):
        ExportOptions(format="executorch", **option)
