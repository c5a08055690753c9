"""Accuracy and cross entropy of prefixes; R² and rms error of real outputs."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, r2_score, root_mean_squared_error

from bdistil.metrics.quality import PrefixErrors, PrefixPrecisions, PrefixScores


@pytest.mark.parametrize("predictors", [1, 3])
def test_scores_against_plain_torch(predictors):
    logits, target = 3 * torch.randn(predictors, 11, 4), torch.randint(0, 4, (11,))
    scores = PrefixScores(predictors)
    for low, high in ((0, 4), (4, 5), (5, 11)):
        scores.update(logits[:, low:high], target[low:high])
    accuracy, entropy = scores.compute()
    for k in range(predictors):
        rows = [logits[k, i] for i in range(11)]
        right = sum(int(row.argmax()) == int(t) for row, t in zip(rows, target, strict=True)) / 11
        loss = sum(-float((row.double().softmax(0)[t]).log()) for row, t in zip(rows, target, strict=True)) / 11
        assert float(accuracy.flatten()[k]) == pytest.approx(right)
        assert float(entropy.flatten()[k]) == pytest.approx(loss, rel=1e-5)
    assert accuracy.numel() == entropy.numel() == predictors


def test_scores_start_again():
    scores = PrefixScores(2)
    wrong, right = torch.tensor([[[0.0, 9.0]], [[0.0, 9.0]]]), torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]]])
    scores.update(wrong, torch.tensor([0]))
    assert scores.compute()[0].tolist() == [0, 0]
    scores.reset()
    scores.update(right, torch.tensor([0]))
    assert scores.compute()[0].tolist() == [1, 0]


def test_scores_of_two_parts_add_up():
    # What processes do to their states.
    logits, target = torch.randn(2, 9, 3), torch.randint(0, 3, (9,))
    whole, *parts = (PrefixScores(2) for _ in range(3))
    whole.update(logits, target)
    for part, rows in zip(parts, (slice(0, 2), slice(2, 9)), strict=True):
        part.update(logits[:, rows], target[rows])
    for name in ("right", "entropy", "samples"):
        torch.testing.assert_close(
            getattr(parts[0], name) + getattr(parts[1], name), getattr(whole, name), rtol=1e-6, atol=0
        )
        assert parts[0]._reductions[name].__name__ == "dim_zero_sum"


@pytest.mark.filterwarnings("error")
def test_half_precision_loses_no_samples():
    logits = torch.zeros(1, 5000, 2, dtype=torch.bfloat16)
    scores = PrefixScores()
    scores.update(logits, torch.zeros(5000, dtype=torch.long))
    accuracy, entropy = scores.compute()
    assert float(accuracy) == 1.0
    assert float(entropy) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_r2_and_rms_are_those_of_scikit_learn(outputs):
    random = np.random.default_rng(outputs)
    labels = 1e3 + np.arange(1, outputs + 1) * random.normal(size=(50, outputs))
    answers = labels + random.normal(size=(2, 50, outputs))
    scores = PrefixErrors(2, outputs)
    for low in (0, 20, 40):
        y = torch.from_numpy(labels[low : low + 20])
        scores.update(torch.from_numpy(answers[:, low : low + 20]), y[:, 0] if outputs == 1 else y)
    r2, rms = scores.compute()
    assert r2.tolist() == pytest.approx([r2_score(labels, a) for a in answers])
    assert rms.tolist() == pytest.approx([root_mean_squared_error(labels, a) for a in answers])


@pytest.mark.filterwarnings("error")
def test_r2_of_an_output_that_is_constant_is_that_of_scikit_learn():
    labels = np.full((50, 3), 0.5)
    labels[:, 2] = np.arange(50)
    answers = labels + np.array([0.0, 0.5, 0.5])
    scores = PrefixErrors(1, 3)
    scores.update(torch.from_numpy(answers)[None], torch.from_numpy(labels))
    assert float(scores.compute()[0]) == pytest.approx(r2_score(labels, answers))


def precision(answers, targets):
    """Mean average precision of logits (N, L)."""
    scores = PrefixPrecisions()
    scores.update(torch.tensor(answers)[None], torch.tensor(targets))
    return float(scores.compute()[0])


def test_large_logits_are_ranked_to_the_end():
    assert precision([[30.0], [20.0], [25.0], [-5.0]], [[1], [0], [0], [0]]) == 1.0


def test_ties_of_logits_stay_ties():
    answers, targets = np.array([[3.0], [3.0], [1.0], [0.0]]), np.array([[0], [1], [0], [1]])
    truth = average_precision_score(targets[:, 0], answers[:, 0])
    assert precision(answers, targets) == pytest.approx(truth)


@pytest.mark.parametrize("unknown", [-1, -100])
def test_labels_that_are_unknown_do_not_count(unknown):
    assert precision([[3.0], [2.0], [1.0], [-5.0]], [[unknown], [1], [0], [0]]) == 1.0
