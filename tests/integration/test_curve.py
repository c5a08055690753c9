"""Cost and curve of a run, and the pieces that measure them on a foreign module."""

import copy
import csv
from itertools import pairwise

import lightning as L
import pytest
import torch
from helpers.toys import (
    BODY,
    CLASSES,
    EPOCHS,
    FEATURES,
    HEAD,
    JOIN,
    ROUNDS,
    TEST,
    TRAIN,
    VAL,
    Toys,
    boost,
    curve,
    logged,
    make_teacher,
    make_trainer,
    samples,
    settings_for,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from bdistil import UserError
from bdistil.callbacks import ComputeCost, MetricCurves
from bdistil.metrics.cost import measure_cost
from bdistil.metrics.curve import area_under_curve

FIXED_COLUMNS = [
    "stage", "macs", "link_macs", "params", "train_macs", "val_accuracy", "val_loss", "test_accuracy", "latency_ms",
    "seconds", "accepted_class", "margin_share", "reason",
]  # fmt: skip


def test_the_curve(finished):
    with open(finished.run_dir / "curve.csv", newline="") as file:
        assert next(csv.reader(file))[: len(FIXED_COLUMNS)] == FIXED_COLUMNS
    teacher, *rows = curve(finished.run_dir)
    ensemble = finished.controller.ensemble

    macs = FEATURES * 24 + 24 * CLASSES
    assert teacher["stage"] == "teacher"
    assert [int(teacher[name]) for name in ("macs", "link_macs", "train_macs")] == [macs, 0, macs * (TRAIN + VAL)]
    assert int(teacher["params"]) == sum(p.numel() for p in make_teacher().parameters())
    assert [row["stage"] for row in rows] == ["1", "2", "3"]
    assert [row["accepted_class"] for row in rows] == ["F0", "F1", "F1"]

    own = [BODY + HEAD, BODY + HEAD + JOIN, BODY + HEAD + JOIN]
    total = [sum(own[: stage + 1]) for stage in range(ROUNDS)]
    assert [int(row["macs"]) for row in rows] == total == ensemble.macs
    assert measure_cost(ensemble, (finished.x[:1],)).macs == total[-1]
    assert [int(row["link_macs"]) for row in rows] == [0, JOIN, JOIN]
    params = [sum(p.numel() for p in student.parameters()) for student in ensemble.students]
    assert [int(row["params"]) for row in rows] == [sum(params[: stage + 1]) for stage in range(ROUNDS)]
    # Three forward passes a step; what is linked to comes from a cache.
    assert [int(row["train_macs"]) for row in rows] == [3 * each * TRAIN * EPOCHS for each in own]

    for part, count, seed, name in (("val", VAL, 12, "val_accuracy"), ("test", TEST, 13, "test_accuracy")):
        x, y = samples(count, seed)
        right = [float((ensemble(x, stage).argmax(-1) == y).double().mean()) for stage in (1, 2, 3)]
        assert [float(row[name]) for row in rows] == pytest.approx(right, abs=1e-5), part
        answers = make_teacher().eval()(x).argmax(-1)
        assert float(teacher[name]) == pytest.approx(float((answers == y).double().mean()), abs=1e-5)
    x, y = samples(VAL, 12)
    g = make_teacher().eval()(x)
    loss = [nn.functional.cross_entropy(ensemble(x, stage), y).item() for stage in (1, 2, 3)]
    assert [float(row["val_loss"]) for row in rows] == pytest.approx(loss, rel=1e-4)
    assert float(teacher["val_loss"]) == pytest.approx(nn.functional.cross_entropy(g, y).item(), rel=1e-4)

    accuracy = [float(row["val_accuracy"]) for row in rows]
    assert float(rows[-1]["area"]) == pytest.approx(area_under_curve(total, accuracy), abs=1e-5)
    assert float(rows[-1]["violations"]) == sum(b < a for a, b in pairwise(accuracy))
    assert all(float(row["seconds"]) > 0 and float(row["latency_ms"]) > 0 for row in rows)


def test_the_test_part_is_read_at_the_end(finished):
    for number, early in enumerate(finished.curves):
        assert [row["stage"] for row in early] == ["teacher", *"123"[: number + 1]]
        assert not any(row["test_accuracy"] for row in early)
    assert all(row["test_accuracy"] for row in curve(finished.run_dir))


def test_recomputed_state_costs_what_it_runs(tmp_path):
    boost(tmp_path, settings=settings_for(2, state="recompute"))
    teacher, _, second = curve(tmp_path)
    # A step runs the student three times, the whole first student, for its link and its error, and the teacher.
    a_sample = 3 * (BODY + HEAD + JOIN) + BODY + HEAD + int(teacher["macs"])
    assert int(second["train_macs"]) == a_sample * TRAIN * EPOCHS


class Foreign(L.LightningModule):
    """Somebody's classifier, which knows nothing of bdistil."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_cost_and_curve_on_a_foreign_module(tmp_path):
    curves, points = MetricCurves(metric="accuracy", tolerance=0.0), []
    logger = CSVLogger(tmp_path, name="", version="")
    for width in (4, 16):
        torch.manual_seed(width)
        trainer = make_trainer(ComputeCost(), curves, logger=logger, enable_checkpointing=False)
        trainer.fit(Foreign(width), Toys())
        points.append((width * (FEATURES + CLASSES), float(trainer.callback_metrics["accuracy"])))
    assert curves.points == points
    rows = [row for row in logged(tmp_path) if row["curve/area"]]
    areas = [points[0][1], area_under_curve(*zip(*points, strict=True))]
    assert [float(row["curve/area"]) for row in rows] == pytest.approx(areas)
    falls = float(points[1][1] < points[0][1])
    assert [float(row["curve/violations"]) for row in rows] == [0.0, falls]
    other = MetricCurves(metric="accuracy")
    other.load_state_dict(copy.deepcopy(curves.state_dict()))
    assert other.points == points
    assert other.add(10_000, 0.0)["violations"] == falls + 1


def test_a_metric_that_was_not_logged_is_named(tmp_path):
    trainer = make_trainer(ComputeCost(), MetricCurves(), epochs=1, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"expected 'val_accuracy' among logged metrics, got .*'accuracy'"):
        trainer.fit(Foreign(4), Toys())
