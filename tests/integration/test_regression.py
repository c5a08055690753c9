"""Regression: units of each output, whole runs, and the recipe `diabetes`."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from helpers.toys import FEATURES, Hook, boost, control, curve, fit, settings_for
from sklearn.metrics import r2_score, root_mean_squared_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import AveragedTeacher, Budget, ErrorLedger, ProgressiveEnsemble, RunError, UserError
from bdistil.boosting.ledger.records import Units
from bdistil.cli.app import main
from bdistil.data.diabetes import Diabetes
from bdistil.export.run import export_run
from bdistil.models.mlp import MLPStudent
from bdistil.runner import ExportedEnsemble
from bdistil.storage.run_directory import RunDirectory

OUTPUTS = 2
UNITS = torch.tensor([[100.0, -3.0], [20.0, 0.5]])  # offset and size of each output


class Teacher(nn.Module):
    """Two smooth outputs of very different units."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, OUTPUTS))

    def forward(self, x):
        return UNITS[0] + UNITS[1] * self.net(x)


class Table(L.LightningDataModule):
    """y is what the teacher says, with noise of a quarter of each output's unit."""

    def __init__(self, outputs=OUTPUTS):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(320, FEATURES, generator=generator)
        with torch.no_grad():
            y = Teacher()(x) + UNITS[1] / 4 * torch.randn(320, OUTPUTS, generator=generator)
        y = y if outputs == OUTPUTS else y[:, 0]
        parts = ((0, 192), (192, 256), (256, 320))
        self.parts = [TensorDataset(x[low:high], y[low:high]) for low, high in parts]

    def train_dataloader(self):
        return DataLoader(self.parts[0], batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], batch_size=24)

    def test_dataloader(self):
        return DataLoader(self.parts[2], batch_size=24)


def make_student(round):
    return MLPStudent(FEATURES, (4,), OUTPUTS)


