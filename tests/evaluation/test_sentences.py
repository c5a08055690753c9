"""Evaluation of a run on token ids: batches are mappings, lengths vary, labels have another key."""

import pytest
import torch
from helpers.sentences import CLASSES, WIDTH, Sentences, padded, run_of_sentences, sentences

from bdistil import Budget, ProgressiveEnsemble, UserError
from bdistil.ensemble.calibration import save_calibration
from bdistil.evaluation import evaluate_budgets, fit_anytime, profile_run
from bdistil.evaluation.run_data import loader_of
from bdistil.evaluation.tables import reference_row


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of_sentences(tmp_path_factory.mktemp("sentences")).run


def test_accuracy_within_budgets(run):
    ensemble = ProgressiveEnsemble.load(run.root)
    rows = evaluate_budgets(run, [Budget(), Budget(stages=1), Budget(confidence=0.5)], batch_size=7)
    batch = padded(sentences(60, 3))
    y = batch.pop("target")
    for row, stages in zip(rows, (2, 1), strict=False):
        right = (ensemble(batch, stages=stages).argmax(-1) == y).double().mean()
        assert row["accuracy"] == pytest.approx(float(right), abs=1e-6)
        assert row["samples"] == 60
    assert sum(rows[2]["decided_share"]) == pytest.approx(1, abs=1e-3)


def test_exits_fitted_on_the_data_of_the_run(run):
    ensemble = ProgressiveEnsemble.load(run.root)
    save_calibration(run, fit_anytime(ensemble, loader_of(run, "val")))
    with pytest.raises(UserError, match=r"key 'labels' in batches of `loader\(\)`, got 'ids', 'mask', 'target'"):
        fit_anytime(ensemble, Sentences().val_dataloader())
    batch = padded(sentences(9, 4, longest=20))  # with the labels in it, which the students do not read
    assert ProgressiveEnsemble.load(run.root).predict(batch, Budget(confidence="fitted")).logits.shape == (9, CLASSES)
    run.calibration.unlink()


def test_macs_of_a_profile_are_those_of_the_curve(run):
    """The first sentence of the training part is shorter than the longest, on which bytes and latency are measured."""
    rows, curve = profile_run(run, batch_size=4)[1:], run.rows()[1:]
    assert [row["cumulative_macs"] for row in rows] == [row["macs"] for row in curve]
    assert rows[0]["macs"] + rows[1]["macs"] == rows[1]["cumulative_macs"]
    assert rows[0]["macs"] < 7 * WIDTH * WIDTH + WIDTH * CLASSES
    assert [row["link_macs"] for row in rows] == [0, WIDTH * CLASSES]


def test_a_teacher_measured_on_a_gpu_has_no_latency_beside_students_on_the_cpu(run):
    assert run.read("teacher")["device"] == "cpu"
    before = run.read("teacher")
    for device, known in (("cpu", True), ("cuda", False)):
        run.write("teacher", {**before, "device": device})
        assert (profile_run(run)[0]["latency_ms"] is not None) == known
        assert (reference_row(run, "val")["single_ms_p50"] is not None) == known
    run.write("teacher", before)


def test_the_schedule_all_reads_a_mapping(run):
    ensemble = ProgressiveEnsemble.load(run.root)
    x = {key: value for key, value in padded(sentences(5, 5)).items() if key != "target"}
    torch.testing.assert_close(ensemble(x, schedule="all"), ensemble(x, schedule="one"))
