"""Every recipe that is shipped: what its header says, that it resolves, and one batch of it through a whole run."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers.paper_files import (
    write_cifar10,
    write_cifar100,
    write_dsa,
    write_har,
    write_imagenet,
    write_speech,
    write_tiny_imagenet,
)

from bdistil import ProgressiveEnsemble
from bdistil.cli.app import main
from bdistil.cli.recipe_files import recipes, summary
from bdistil.storage.run_directory import RunDirectory

FOLDER = Path(__file__).parents[2] / "recipes"
PAPERS = {
    "cifar10-resnet56", "cifar10-tiny", "cifar100-wrn40-2", "cifar100-resnet32x4", "tiny-imagenet-resnet50",
    "imagenet-resnet50", "google13-lstm", "dsa19-lstm", "har6-lstm",
}  # fmt: skip

ONE_BATCH = [
    "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
    "--trainer.accelerator", "cpu", "--model.teacher.epochs", "1", "--model.teacher.warmup", "0",
    "--model.boosting.rounds", "1", "--tracking.mode", "disabled",
]  # fmt: skip
IMAGES = ["--data.partial", "true", "--data.batch_size", "4", "--data.num_workers", "0"]
# On a CPU a batch of ResNet-50 takes more than a few seconds: the smallest network of timm stands for it.
SMALL_TIMM = ["--model.teacher.network.name", "test_resnet", "--model.student.name", "test_resnet", "--data.size", "32"]
ON_FIXTURES = {
    "cifar10-resnet56": (partial(write_cifar10, each=1), [*IMAGES, "--data.validation", "10"]),
    "cifar10-tiny": (partial(write_cifar10, each=1), [*IMAGES, "--data.validation", "10"]),
    "cifar100-wrn40-2": (write_cifar100, [*IMAGES, "--data.validation", "100"]),
    "cifar100-resnet32x4": (write_cifar100, [*IMAGES, "--data.validation", "100"]),
    "tiny-imagenet-resnet50": (write_tiny_imagenet, [*IMAGES, "--data.validation", "2", *SMALL_TIMM]),
    "imagenet-resnet50": (write_imagenet, [*IMAGES, "--data.validation", "2", *SMALL_TIMM]),
    "google13-lstm": (write_speech, ["--data.partial", "true", "--data.batch_size", "8"]),
    "dsa19-lstm": (write_dsa, ["--data.partial", "true", "--data.batch_size", "8"]),
    "har6-lstm": (write_har, ["--data.partial", "true", "--data.batch_size", "8"]),
}


def test_every_yaml_is_a_recipe_of_its_name():
    files = sorted(FOLDER.rglob("*.yaml"))
    assert len(files) >= len(PAPERS) + 1
    assert sorted(recipes()) == sorted(file.stem for file in files)
    assert {*PAPERS, "digits"} <= set(recipes())
    assert set(ON_FIXTURES) == PAPERS


def test_they_are_listed_with_what_they_show(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, path in recipes().items():
        assert sum(line.split()[:1] == [name] and line.endswith(summary(path)) for line in lines) == 1


@pytest.mark.parametrize("name", recipes())
def test_its_header_says_how_it_is_launched_and_what_to_expect(name):
    header = recipes()[name].read_text(encoding="utf-8").partition("seed_everything")[0]
    for said in (f"bdistil fit --config {name} --run_dir runs/{name}", "# Hardware: ", "# Expect: ", "# Data: "):
        assert said in header
    assert 20 < len(summary(recipes()[name])) < 120


@pytest.mark.parametrize("name", recipes())
def test_it_resolves(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", name, "--print_config"])
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run_dir"] == f"runs/{name}"
    assert shown["model"]["boosting"]["eta"] == 0.5
    if name in PAPERS and "lstm" not in name:  # a random x has no cached logits
        boosting = shown["model"]["boosting"]
        assert shown["data"]["init_args"]["augment"]
        assert boosting["state"] == "recompute" or boosting["views"]


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_data_that_are_not_there_are_one_message(name, tmp_path, capsys):
    options = ["--data.root", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]
    assert main(["fit", "--config", name, "--tracking.mode", "disabled", *options]) == 2
    message = capsys.readouterr().err
    assert re.search(r"bdistil: error: .* was not found in /.*/data/.*: expected .* get it from http", message)
    assert "Traceback" not in message
    assert not list(tmp_path.glob("data/*"))


# Fixtures of 100 classes and large teachers: 5 to 20 s each. What they are made of is in the others as well.
ELSEWHERE = {"mekd-digits"}  # has no teacher of its own: test_mekd_cli.py
SLOW = {"cifar100-wrn40-2", "cifar100-resnet32x4", "tiny-imagenet-resnet50"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted({*recipes()} - ELSEWHERE)],
)
def test_one_batch_of_it(name, tmp_path):
    write, options = ON_FIXTURES.get(name, (None, []))
    if write is not None:
        write(tmp_path)
        options = [*options, "--data.root", str(tmp_path)]
    assert main(["fit", "--config", name, "--run_dir", str(tmp_path / "run"), *ONE_BATCH, *options]) == 0
    run = RunDirectory(tmp_path / "run")
    assert run.committed() == 1
    assert run.teacher.is_file()
    data = yaml.safe_load(run.config.read_text())["data"]["init_args"]
    if name == "dsa19-lstm":
        assert (data["train"], data["validation"], data["test"]) == ([1, 2, 3, 4], [5, 6], [7, 8])
    assert math.isfinite(float(run.read_curve()[1]["test_accuracy"]))  # R² of a regression may be below 0
    assert len(ProgressiveEnsemble.load(run.root)) == 1
