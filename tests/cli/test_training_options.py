"""Options of a recipe that decide how students are trained: optimizer, schedule, length, epochs, rounds."""

import json

import numpy as np
import pytest
import yaml
from helpers.toys import digests
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar, Timer, TQDMProgressBar

from bdistil.boosting.checks.trainer import check_trainer
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.settings import BoostingSettings
from bdistil.callbacks import EpochKeeper
from bdistil.cli.app import main
from bdistil.errors import RunError
from bdistil.storage.run_directory import RunDirectory
from bdistil.teachers.training import TeacherTraining

SMALL = [
    "fit", "--config", "digits", "--model.boosting.rounds", "1", "--trainer.max_epochs", "1",
    "--model.teacher.epochs", "1", "--model.teacher.network.channels", "[4,8]", "--trainer.accelerator", "cpu",
    "--tracking.mode", "disabled", "--data.batch_size", "500", "--trainer.limit_train_batches", "4",
    "--model.boosting.accept", "margin", "--model.boosting.margin_share", "0",
]  # fmt: skip
SGD = [
    "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.05", "--model.optimizer.momentum", "0.9",
    "--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size", "2",
    "--model.lr_interval", "step",
]  # fmt: skip


def fit(folder, *options):
    return main([*SMALL, "--run_dir", str(folder), *options])


def test_optimizer_and_schedule_of_a_recipe(tmp_path, capsys):
    folder = tmp_path / "run"
    assert fit(folder, *SGD) == 0
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert model["optimizer"]["class_path"] == "torch.optim.SGD"
    assert model["optimizer"]["init_args"]["momentum"] == 0.9
    assert model["lr_scheduler"]["init_args"]["step_size"] == 2
    assert model["lr_interval"] == "step"
    record = RunDirectory(folder).record(0)
    assert (record["optimizer"]["class"], record["optimizer"]["lr"]) == ("torch.optim.sgd.SGD", 0.05)
    assert record["lr_scheduler"]["rates"][:4] == [0.05, 0.05, 0.005, 0.005]
    before = digests(folder)
    for changed in ([*SGD, "--model.optimizer.momentum", "0.8"], []):
        assert fit(folder, *changed) == 2
        message = capsys.readouterr().err
        assert "another configuration" in message
        assert "model.optimizer" in message
    assert fit(folder, *SGD) == 0
    assert digests(folder) == before


@pytest.mark.slow
def test_a_recipe_goes_on_when_rounds_is_raised(tmp_path):
    assert fit(tmp_path / "run") == 0
    assert fit(tmp_path / "run", "--model.boosting.rounds", "2") == 0
    assert fit(tmp_path / "whole", "--model.boosting.rounds", "2") == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["boosting"]["rounds"] == 2
    assert RunDirectory(tmp_path / "run").read_curve()[2]["test_accuracy"]


def test_a_run_of_an_earlier_version_goes_on(tmp_path, capsys):
    """Its config.yaml lacks options of classes and settings that came later, which have their defaults now."""
    assert fit(tmp_path) == 0
    config, later = tmp_path / "config.yaml", ("refine:", "keep_epoch:", "lr_interval:", "enable_autolog_hparams:")
    lines = config.read_text().splitlines()
    kept = [line for line in lines if not line.strip().startswith(later)]
    assert len(kept) == len(lines) - len(later)
    config.write_text("\n".join(kept))
    assert fit(tmp_path) == 0
    config.write_text("\n".join([*kept, "gone: 1"]))
    assert fit(tmp_path) == 2
    assert "gone: 1 there, '(absent)' now" in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_epoch_of_a_recipe(tmp_path):
    assert fit(tmp_path, "--model.boosting.keep_epoch", "best", "--trainer.max_epochs", "2") == 0
    assert RunDirectory(tmp_path).record(0)["kept_epoch"] in (0, 1)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("trainer.precision", "16-true", "`precision` of the Trainer"),
        ("trainer.precision", "64-true", "`precision` of the Trainer"),
        ("trainer.max_epochs", "0", "`max_epochs` of the Trainer to be at least 1"),
        ("trainer.limit_train_batches", "0", "`limit_train_batches` of the Trainer"),
        ("trainer.callbacks+", "LearningRateFinder", "without LearningRateFinder"),
        ("trainer.callbacks+", "bdistil.callbacks.MetricCurves", "MetricCurves in fits of whole models"),
        ("trainer.overfit_batches", "2", "`overfit_batches` of the Trainer to be 0, got 2"),
        ("trainer.logger", "true", "`trainer.logger` to be false, a logger or a list of loggers, got true"),
    ],
)
def test_the_trainer_is_checked_before_the_teacher_is_trained(tmp_path, capsys, option, value, message):
    assert fit(tmp_path / "run", f"--{option}", value) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_no_round_logs_is_refused_before_the_teacher_is_trained(tmp_path, capsys, kind):
    callback = ["--trainer.callbacks+", kind, "--trainer.callbacks.monitor", "val_acc"]
    assert fit(tmp_path / "run", *callback) == 2
    said = capsys.readouterr().err
    assert f"`monitor` of {kind} to be a metric that a round logs, one of train_loss, val_accuracy" in said
    assert "got 'val_acc'" in said
    assert not (tmp_path / "run").exists()


