"""Single cells of `bdistil compare` on toys, in this process: their figures, and what the plan reads of a recipe."""

import csv
import time

import lightning as L
import numpy as np
import pytest
import torch
from helpers.run_data import Drawn
from helpers.toys import CLASSES, FEATURES, Toys
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from bdistil.cli.app import main
from bdistil.cli.cells import CellCLI, JointCLI, TeacherCLI
from bdistil.cli.compare import PlanCLI
from bdistil.cli.fit import run_fit
from bdistil.cli.guard import guarded
from bdistil.comparison.figures import part_figures, table_figures
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.models import MLP
from bdistil.storage.run_directory import RunDirectory
from bdistil.storage.weights import load_weights
from bdistil.teachers.offline import OfflineTeacher

RECIPE = f"""
model:
  teacher:
    network: {{class_path: bdistil.models.MLP, init_args: {{features: {FEATURES}, hidden: [16], outputs: {CLASSES}}}}}
    epochs: 2
  student:
    class_path: bdistil.models.MLPStudent
    init_args: {{features: {FEATURES}, hidden: [6], outputs: {CLASSES}}}
  boosting: {{rounds: 2, accept: margin, margin_share: 0.0, lr: 0.1}}
data: helpers.toys.Toys
tracking: {{mode: disabled}}
trainer: {{max_epochs: 2, accelerator: cpu, devices: 1, enable_progress_bar: false}}
"""


API = ["--model.teacher.network", "bdistil.ApiTeacher", "--model.teacher.network.ask", "helpers.api_toys.logits_of"]
API += ["--model.teacher.network.outputs", str(CLASSES), "--model.teacher.network.cache", "cache"]


class NoTest(Toys):
    """Without a test part."""

    test_dataloader = L.LightningDataModule.test_dataloader


class Sequences(Toys):
    """The first sample is shorter than all others; batches are padded."""

    @staticmethod
    def padded(batch):
        return pad_sequence([x for x, _ in batch], batch_first=True), torch.stack([y for _, y in batch])

    def loader(self, part):
        x, y = self.parts[part]
        data = [
            (row.repeat(3 if number == 0 else 9, 1), label)
            for number, (row, label) in enumerate(zip(x, y, strict=True))
        ]
        return DataLoader(data, batch_size=32, shuffle=part == "train", collate_fn=self.padded)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "toys.yaml"
    file.write_text(RECIPE)
    return file


def start(kind, recipe, *options):
    """What a process of the command line does with a recipe."""
    made = []
    assert guarded(lambda: made.append(run_fit(["--config", str(recipe), *options], kind))) == 0
    return made[0]


def cell(kind, recipe, run_dir, *options):
    start(kind, recipe, "--run_dir", str(run_dir), *options)
    return RunDirectory(run_dir)


def test_joint_training_keeps_the_best_epoch_if_the_recipe_does(recipe, tmp_path):
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    more = ["--trainer.max_epochs", "6", "--model.boosting.schedule", "constant", "--model.boosting.lr", "0.3"]
    keep = ["--model.boosting.keep_epoch", "best"]
    run = cell(JointCLI, recipe, tmp_path / "run", *logger, *more, *keep)
    with open(next(tmp_path.glob("lightning_logs/*/metrics.csv")), newline="") as file:
        epochs = [row for row in csv.DictReader(file) if row["val_rms"]]
    best = min(epochs, key=lambda row: float(row["val_rms"]))
    assert best is not epochs[-1], "the last epoch is the best: this shows nothing"
    assert best["val_accuracy"] != epochs[-1]["val_accuracy"]
    assert run.read("figures")[-1]["val_accuracy"] == pytest.approx(float(best["val_accuracy"]), abs=1e-4)


@pytest.mark.parametrize("kind", [TeacherCLI, CellCLI, JointCLI])
def test_figures_are_those_of_the_parts_that_a_cell_was_trained_with(recipe, tmp_path, kind):
    """A data module that splits in its constructor would draw others, were it made again after the training."""
    seen, made = [], Drawn.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawn, "__init__", lambda data: (seen.append(data), made(data))[1])
        run = cell(kind, recipe, tmp_path / "run", "--data", "helpers.run_data.Drawn")
    assert len(seen) == 1
    assert 0 <= run.read("figures")[-1]["test_accuracy"] <= 1


def test_callbacks_that_joint_training_cannot_have_are_left_out(recipe, tmp_path):
    noise = ["--trainer.callbacks+", "bdistil.callbacks.GradientNoise", "--trainer.callbacks+", "LearningRateMonitor"]
    run = cell(JointCLI, recipe, tmp_path / "run", *noise)
    assert len(run.read("figures")) > 1
    assert not (run.root / "noise").exists()


class Broken(L.Callback):
    """Ends a training after a slow first epoch, once."""

    armed = True

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and Broken.armed:
            Broken.armed = False
            raise KeyboardInterrupt
        time.sleep(5 * (trainer.current_epoch == 0))


def test_seconds_of_joint_training_are_those_of_all_starts(recipe, tmp_path):
    options = ["--run_dir", str(tmp_path / "run"), "--trainer.callbacks", f"{__name__}.Broken"]
    Broken.armed = True
    assert guarded(lambda: run_fit(["--config", str(recipe), *options], JointCLI)) == 1
    run = cell(JointCLI, recipe, tmp_path / "run", *options[2:])
    assert run.read("figures")[0]["seconds"] > 5


