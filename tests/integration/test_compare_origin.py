"""A comparison has one split, one data set and one teacher, and is bound to a command once a training has begun."""

import json

import numpy as np
import pytest
import torch

from bdistil.cli.app import main
from bdistil.cli.cells import CellCLI
from bdistil.cli.fit import run_fit
from bdistil.cli.guard import guarded
from bdistil.comparison.running import CellRunner
from bdistil.errors import RunError
from bdistil.models import MLP
from bdistil.storage.weights import save_weights

RECIPE = """
model:
  teacher:
    network: {{class_path: bdistil.models.MLP, init_args: {{features: 8, hidden: [16], outputs: {outputs}}}}}
    {teacher}
  student: {{class_path: bdistil.models.MLPStudent, init_args: {{features: 8, hidden: [4], outputs: {outputs}}}}}
  boosting: {{rounds: 1, lr: 0.03}}
data: {data}
tracking: {{mode: disabled}}
trainer: {{max_epochs: 1, accelerator: cpu, devices: 1, enable_progress_bar: false}}
"""
SPLIT = "than in another training of this comparison. A comparison has one teacher"


def write_recipe(folder, data, outputs, teacher="epochs: 1"):
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(data=data, outputs=outputs, teacher=teacher))
    return file


def write_samples(folder, flip=False, more=0):
    x = np.random.default_rng(0).normal(size=(200 + more, 8)).astype(np.float32)
    np.savez(folder / "samples.npz", x=x, y=(x[:, 0] > 0) ^ flip)


def write_teacher(folder, seed):
    torch.manual_seed(seed)
    save_weights(MLP(8, [16], 2), folder / "teacher.safetensors")


def start(recipe, output, *options, seeds=1):
    own = ["--config", str(recipe), "--output", str(output), "--methods", "bdistil", "--seeds", str(seeds)]
    return main(["compare", *own, *options])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A comparison of arrays, whose teacher is a file."""
    folder = tmp_path_factory.mktemp("arrays")
    write_samples(folder)
    write_teacher(folder, 0)
    data = f"{{class_path: bdistil.data.Arrays, init_args: {{file: {folder / 'samples.npz'}}}}}"
    recipe = write_recipe(folder, data, 2, f"checkpoint: {folder / 'teacher.safetensors'}")
    assert start(recipe, folder / "out") == 0
    return folder


def train_nothing(monkeypatch):
    def run(self, chains):
        raise RunError("would be trained")

    monkeypatch.setattr(CellRunner, "run", run)


@pytest.fixture
def nothing_trained(monkeypatch):
    train_nothing(monkeypatch)


@pytest.mark.parametrize("change", [{"flip": True}, {"more": 100}])
def test_other_samples_are_refused_in_the_same_folder(done, capsys, change):
    write_samples(done, **change)
    assert start(done / "recipe.yaml", done / "out", seeds=2) == 2
    assert "at the first start of this comparison" in capsys.readouterr().err
    write_samples(done)


def test_another_teacher_is_refused_in_the_same_folder(done, capsys):
    write_teacher(done, 1)
    assert start(done / "recipe.yaml", done / "out", seeds=2) == 2
    assert "Expected `model.teacher` to be the teacher of the comparison in" in capsys.readouterr().err
    write_teacher(done, 0)


def test_the_same_samples_and_teacher_go_on(done, capsys, nothing_trained):
    assert start(done / "recipe.yaml", done / "out", seeds=2) == 1
    assert "would be trained" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["BySeed", "SampledBySeed"])
def test_a_split_by_the_seed_of_the_run_is_refused_before_anything_is_trained(tmp_path, capsys, data):
    recipe = write_recipe(tmp_path, f"helpers.run_data.{data}", 4)
    assert start(recipe, tmp_path / "out", seeds=2) == 2
    assert SPLIT in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cell_with_other_parts_than_its_comparison_is_refused_before_training(tmp_path, capsys, nothing_trained):
    recipe, runs = write_recipe(tmp_path, "helpers.run_data.BySeed", 4), tmp_path / "out" / "runs"
    assert start(recipe, tmp_path / "out") == 1
    for seed, status in ((0, 0), (1, 2)):
        options = ["--config", str(recipe), "--run_dir", str(runs / f"bdistil-seed{seed}"), "--seed_everything", seed]
        assert guarded(lambda given=options: run_fit([*map(str, given)], CellCLI)) == status
    assert SPLIT in capsys.readouterr().err
    assert not (runs / "bdistil-seed1").exists()


def test_a_command_may_be_corrected_until_a_training_has_begun(done, capsys, tmp_path, monkeypatch):
    """The first command asks for students of three outputs beside a teacher of two."""
    output = tmp_path / "out"
    assert start(done / "recipe.yaml", output, "--model.student.outputs", "3") == 1
    assert "The teacher gives L=2 outputs, the student L=3" in capsys.readouterr().err
    train_nothing(monkeypatch)
    assert start(done / "recipe.yaml", output) == 1
    assert "would be trained" in capsys.readouterr().err
    assert json.loads((output / "options.json").read_text()) == []
    assert start(done / "recipe.yaml", done / "out", "--trainer.max_epochs", "2") == 2
    assert "with other options (none)" in capsys.readouterr().err


def test_other_test_labels_are_refused_in_the_same_folder(tmp_path, capsys, nothing_trained, monkeypatch):
    """The label that was changed is none of those whose digests are kept."""
    write_teacher(tmp_path, 0)
    data = f"{{class_path: bdistil.data.Arrays, init_args: {{file: {tmp_path / 'samples.npz'}}}}}"
    recipe = write_recipe(tmp_path, data, 2, f"checkpoint: {tmp_path / 'teacher.safetensors'}")
    x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    arrays = {f"{name}_{part}": values for part in ("train", "test") for name, values in (("x", x), ("y", x[:, 0] > 0))}
    np.savez(tmp_path / "samples.npz", **arrays)
    assert start(recipe, tmp_path / "out") == 1, capsys.readouterr().err
    (tmp_path / "out/runs/bdistil-seed0").mkdir(parents=True)
    (tmp_path / "out/runs/bdistil-seed0/config.yaml").write_text("")
    kept = json.loads((tmp_path / "out/origin.json").read_text())["samples"]["test_dataloader"]
    other = next(row for row in range(200) if str(row) not in kept)
    arrays["y_test"] = arrays["y_test"].copy()
    arrays["y_test"][other] ^= True
    np.savez(tmp_path / "samples.npz", **arrays)
    capsys.readouterr()
    assert start(recipe, tmp_path / "out") == 2
    assert "Expected `test_dataloader()` to give the labels that it gave at the first start" in capsys.readouterr().err


def test_two_starts_do_not_share_a_folder(done, tmp_path, capsys, monkeypatch):
    seen = []

    def run(self, chains):  # while the first one trains
        seen.append(start(done / "recipe.yaml", tmp_path / "out", "--trainer.max_epochs", "2"))
        raise RunError("would be trained")

    monkeypatch.setattr(CellRunner, "run", run)
    assert start(done / "recipe.yaml", tmp_path / "out") == 1
    assert seen == [2]
    assert "`output` " in (told := capsys.readouterr().err)
    assert "is in use by process" in told
    assert json.loads((tmp_path / "out/options.json").read_text()) == []