class Logs(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("mine", 1.0)


def test_a_metric_of_the_users_callback_may_be_monitored(tmp_path):
    stop = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "mine"]
    assert fit(tmp_path / "run", *stop, "--trainer.callbacks+", f"{__name__}.Logs") == 0


@pytest.mark.parametrize("callback", [["ModelCheckpoint", "step"], ["EarlyStopping", "cost/train_macs"]], ids=str)
def test_what_lightning_and_compute_cost_log_may_be_monitored(callback):
    kind, monitor = callback
    made = {"ModelCheckpoint": ModelCheckpoint, "EarlyStopping": EarlyStopping}[kind](monitor=monitor)
    check_trainer(Trainer(callbacks=[made], accelerator="cpu", logger=False), BoostingSettings())


def test_callbacks_that_need_a_logger_do_nothing_without_one(tmp_path):
    assert fit(tmp_path / "run", "--trainer.callbacks+", "LearningRateMonitor") == 0


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_of_the_recipe_is_used(tmp_path, monkeypatch, terminal):
    bars = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(BoostingRound, "on_train_start", lambda module: bars.append(module.trainer.callbacks))
    assert fit(tmp_path / "run", "--trainer.callbacks+", "TQDMProgressBar") == 0
    assert [type(bar) for bar in bars[0] if isinstance(bar, ProgressBar)] == [TQDMProgressBar]


def test_a_run_of_another_configuration_names_its_teacher(tmp_path, capsys):
    assert fit(tmp_path) == 0
    assert fit(tmp_path, "--model.boosting.lr", "0.5") == 2
    assert f"--model.teacher.checkpoint {tmp_path / 'teacher.safetensors'}" in capsys.readouterr().err


def test_nothing_of_a_fast_dev_run_is_kept(tmp_path):
    assert fit(tmp_path / "run", "--trainer.fast_dev_run", "true") == 0
    assert not list(tmp_path.iterdir())


def test_steps_limit_the_students_and_not_the_teacher(tmp_path, capsys):
    """The teacher has epochs of its own; with the 3 steps of a student it would be none."""
    steps = ["--trainer.max_epochs", "null", "--trainer.max_steps", "3"]
    assert fit(tmp_path / "steps", *steps) == 0
    assert RunDirectory(tmp_path / "steps").record(0)["steps"] == 3
    assert fit(tmp_path / "epochs") == 0
    teachers = [(tmp_path / name / "teacher.safetensors").read_bytes() for name in ("steps", "epochs")]
    assert teachers[0] == teachers[1]


def test_time_limits_the_students_and_not_the_teacher(tmp_path, monkeypatch):
    limited = {}

    def note(module):
        limited[type(module).__name__] = any(isinstance(callback, Timer) for callback in module.trainer.callbacks)

    for kind in (TeacherTraining, BoostingRound):
        monkeypatch.setattr(kind, "on_train_start", note)
    assert fit(tmp_path, "--trainer.max_time", "00:01:00:00") == 0
    assert limited == {"TeacherTraining": False, "BoostingRound": True}