def settings(rounds=3, **more):
    return settings_for(rounds, task="regression", lr=0.03, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three rounds; what the Trainer logged at the end of each is kept beside."""
    folder, logged = tmp_path_factory.mktemp("regression"), []

    def keep(trainer, module):
        logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    controller = control(folder, teacher=Teacher(), student=make_student, settings=settings())
    fit(controller, Table(), callbacks=lambda: [Hook(on_train_end=keep)], epochs=15)
    return folder, logged


# ---- units


def test_the_ledger_standardises_each_output(tmp_path):
    y = (UNITS[0] + UNITS[1] * torch.randn(700, 2, generator=torch.Generator().manual_seed(1))).numpy()
    constant = np.full((700, 1), 152.13, "f4")
    constant[::2] = np.nextafter(constant[::2], np.float32(200))  # but for the rounding of a teacher
    y = np.concatenate((y, constant), 1)
    ledger = ErrorLedger(tmp_path)
    blocks = ((low, torch.from_numpy(y[low : low + 512])) for low in (0, 512))
    ledger.create(700, blocks, outputs=3, task="regression")
    ledger.open(700)
    ledger.use(0)
    mean, sd = y.astype("f8").mean(0), y.astype("f8").std(0)
    assert ledger.units.offset == pytest.approx(mean.tolist(), rel=1e-6)
    assert ledger.units.scale == pytest.approx([*sd[:2].tolist(), 1.0], rel=1e-5)
    g = ledger.rows(np.arange(700))[0]
    np.testing.assert_allclose(g[:, :2].numpy(), (y - mean)[:, :2] / sd[:2], atol=1e-4)
    assert g[:, 2].abs().max() < 1e-3
    assert ledger.bound == pytest.approx(2 * g.abs().max().item())
    torch.testing.assert_close(ledger.units.outward(g), torch.from_numpy(y), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ledger.units.inward(torch.from_numpy(y)), g, rtol=1e-4, atol=1e-4)


def test_a_teacher_that_always_says_the_same_is_refused(tmp_path):
    with pytest.raises(RunError, match="the same answer for every sample"):
        ErrorLedger(tmp_path).create(4, [(0, torch.full((4, 2), 152.13))], outputs=2, task="regression")


def test_units_of_classes_are_one_scale_of_centred_logits():
    logits = torch.randn(5, 3)
    inward = Units(2.0).inward(logits)
    torch.testing.assert_close(inward, (logits - logits.mean(1, keepdim=True)) / 2)
    torch.testing.assert_close(Units(2.0).outward(inward), logits - logits.mean(1, keepdim=True))


# ---- a run


def test_the_curve_holds_r2_and_rms_of_every_prefix(run):
    folder, logged = run
    ensemble, teacher, table = ProgressiveEnsemble.load(folder), Teacher(), Table()
    rows = curve(folder)
    assert len(rows) == 4
    for part, column in ((1, "val_accuracy"), (2, "test_accuracy")):
        x, y = table.parts[part].tensors
        with torch.no_grad():
            answers = [teacher(x), *(stage.logits for stage in ensemble.stages(x))]
        for row, answer in zip(rows, answers, strict=True):
            assert float(row[column]) == pytest.approx(r2_score(y, answer), abs=1e-5)
            if part == 1:
                assert float(row["val_loss"]) == pytest.approx(root_mean_squared_error(y, answer), rel=1e-5)
    for row, said in zip(rows[1:], logged, strict=True):
        assert said["val_accuracy"] == pytest.approx(float(row["val_accuracy"]), abs=1e-4)
        assert said["val_loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)
        assert said["val_rms"] == pytest.approx(float(row["rms_error"]), rel=1e-4)


def test_the_error_to_the_teacher_is_in_its_standard_deviations_and_falls(run):
    folder, _ = run
    ensemble, (x, _), train = ProgressiveEnsemble.load(folder), Table().parts[1].tensors, Table().parts[0].tensors[0]
    with torch.no_grad():
        goal, known = Teacher()(x), Teacher()(train)
    errors = []
    for row, stage in zip(curve(folder)[1:], ensemble.stages(x), strict=True):
        errors.append(float((((stage.logits - goal) / known.std(0, correction=0)) ** 2).mean() ** 0.5))
        assert float(row["rms_error"]) == pytest.approx(errors[-1], rel=1e-3)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6


def test_a_loaded_ensemble_answers_in_the_teachers_units(run):
    ensemble = ProgressiveEnsemble.load(run[0])
    assert (ensemble.task, ensemble.scale.shape, ensemble.offset.shape) == ("regression", (2,), (2,))
    answers = ensemble(Table().parts[0].tensors[0])
    assert answers.mean(0).tolist() == pytest.approx(Table().parts[0].tensors[1].mean(0).tolist(), rel=0.15)
    prediction = ensemble.predict(torch.randn(5, FEATURES), Budget(stages=2))
    assert prediction.stages.tolist() == [2] * 5


def test_an_export_has_the_units(run, tmp_path):
    manifest = export_run(RunDirectory(run[0]), tmp_path / "out")
    ensemble = ProgressiveEnsemble.load(run[0])
    x = torch.randn(5, *ensemble.inputs.shape)
    answers = ExportedEnsemble.load(tmp_path / "out").predict(x.numpy()).logits
    assert manifest["task"] == "regression"
    np.testing.assert_allclose(answers, ensemble(x), rtol=1e-4, atol=1e-4)


def test_no_confidence_of_real_outputs(run):
    with pytest.raises(UserError, match="without `confidence` for real outputs"):
        ProgressiveEnsemble.load(run[0]).predict(torch.randn(5, FEATURES), Budget(confidence=0.9))


def test_state_that_is_recomputed_is_that_of_the_ledger(tmp_path, run):
    controller = control(tmp_path, teacher=Teacher(), student=make_student, settings=settings(1, state="recompute"))
    seen = []

    def look(trainer, module):
        index = np.arange(16)
        x = Table().parts[0].tensors[0][:16]
        seen.append((module.state(x, index)[1], module.ledger.rows(index)[0]))

    fit(controller, Table(), callbacks=lambda: [Hook(on_train_epoch_end=look)], epochs=1)
    torch.testing.assert_close(*seen[0], rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_the_same_units(tmp_path):
    """The second start reads head and students from the disk."""
    boost(tmp_path, Table(), teacher=Teacher(), student=make_student, settings=settings(2), trainer={"epochs": 1})
    assert RunDirectory(tmp_path).task == "regression"
    whole = [stage.logits for stage in ProgressiveEnsemble.load(tmp_path).stages(Table().parts[1].tensors[0])]
    controller = control(tmp_path, teacher=Teacher(), student=make_student, settings=settings(2))
    assert list(controller.rounds(Table())) == []
    torch.testing.assert_close(
        [stage.logits for stage in controller.ensemble.stages(Table().parts[1].tensors[0])], whole
    )


# ---- what is refused before training


def one_output(round):
    return MLPStudent(FEATURES, (4,), 1)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"teacher": nn.Linear(FEATURES, 1), "student": one_output}, Table(1), r"L=1\. Give .*task='regression'"),
        (
            {"teacher": Teacher(), "student": make_student},
            Table(),
            r"float32 numbers of shape .* for sample 0.*'regression'",
        ),
        (
            {"teacher": Teacher(), "student": make_student, "settings": settings()},
            Table(1),
            r"label y of a sample to be 2 finite numbers, .* for sample 0 of `train_dataloader",
        ),
        (
            {"teacher": AveragedTeacher([Teacher()]), "student": make_student, "settings": settings()},
            Table(),
            r"task='regression', got AveragedTeacher\(\.\.\., of='probabilities'\)\. Give of='logits'",
        ),
    ],
)
def test_tasks_that_do_not_fit_are_named(tmp_path, options, data, message):
    with pytest.raises(UserError, match=message):
        boost(tmp_path, data, **options)


# ---- the recipe


def test_the_recipe_runs_and_says_r2_and_rms(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run")
    short = ["--model.boosting.rounds", "2", "--trainer.max_epochs", "3", "--model.teacher.epochs", "8"]
    quiet = ["--trainer.accelerator", "cpu", "--tracking.mode", "disabled", "--model.boosting.accept", "margin"]
    assert main(["fit", "--config", "diabetes", "--run_dir", str(run.root), *short, *quiet]) == 0
    out = capsys.readouterr().out
    assert "val R²" in out
    assert "%" not in out.splitlines()[3].split()[4]
    teacher = float(run.read_curve()[0]["val_accuracy"])
    assert teacher > 0.2  # it was trained on the labels, in their units
    assert main(["report", "--run_dir", str(run.root)]) == 0
    page = run.report.read_text(encoding="utf-8")
    assert "validation R²" in page
    assert "rms error on labels" in page
    assert "accuracy of each prefix" not in page
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", str(run.root), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    data = Diabetes()
    data.setup()
    x, y = data.parts["test"].tensors
    answers = ProgressiveEnsemble.load(run.root)(x)
    assert said["r2"] == pytest.approx(r2_score(y, answers), abs=1e-5)
    assert said["rms"] == pytest.approx(root_mean_squared_error(y, answers), rel=1e-5)
    assert "accuracy" not in said
