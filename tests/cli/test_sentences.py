"""The commands on a recipe whose batches are mappings of lengths that vary; its teacher answers by a mapping."""

import csv
import json

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file
from torch import rand

from bdistil.cli.app import main
from bdistil.storage.run_directory import RunDirectory

RECIPE = {
    "seed_everything": 0,
    "model": {
        "teacher": {"network": {"class_path": "helpers.sentences.Classifier"}, "epochs": 12, "lr": 0.02},
        "student": {"class_path": "helpers.sentences.WordStudent"},
        "boosting": {"rounds": 2, "labels": "target", "accept": "margin", "margin_share": 0.0},
    },
    "data": {"class_path": "helpers.sentences.Sentences"},
    "tracking": {"mode": "disabled"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
}


def fit(folder, *options, recipe=RECIPE):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return main(["fit", "--config", str(folder / "recipe.yaml"), "--run_dir", str(folder / "run"), *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    assert fit(folder) == 0
    return folder / "run"


def test_a_teacher_is_trained_and_exits_are_fitted(run):
    figures = RunDirectory(run)
    assert figures.committed() == 2
    assert figures.rows()[0]["val_accuracy"] > 0.5  # of three classes
    assert figures.read("anytime")["exits"]["rule"] == "max_prob"
    assert figures.read("anytime")["times"]


def test_evaluate_calibrate_profile_and_export(run, tmp_path, capsys):
    assert main(["evaluate", "--run_dir", str(run), "--budget.confidence", "0.6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 60
    assert main(["calibrate", "--run_dir", str(run), "--max_loss", "2"]) == 0
    assert main(["profile", "--run_dir", str(run)]) == 0
    assert main(["export", "--run_dir", str(run), "--output", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["inputs"]] == ["x_ids", "x_mask"]


def test_several_labels(tmp_path, capsys):
    recipe = {**RECIPE, "data": {"class_path": "helpers.sentences.Tagged"}}
    assert fit(tmp_path, "--model.boosting.task", "multilabel", recipe=recipe) == 0
    run = RunDirectory(tmp_path / "run")
    assert run.task == "multilabel"
    assert run.rows()[0]["val_accuracy"] > 0.6
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", str(run.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["mean_average_precision"] == pytest.approx(run.rows()[-1]["test_accuracy"], abs=1e-5)
    assert main(["report", "--run_dir", str(run.root)]) == 0
    assert "mean average precision" in run.report.read_text(encoding="utf-8").lower()
    assert main(["export", "--run_dir", str(run.root), "--output", str(tmp_path / "out")]) == 0


def test_an_untrained_teacher_needs_labels(tmp_path, capsys):
    recipe = {**RECIPE, "data": {"class_path": "helpers.sentences.Unlabelled"}}
    assert fit(tmp_path, "--model.boosting.labels", "null", recipe=recipe) == 2
    assert "so the recipe cannot train its teacher" in capsys.readouterr().err


def test_a_table_of_logits_in_a_recipe(tmp_path):
    save_file({"train": rand(200, 3), "val": rand(80, 3)}, tmp_path / "logits.safetensors")
    np.save(tmp_path / "val.npy", rand(80, 3).numpy())
    for table in ({"train": "logits.safetensors"}, {"train": "logits.safetensors", "val": "val.npy"}):
        files = {name: str(tmp_path / path) for name, path in table.items()}
        network = {"class_path": "bdistil.OfflineTeacher", "init_args": files}
        recipe = {**RECIPE, "model": {**RECIPE["model"], "teacher": {"network": network}}}
        folder = tmp_path / str(len(table))
        assert fit(folder, recipe=recipe) == 0
        with open(folder / "run" / "curve.csv", newline="") as file:
            teacher, *stages = csv.DictReader(file)
        assert (teacher["macs"], teacher["test_accuracy"], len(stages)) == ("0", "", 2)