def test_checkpoints_may_be_switched_off(tmp_path):
    assert fit(tmp_path, "--trainer.enable_checkpointing", "false") == 0
    assert list(digests(tmp_path)) == ["000"]


RECIPE = """
model:
  teacher:
    network: {class_path: bdistil.models.MLP, init_args: {features: 8, hidden: [16], outputs: 4}}
    epochs: 1
  student: {class_path: bdistil.models.MLPStudent, init_args: {features: 8, hidden: [6], outputs: 4}}
  boosting: {rounds: 2, accept: margin, margin_share: 0.0}
data: helpers.toys.ClosedToys
tracking: {mode: disabled}
trainer: {max_epochs: 1, accelerator: cpu, devices: 1, enable_progress_bar: false}
"""


def test_data_that_a_fit_has_torn_down_are_set_up_again_for_thresholds(tmp_path):
    (tmp_path / "closed.yaml").write_text(RECIPE)
    assert main(["fit", "--config", str(tmp_path / "closed.yaml"), "--run_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/anytime.json").exists()


def test_data_may_lie_elsewhere_when_a_run_goes_on(tmp_path, capsys):
    """Staged to the disk of another node; other data there are refused."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(120, 8)), generator.integers(0, 4, 120)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    recipe = RECIPE.replace("data: helpers.toys.ClosedToys", "data: {class_path: bdistil.data.Arrays}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["fit", "--config", str(tmp_path / "recipe.yaml"), "--run_dir", str(tmp_path / "run")]
    assert main([*command, "--data.file", str(tmp_path / "mine.npz"), "--model.boosting.rounds", "1"]) == 0
    (tmp_path / "mine.npz").rename(tmp_path / "moved.npz")
    assert main([*command, "--data.file", str(tmp_path / "moved.npz")]) == 0
    assert RunDirectory(tmp_path / "run").committed() == 2
    assert main(["evaluate", "--run_dir", str(tmp_path / "run")]) == 0
    np.savez(tmp_path / "other.npz", x=x + 1, y=y)
    assert main([*command, "--data.file", str(tmp_path / "other.npz"), "--model.boosting.rounds", "3"]) == 2
    assert "is not the one that this run keeps state for: its x has changed" in capsys.readouterr().err
    assert main(["evaluate", "--run_dir", str(tmp_path / "run")]) == 0, "what was refused is not kept"


def test_the_training_of_a_teacher_goes_on_with_the_same_samples_only(tmp_path, capsys, monkeypatch):
    """Stopped to mend the labels: the epochs before were on the wrong ones."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(90, 4)), generator.integers(0, 3, 90)
    parts = {"x_val": x, "y_val": y, "x_test": x, "y_test": y}
    config = {
        "tracking": {"mode": "disabled"},
        "model": {
            "teacher": {
                "epochs": 2,
                "network": {"class_path": "bdistil.models.MLP", "init_args": {"features": 4, "outputs": 3}},
            },
            "student": {"class_path": "bdistil.models.MLPStudent", "init_args": {"features": 4, "outputs": 3}},
            "boosting": {"rounds": 1},
        },
        "data": {"class_path": "bdistil.data.Arrays", "init_args": {"file": str(tmp_path / "mine.npz")}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(config))
    command = ["fit", "--config", str(tmp_path / "recipe.yaml"), "--run_dir", str(tmp_path / "run")]
    saved = EpochKeeper.on_train_epoch_end

    def stopped(keeper, *args):
        saved(keeper, *args)
        raise RunError("stopped")

    np.savez(tmp_path / "mine.npz", x_train=x, y_train=(y + 1) % 3, **parts)
    with monkeypatch.context() as patch:
        patch.setattr(EpochKeeper, "on_train_epoch_end", stopped)
        assert main(command) == 1
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, **parts)
    assert main(command) == 2
    assert "Sample 0 of `train_dataloader()` is not the one" in capsys.readouterr().err
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=(y + 1) % 3, **parts)
    assert main(command) == 0
