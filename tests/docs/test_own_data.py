"""Your own files, as docs/data.md says: a folder of images or a .npz file and a YAML file, from fit to the runner."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdistil.cli.app import main
from bdistil.storage.run_directory import RunDirectory

GUIDE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SHORT = ["--trainer.max_epochs", "1", "--model.teacher.epochs", "1", "--model.boosting.rounds", "2"]
QUIET = ["--trainer.accelerator", "cpu", "--tracking.mode", "disabled"]


def write_photos():
    """Images of three classes and several sizes, of which one is turned by its EXIF orientation and one has 16 bits."""
    random = np.random.default_rng(0)
    for number, name in enumerate(("ant", "bee", "cat")):
        folder = Path("photos", name)
        folder.mkdir(parents=True)
        for index in range(16):
            pixels = random.integers(0, 60, (40, 36 + index, 3)).astype(np.uint8)
            pixels[..., number] += 120
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray(pixels).save(folder / f"{index}.jpg", **({"exif": exif} if index == 3 else {}))
    Image.fromarray(np.full((40, 50), 40_000, np.uint16)).save(Path("photos", "cat", "grey.png"))


def write_arrays():
    x = np.random.default_rng(0).normal(5, 3, (200, 8))
    np.savez("mine.npz", x=x, y=np.digitize(x[:, 0] + x[:, 1], [8, 12]))


@pytest.mark.parametrize(
    ("kind", "prepare", "samples", "shape"),
    [("ImageFolder", write_photos, 7, [3, 32, 32]), ("Arrays", write_arrays, 30, [8])],
)
def test_a_recipe_for_ones_own_files_runs_from_fit_to_the_runner(
    tmp_path, monkeypatch, capsys, kind, prepare, samples, shape
):
    monkeypatch.chdir(tmp_path)
    prepare()
    (recipe,) = (block for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.S) if f"bdistil.data.{kind}" in block)
    Path("mine.yaml").write_text(recipe, encoding="utf-8")
    if kind == "ImageFolder":
        wrong = ["--model.teacher.network.outputs", "4", "--model.student.outputs", "4"]
        assert main(["fit", "--config", "mine.yaml", "--run_dir", "run", *wrong, *SHORT, *QUIET]) == 2
        assert "3 outputs, one for each class of ImageFolder (ant, bee, cat), got 4" in capsys.readouterr().err
        assert not RunDirectory("run").config.exists()
    assert main(["fit", "--config", "mine.yaml", "--run_dir", "run", *SHORT, *QUIET]) == 0
    run = RunDirectory("run")
    assert run.committed() == 2
    assert all(float(row["test_accuracy"]) > 0 for row in run.read_curve())
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", "run", "--part", "val", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] == samples
    assert figures["accuracy"] == pytest.approx(float(run.read_curve()[-1]["val_accuracy"]), abs=1e-6)
    assert main(["export", "--run_dir", "run", "--output", "exported", "--normalisation", "inside"]) == 0
    manifest = json.loads(Path("exported", "manifest.json").read_text(encoding="utf-8"))
    assert manifest["inputs"][0]["shape"] == shape
    assert manifest["labels"] == (["ant", "bee", "cat"] if kind == "ImageFolder" else None)
    np.save("x.npy", np.ones((3, *shape), np.float32))
    runner = [sys.executable, str(Path("exported", "runner")), "--input", "x.npy"]
    done = subprocess.run(runner, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
