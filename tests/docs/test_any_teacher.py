"""docs/any-teacher.md is true: each block runs, and its own parts are short."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import yaml
from helpers.teachers import scripted
from jsonargparse import ArgumentParser
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from bdistil import ProgressiveEnsemble
from bdistil.storage.run_directory import RunDirectory

GUIDE = (Path(__file__).parents[2] / "docs" / "any-teacher.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
QUIET = 'max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False'
OUTPUTS, PIXELS = 5, 3 * 32 * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the files are that the guide takes for the reader's own."""
    folder = tmp_path_factory.mktemp("guide")
    save_file(timm.create_model("test_resnet", num_classes=OUTPUTS).state_dict(), folder / "teacher.safetensors")
    net = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, OUTPUTS))
    scripted(net, folder / "teacher.ts", example=torch.randn(2, 3, 32, 32))
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(PIXELS, OUTPUTS)).astype("f4"), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUTPUTS])
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    graph = helper.make_graph(nodes, "teacher", [x], [y], [weights])
    for name, count in (("train", 200), ("val", 100)):
        np.save(folder / f"logits_{name}.npy", np.random.default_rng(1).normal(size=(count, OUTPUTS)).astype("f4"))
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "teacher.onnx"
    )
    return folder


def test_its_blocks_are_at_most_20_lines():
    assert len(PYTHON) > 8
    assert max(len(block.strip().splitlines()) for block in PYTHON) <= 20


@pytest.mark.filterwarnings(
    "ignore:The teacher (expects normalised|was trained on images|has R²)"
)  # random weights and images
def test_its_python_runs(folder, monkeypatch, capsys):
    """Word for word, but for the number of epochs and rounds."""
    monkeypatch.chdir(folder)
    code = "\n".join(PYTHON)
    short = code.replace("max_epochs=20", QUIET).replace("rounds=6", "rounds=1")
    assert short.count(QUIET) == 1
    exec(compile(short, "any-teacher.md", "exec"), {"__name__": "guide"})
    made = sorted(path.name for path in (folder / "runs").iterdir())
    assert made == ["adapted", "module", "offline", "onnx", "script", "several", "table", "timm"]
    for name in made:
        run = RunDirectory(folder / "runs" / name)
        assert run.committed() == 1, name
        assert (run.read("teacher")["macs"] > 0) == (name != "offline"), name
    assert ProgressiveEnsemble.load(folder / "runs" / "table").task == "regression"
    assert "tensor(" in capsys.readouterr().out


def test_its_recipe_is_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
    parser = ArgumentParser()
    parser.add_argument("--network", type=nn.Module)
    network = parser.instantiate(parser.parse_object({"network": yaml.safe_load(block)})).network
    assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, OUTPUTS)
    assert not network.trained  # one of the two is for the recipe to train


def test_its_figures_of_the_recipe_are_there():
    assert (Path(__file__).parents[2] / "recipes" / "diabetes.yaml").is_file()
