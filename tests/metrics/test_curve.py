"""Settings of a run and their refusals; accuracy of prefixes, and the curve of accuracy against cost."""

import json
import math

import numpy as np
import pytest
import torch

from bdistil.boosting.settings import BoostingSettings
from bdistil.errors import UserError
from bdistil.metrics.classification import PrefixScores
from bdistil.metrics.curve import area_under_curve, violations_of_monotony
from bdistil.models.student import Rung

# ---- settings


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rounds", 0, ">= 1"),
        ("rounds", -2, ">= 1"),
        ("eta", 0.0, "> 0"),
        ("eta", -0.5, "> 0"),
        ("eta", math.nan, "> 0"),
        ("kappa", -1.0, ">= 0"),
        ("gamma", 0.0, "> 0"),
        ("gamma", -1.0, "> 0"),
        ("accept", "always", "'progress' or 'margin'"),
        ("min_progress", -0.1, r"in \[0, 1\)"),
        ("min_progress", 1.0, r"in \[0, 1\)"),
        ("margin_share", -0.1, r"in \[0, 1\]"),
        ("margin_share", 1.1, r"in \[0, 1\]"),
        ("margin_tolerance", -1e-9, ">= 0"),
        ("ladder", [], "one rung or more"),
        ("start", -1, ">= 0"),
        ("state", "cache", "'cached' or 'recompute'"),
        ("lr", 0.0, "> 0"),
        ("lr", math.nan, "> 0"),
        ("weight_decay", -1e-4, ">= 0"),
        ("schedule", "step", "'cosine' or 'constant'"),
    ],
)
def test_values_that_are_not_allowed(name, value, allowed):
    with pytest.raises(
        UserError, match=rf"Expected `{name}` of the boosting settings to be {allowed}.*, got"
    ) as caught:
        BoostingSettings(**{name: value})
    assert str(caught.value).endswith(f"got {value!r}.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 1), ("kappa", 0.0), ("min_progress", 0.0), ("margin_share", 0.0), ("margin_share", 1.0),
        ("margin_tolerance", 0.0), ("start", 0), ("weight_decay", 0.0), ("ladder", [Rung(0)]),
        ("accept", "margin"), ("state", "recompute"), ("schedule", "constant"),
    ],
)  # fmt: skip
def test_values_at_the_edge_are_allowed(name, value):
    assert getattr(BoostingSettings(**{name: value}), name) == value


def test_two_names_of_one_thing():
    with pytest.raises(UserError, match=r"`kappa` or `gamma`, got both \(1.0 and 0.5\): gamma = eta / \(4 b kappa\)"):
        BoostingSettings(kappa=1.0, gamma=0.5)


@pytest.mark.parametrize(
    ("values", "gamma"),
    [
        ({}, 0.5 / (4 * 3 * 1)),
        ({"kappa": 1.0}, 0.5 / (4 * 3 * 1)),
        ({"kappa": 0.5, "eta": 0.2}, 0.2 / (4 * 3 * 0.5)),
        ({"kappa": 0.0}, math.inf),
        ({"gamma": 7.0}, 7.0),
    ],
)
def test_gamma(values, gamma):
    assert BoostingSettings(**values).gamma_for(3.0) == pytest.approx(gamma)


LADDER = [Rung(0), Rung(1), Rung(0, width=2.0), Rung(2, "hidden")]


@pytest.mark.parametrize(
    ("number", "links", "start", "names"),
    [
        (0, True, 1, ["F0", "F0 x2"]),  # the first round has nothing to link to
        (0, True, 3, ["F0", "F0 x2"]),
        (1, True, 1, ["F1", "F0 x2", "F2-hidden"]),
        (5, True, 0, ["F0", "F1", "F0 x2", "F2-hidden"]),
        (5, True, 3, ["F2-hidden"]),
        (5, True, 99, ["F2-hidden"]),
        (0, False, 1, ["F0", "F0 x2"]),
        (5, False, 3, ["F0", "F0 x2"]),
    ],
)
def test_rungs_that_a_round_may_try(number, links, start, names):
    settings = BoostingSettings(ladder=LADDER, start=start)
    assert [rung.name for rung in settings.rungs(number, links=links)] == names