def test_parameters_of_joint_prefixes_are_those_of_a_run(recipe, tmp_path):
    joint, rounds = (cell(kind, recipe, tmp_path / kind.__name__) for kind in (JointCLI, CellCLI))
    keys = ("prefix", "macs", "params")
    found = [[[row[key] for key in keys] for row in run.read("figures")] for run in (joint, rounds)]
    assert found[0] == found[1]


def test_training_costs_include_rejected_tries(recipe, tmp_path):
    """No round after the first makes enough progress: all classes of the second are tried, then boosting stops."""
    strict = ["--model.boosting.accept", "progress", "--model.boosting.min_progress", "0.99"]
    run = cell(CellCLI, recipe, tmp_path / "run", *strict)
    (row,) = run.read("figures")
    first = FEATURES * 6 + 6 * CLASSES
    tries = [first + 6 * CLASSES, first + 12 * 32 + 32 * CLASSES]  # F1, and F2-hidden, which has one student to read
    assert row["macs"] == first
    assert row["train_macs"] == 3 * 2 * 192 * sum([first, *tries])
    assert row["seconds"] > run.rows()[1]["seconds"]


def test_costs_of_a_rejected_try_are_kept_with_its_round(recipe, tmp_path):
    """The second round is rejected with one hidden unit, and accepted with 24."""
    ladder = ["--model.boosting.ladder", "[{links: 0}, {links: 0, width: 0.2}, {links: 1, width: 4}]"]
    steps = ["--model.boosting.accept", "progress", "--model.boosting.min_progress", "0.2"]
    run = cell(CellCLI, recipe, tmp_path / "run", *ladder, *steps)
    assert [len(run.record(number)["tries"]) for number in range(run.committed())] == [0, 1]
    first, rejected, last = FEATURES * 6 + 6 * CLASSES, FEATURES + CLASSES, FEATURES * 24 + (24 + 6) * CLASSES
    costs = [row["train_macs"] for row in run.read("figures")]
    assert costs == [3 * 2 * 192 * first, 3 * 2 * 192 * (first + rejected + last)]


def test_the_teacher_may_lie_elsewhere_when_a_cell_goes_on(recipe, tmp_path):
    teacher = cell(TeacherCLI, recipe, tmp_path / "teacher").teacher
    given = ["--model.teacher.checkpoint", str(teacher)]
    run = cell(CellCLI, recipe, tmp_path / "run", *given)
    before = run.read("figures")
    (run.root / "figures.json").unlink()
    moved = teacher.rename(tmp_path / "moved.safetensors")
    assert cell(CellCLI, recipe, tmp_path / "run", given[0], str(moved)).read("figures") == before


def test_macs_are_planned_for_the_sample_that_a_run_counts(recipe, tmp_path):
    student = ["--model.student", "bdistil.models.RecurrentStudent", "--model.student.in_channels", str(FEATURES)]
    student += ["--model.student.outputs", str(CLASSES), "--model.student.hidden", "4"]
    data = ["--data", f"{__name__}.Sequences"]
    assert start(PlanCLI, recipe, *student, *data).inputs.x.shape == (1, 3, FEATURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.boosting.labels", "null"], "some without labels (model.boosting.labels: null)"),
        (["--data", f"{__name__}.NoTest"], "some without a test_dataloader"),
        (API, "got one behind an API"),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused(recipe, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--config", str(recipe), "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_is_refused_as_output(recipe, tmp_path, capsys):
    (tmp_path / "run" / "rounds").mkdir(parents=True)
    assert main(["compare", "--config", str(recipe), "--output", str(tmp_path / "run")]) == 2
    assert "is the folder of a run, whose report would be lost" in capsys.readouterr().err


def test_a_table_of_logits_has_the_figures_of_its_teacher(recipe, tmp_path):
    run = cell(TeacherCLI, recipe, tmp_path / "teacher")
    teacher = MLP(FEATURES, [16], CLASSES).eval()
    load_weights(teacher, run.teacher, "teacher")
    data = Toys()
    with torch.no_grad():
        logits = {part: teacher(data.parts[part][0]) for part in ("train", "val", "test")}
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        (row,) = table_figures(OfflineTeacher(**logits), part, loader, "classification")
        (expected,) = part_figures(ProgressiveEnsemble([teacher]), loader)
        assert row == pytest.approx(expected, abs=1e-6)
        assert run.read("figures")[0][f"{part}_accuracy"] == row["accuracy"]
    table = OfflineTeacher(logits["train"], logits["val"])
    assert table_figures(table, "test", data.test_dataloader(), "classification")[0]["accuracy"] is None


def test_a_comparison_may_have_a_table_of_logits_as_its_teacher(recipe, tmp_path):
    data, table = Toys(), ["--model.teacher.network", "bdistil.OfflineTeacher"]
    logits = {part: x[:, :CLASSES] for part, (x, _) in data.parts.items()}
    for part, rows in logits.items():
        np.save(tmp_path / f"{part}.npy", rows.numpy())
        table += [f"--model.teacher.network.{part}", str(tmp_path / f"{part}.npy")]
    (row,) = cell(TeacherCLI, recipe, tmp_path / "teacher", *table).read("figures")
    right = logits["test"].argmax(-1) == data.parts["test"][1]
    assert row["test_accuracy"] == pytest.approx(float(right.float().mean()))
