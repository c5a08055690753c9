"""A run beside other callbacks and loggers of its Trainers."""

import json
import os

import pytest
import torch
import wandb
from helpers.toys import (
    BATCH,
    EPOCHS,
    ROUNDS,
    TRAIN,
    Hook,
    Killed,
    boost,
    curve,
    digests,
    logged,
    settings_for,
)
from helpers.wandb_offline import finished_runs
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from bdistil.reporting.tracking import Tracking, make_logger


def test_callbacks_of_the_user_are_fresh_in_each_round(tmp_path):
    made = []

    def theirs():
        made.append((EarlyStopping("val_rms", patience=0, min_delta=1e6), LearningRateMonitor(),
                     ModelCheckpoint(tmp_path / f"own/{len(made)}", monitor="val_rms", save_last=True)))  # fmt: skip
        return made[-1]

    logger = CSVLogger(tmp_path / "log", name="", version="")
    controller = boost(tmp_path / "run", callbacks=theirs, trainer={"epochs": 5, "logger": logger})
    assert len(made) == ROUNDS
    assert [controller.run.record(number)["epochs"] for number in range(ROUNDS)] == [2] * ROUNDS
    for number, (stopping, _, checkpoint) in enumerate(made):
        assert (stopping.stopped_epoch, stopping.wait_count) == (1, 1)
        assert checkpoint.best_model_path.startswith(str(tmp_path / f"own/{number}"))
        assert (tmp_path / f"own/{number}/last.ckpt").exists()
        state = torch.load(checkpoint.last_model_path, weights_only=True)
        assert all(name.startswith("student.") for name in state["state_dict"])
    rates = [float(row["lr-AdamW"]) for row in logged(tmp_path / "log") if row["lr-AdamW"]]
    assert rates == rates[:2] * ROUNDS  # the schedule starts anew
    assert rates[0] == 0.01 > rates[1]


def test_the_step_of_a_shared_logger_is_monotone(tmp_path):
    logger = CSVLogger(tmp_path / "log", name="", version="")
    boost(tmp_path / "run", trainer={"logger": logger, "log_every_n_steps": 1})
    rows = logged(tmp_path / "log")
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    a_round = TRAIN // BATCH * EPOCHS
    assert [int(row["step"]) for row in rows if row["round"]] == [a_round * number for number in (1, 2, 3)]
    last_of_epoch = [int(row["step"]) for row in rows if row["val_accuracy"]]
    assert last_of_epoch == [a_round // 2 * epoch - 1 for epoch in range(1, 7)]


def test_the_step_goes_on_after_a_restart(tmp_path):
    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 1):
            raise Killed

    def note():
        return CSVLogger(tmp_path / "log", name="", version=None)

    with pytest.raises(Killed):
        boost(tmp_path / "run", callbacks=lambda: [Hook(on_train_epoch_start=stop)], trainer={"logger": note()})
    boost(tmp_path / "run", trainer={"logger": note()})
    rows = logged(tmp_path / "log/version_1")
    assert [(float(row["round"]), int(row["step"])) for row in rows if row["round"]] == [(1, 12), (2, 24), (3, 36)]
    assert [int(row["step"]) for row in rows if row["val_accuracy"]] == [23, 29, 35]


@pytest.fixture
def wandb_alone(tmp_path, monkeypatch):
    """No settings of W&B but those of the test."""
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def test_all_rounds_are_one_run_of_wandb(wandb_alone, tmp_path):
    run_dir, config = tmp_path / "run", {"model": {"boosting": {"rounds": ROUNDS}}, "seed": 0}
    about = {"project": "mine", "group": "toys", "name": "toys-0", "tags": ["toy", "mlp"]}
    logger = make_logger(Tracking(mode="offline", **about), run_dir, config)
    boost(run_dir, trainer={"logger": logger}, config=config).tracker.close()
    (seen,) = finished_runs(tmp_path)
    assert seen.exit_code == 0
    assert {key: seen.config[key] for key in config} == config
    assert (seen.run["run_group"], seen.run["tags"], seen.run["name"]) == ("toys", ["toy", "mlp"], "toys-0")

    rows, teacher = [row for row in seen.history if "round" in row], curve(run_dir)[0]
    assert [row["round"] for row in rows] == [1, 2, 3]
    written = [row for row in curve(run_dir) if row["stage"] != "teacher"]
    assert [row["round/macs"] for row in rows] == [float(row["macs"]) for row in written]
    accuracy = [row["round/val_accuracy"] for row in rows]
    assert accuracy == pytest.approx([float(row["val_accuracy"]) for row in written], abs=1e-5)
    steps = [row["trainer/global_step"] for row in seen.history if "trainer/global_step" in row]
    assert steps == sorted(steps)

    students = [artifact for artifact in seen.artifacts if artifact["type"] == "student"]
    assert [artifact["aliases"] for artifact in students] == [{f"round-{n}", "latest"} for n in (1, 2, 3)]
    for number, artifact in enumerate(students):
        assert set(artifact["files"]) == {"round.json", "student.safetensors"}
        assert artifact["metadata"]["macs"] == int(written[number]["macs"])

    (shown,) = [row for row in seen.history if "curve/path" in row]
    table = json.loads(next(tmp_path.rglob("files/" + shown["curve/path"])).read_text())
    assert [row[0] for row in table["data"]] == ["teacher", "1", "2", "3"]
    assert table["data"][0][table["columns"].index("macs")] == float(teacher["macs"])
    assert all(row[table["columns"].index("test_accuracy")] is not None for row in table["data"])
    assert seen.config["_wandb/visualize/accuracy_vs_macs"]["panel_config"]["fieldSettings"]["x"] == "macs"


class Thaw(BaseFinetuning):
    """The body is frozen in the first epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.student.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(pl_module.student.body)


def test_what_a_callback_has_unfrozen_is_trained_after_a_kill(tmp_path):
    """Lightning's own callback freezes it again when a fit goes on, and calls for no epoch that is over."""

    def stop(trainer, module):
        if trainer.current_epoch == 2:
            raise Killed

    options = {"settings": settings_for(1), "trainer": {"epochs": 3}}
    boost(tmp_path / "whole", callbacks=lambda: [Thaw()], **options)
    with pytest.raises(Killed):
        boost(tmp_path / "killed", callbacks=lambda: [Thaw(), Hook(on_train_epoch_start=stop)], **options)
    boost(tmp_path / "killed", callbacks=lambda: [Thaw()], **options)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