@pytest.mark.parametrize(("number", "links"), [(0, True), (3, False)])
def test_a_ladder_of_links_alone_still_has_a_first_round(number, links):
    settings = BoostingSettings(ladder=[Rung(1), Rung(2)])
    assert list(settings.rungs(number, links=links)) == [Rung(0)]


def test_settings_as_plain_values():
    plain = BoostingSettings().plain()
    assert json.loads(json.dumps(plain)) == plain
    assert [rung["links"] for rung in plain["ladder"]] == [0, 1, 2]
    again = BoostingSettings(**{**plain, "ladder": [Rung(**rung) for rung in plain["ladder"]]})
    assert again == BoostingSettings()


def test_ladders_are_not_shared():
    BoostingSettings().ladder.clear()
    assert len(BoostingSettings().ladder) == 3


# ---- accuracy of prefixes


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


# ---- the curve


@pytest.mark.parametrize(
    ("macs", "accuracy"),
    [
        ([10, 100], [0.5, 0.9]),
        ([22_000, 50_000, 51_000, 9_000_000], [0.4, 0.8, 0.7, 0.95]),
        ([1, 2, 4, 8], [0.6, 0.6, 0.6, 0.6]),
        ([0.5, 3.0], [1.0, 0.0]),
    ],
)
def test_area_against_a_numerical_integral(macs, accuracy):
    low, high = math.log(macs[0]), math.log(macs[-1])
    budgets = low + (np.arange(200_000) + 0.5) * (high - low) / 200_000
    expected = np.interp(budgets, np.log(macs), accuracy).mean()
    assert area_under_curve(macs, accuracy) == pytest.approx(expected, abs=1e-6)
    assert area_under_curve([1000 * m for m in macs], accuracy) == pytest.approx(expected, abs=1e-6)


def test_area_by_hand():
    # Half of the width at 0.5 on average, half of it at 1.
    assert area_under_curve([1, 10, 100], [0.0, 1.0, 1.0]) == pytest.approx(0.75)


def test_area_of_one_point_is_its_accuracy():
    assert area_under_curve([123], [0.7]) == 0.7


@pytest.mark.parametrize(
    ("macs", "accuracy", "message"),
    [
        ([], [], "as many MACs as accuracies, at least one, got 0 and 0"),
        ([1, 2], [0.5], "as many MACs as accuracies, at least one, got 2 and 1"),
        ([1], [0.5, 0.6], "got 1 and 2"),
        ([0, 2], [0.5, 0.6], r"`macs` of the prefixes to be positive and rising, got \[0, 2\]"),
        ([-1], [0.5], r"got \[-1\]"),
        ([3, 2], [0.5, 0.6], r"positive and rising, got \[3, 2\]"),
        ([1, 5, 5], [0.5, 0.6, 0.7], r"positive and rising, got \[1, 5, 5\]"),
    ],
)
def test_curves_that_have_no_area(macs, accuracy, message):
    with pytest.raises(UserError, match=message):
        area_under_curve(macs, accuracy)


@pytest.mark.parametrize(
    ("accuracy", "tolerance", "violations"),
    [
        ([], 0.0, 0),
        ([0.5], 0.0, 0),
        ([0.5, 0.6, 0.7], 0.0, 0),
        ([0.5, 0.5, 0.5], 0.0, 0),
        ([0.7, 0.6, 0.5], 0.0, 2),
        ([0.5, 0.7, 0.6, 0.65], 0.0, 1),  # 0.65 is less than the best, but not than the one before
        ([0.5, 0.7, 0.695, 0.6], 0.01, 1),
        ([0.75, 0.5], 0.25, 0),  # by no more than the tolerance
    ],
)
def test_violations(accuracy, tolerance, violations):
    assert violations_of_monotony(accuracy, tolerance) == violations
