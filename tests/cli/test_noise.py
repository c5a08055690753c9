"""Wrong labels, mixing and gradient noise as a user has them: files of the guides on the command line, and loggers."""

import json
import re
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.gaussians import Gaussians, mlp, trained_teacher
from helpers.toys import make_trainer
from helpers.wandb_offline import finished_runs
from lightning.pytorch.loggers import TensorBoardLogger

from bdistil.callbacks import GradientNoise, LossMixing
from bdistil.cli.app import main
from bdistil.data.label_noise import flip_labels
from bdistil.distillation import MixingSettings
from bdistil.distillation.module import Distillation

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = {"label_weight", "teacher_weight", "clean", "flipped", "auc"}
STEPS = 7  # of an epoch, at 500 of 3,500 digits a batch


def block(guide, language, having):
    """A block of code of a guide."""
    found = re.findall(rf"```{language}\n(.*?)```", (DOCS / guide).read_text(), re.DOTALL)
    (one,) = [text for text in found if having in text]
    return one


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of the guide's file."""
    folder = tmp_path_factory.mktemp("noisy")
    (folder / "noisy.yaml").write_text(block("noisy-labels.md", "yaml", "LossMixing"))
    words = (
        "fit --config digits --data.init_args.data.init_args.batch_size 500 --model.boosting.rounds 2"
        " --model.boosting.accept margin --model.boosting.margin_share 0 --model.teacher.epochs 1"
        " --model.teacher.network.channels [4,8] --trainer.max_epochs 4 --trainer.accelerator cpu"
        " --tracking.mode offline"
    )
    given = [*words.split(), "--run_dir", str(folder / "run")]
    given[3:3] = ["--config", str(folder / "noisy.yaml")]
    assert main(given) == 0
    return folder / "run"


def test_the_guides_file_mixes_and_measures_in_every_round(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"] | {"data": None} == {
        "data": None, "rate": 0.4, "kind": "symmetric", "seed": 0, "classes": None, "to": None,
        "ignore_index": None,
    }  # fmt: skip
    names = {path.name for path in (run / "mixing").iterdir()}
    assert names == {"mixing.000.f32", "mixing.001.f32", "mixing.png"}
    share = np.fromfile(run / "mixing/mixing.001.f32", "<f4")
    assert share.shape == (3500,)
    assert share.std() > 0.1
    looks = [json.loads((run / f"noise/noise.{number:03d}.json").read_text()) for number in (0, 1)]
    assert [[row["epoch"] for row in rows] for rows in looks] == [[0, 4], [0, 4]]
    assert all(row["nsr_game"] > 0 for rows in looks for row in rows)


def test_w_and_b_has_the_histograms_and_figures_of_both_rounds(run):
    (tracked,) = finished_runs(run)
    rows = [row for row in tracked.history if "mixing/auc" in row]
    # The last of 4 epochs of each round is the fourth; steps go on over the rounds.
    assert [row["trainer/global_step"] for row in rows] == [3 * STEPS, 7 * STEPS]
    for row in rows:
        assert {f"mixing/{name}" for name in FIGURES} <= row.keys()
        assert row["mixing/histogram/_type"] == "histogram"
        assert sum(row["mixing/histogram/values"]) == 3500
    last = 1 - np.fromfile(run / "mixing/mixing.001.f32", "<f4")
    counts, edges = np.histogram(last, 20)
    assert rows[1]["mixing/histogram/values"] == counts.tolist()
    assert rows[1]["mixing/histogram/bins"] == pytest.approx(edges.tolist())
    assert rows[1]["mixing/label_weight"] == pytest.approx(last.mean(), abs=1e-6)
    labels = torch.arange(10).repeat_interleave(350)  # which are flipped depends on their number alone
    flipped = flip_labels(labels, 0.4, classes=10, seed=0)[1].numpy()
    assert rows[1]["mixing/flipped"] == pytest.approx(last[flipped].mean(), abs=1e-6)
    assert rows[1]["mixing/clean"] == pytest.approx(last[~flipped].mean(), abs=1e-6)
    noise = [row for row in tracked.history if "noise/nsr_game" in row]
    assert [row["trainer/global_step"] for row in noise] == [0, 4 * STEPS, 4 * STEPS, 8 * STEPS]


def test_auto_follows_on_lightnings_command_line(tmp_path, monkeypatch):
    script, config = tmp_path / "distil.py", tmp_path / "auto.yaml"
    script.write_text(block("gradient-noise.md", "python", "LightningCLI"))
    config.write_text(block("gradient-noise.md", "yaml", "distillation_weight: auto"))
    monkeypatch.chdir(tmp_path)
    words = (
        f"fit --config {config} --model.teacher.init_args.channels [4,8] --model.student.init_args.channels [4,8]"
        " --data.init_args.batch_size 500 --trainer.max_epochs 1 --trainer.accelerator cpu --trainer.logger false"
        " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
        " --trainer.enable_checkpointing false --seed_everything 0"
    )
    monkeypatch.setattr(sys, "argv", [str(script), *words.split()])
    runpy.run_path(str(script), run_name="__main__")
    looks = json.loads((tmp_path / "noise/noise.json").read_text())
    assert [row["epoch"] for row in looks] == [0, 1]
    assert all(0.1 <= row["suggested_weight"] <= 0.9 for row in looks)
    assert all("the teacher explains" in row["reason"] for row in looks)


def events(folder):
    """Records of TensorBoard's files: length, checksum, an `Event`, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.rglob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def test_tensorboard_has_the_histograms_and_figures(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard is tested with tensorboardX, of the extra `dev`")
    data = Gaussians(rate=0.4, train=600)
    mixing = LossMixing(MixingSettings(warmup=1, every=1), folder=tmp_path / "mixing")
    noise, logger = GradientNoise(every=1, folder=tmp_path / "noise"), TensorBoardLogger(tmp_path / "board")
    trainer = make_trainer(mixing, noise, logger=logger, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(Distillation(mlp(8), trained_teacher(data, epochs=2)), datamodule=data)
    logger.finalize("success")
    found = {(value.tag, event.step): value for event in events(tmp_path / "board") for value in event.summary.value}
    histogram = found["mixing/histogram", 5].histo
    weights = mixing.weights()[:, 0]
    assert (histogram.num, histogram.sum) == (600, pytest.approx(float(weights.sum()), rel=1e-5))
    assert histogram.max == pytest.approx(float(weights.max()))
    for name in FIGURES:
        assert found[f"mixing/{name}", 5].simple_value == pytest.approx(mixing.history[-1][name], rel=1e-5)
    for step, row in zip((0, 5, 10), noise.history, strict=True):
        for name in ("explained", "suggested_weight", "pull_curvature"):
            assert found[f"noise/{name}", step].simple_value == pytest.approx(row[name], rel=1e-5)
