"""The decision on a student: accepted or not, and the reason."""

import math
import re

import pytest

from bdistil import BoostingSettings
from bdistil.boosting.commit import accepts_margin, accepts_progress, decide
from bdistil.boosting.ledger.records import RoundEvidence


@pytest.mark.parametrize(
    ("before", "after", "accepted", "parts"),
    [
        (0.5, 0.4, True, ["fell by more than 0.002", "0.5000 -> 0.4000"]),
        (0.5, 0.4995, False, ["did not fall by more than 0.002", "0.5000 -> 0.4995"]),
        (0.5, 0.6, False, ["did not fall", "0.5000 -> 0.6000"]),
        (0.01, 0.009, True, ["fell by more than 0.002"]),  # relative to what it was
        (10.0, 9.99, False, ["did not fall by more than 0.002"]),
        (0.0, 0.0, False, ["did not fall"]),
        (0.5, math.nan, False, ["did not fall", "nan"]),
    ],
)
def test_accepts_progress(before, after, accepted, parts):
    decision, reason = accepts_progress(before, after, 0.002)
    assert decision is accepted
    assert all(part in reason for part in parts), reason


@pytest.mark.parametrize(
    ("share", "accepted", "sentence"),
    [
        (0.7, True, "70% of the outputs meet their margin, at least 50%"),
        (0.5, True, "50% of the outputs meet their margin, at least 50%"),
        (0.4, False, "40% of the outputs meet their margin, less than 50%"),
        (math.nan, False, "less than 50%"),
    ],
)
def test_accepts_margin(share, accepted, sentence):
    decision, reason = accepts_margin(share, 0.5)
    assert decision is accepted
    assert sentence in reason


def decide_on(number, *, before=1.0, after=1.0, share=0.0, **settings):
    """The decision on evidence that speaks for the other verdict in the part that does not count."""
    training = RoundEvidence(share, -1.0, before, before * 1.5 if after < before else before / 2, 9.0)
    validation = RoundEvidence(1 - share, -1.0, before, after, 9.0)
    return decide(BoostingSettings(**settings), number, training, validation)


@pytest.mark.parametrize(
    ("evidence", "settings", "accepted", "reason"),
    [
        ({"after": 0.98}, {"min_progress": 0.01}, True, "fell by more than 0.01: 1.0000 -> 0.9800"),
        ({"after": 0.98}, {"min_progress": 0.03}, False, r"did not fall by more than 0.03: 1.0000 -> 0.9800"),
        ({"after": 1.0}, {"min_progress": 0.0}, False, "did not fall"),
        ({"after": 2.0}, {}, False, "did not fall by more than 0.002: 1.0000 -> 2.0000"),
        ({"before": 0.0, "after": 0.0}, {}, False, "did not fall"),
        ({"share": 0.5}, {"accept": "margin", "margin_share": 0.5}, True, "50% of the outputs .* at least 50%"),
        ({"share": 0.25}, {"accept": "margin", "margin_share": 0.5}, False, "25% of the outputs .* less than 50%"),
    ],
)
def test_the_decision(evidence, settings, accepted, reason):
    verdict, why = decide_on(1, **evidence, **settings)
    assert verdict is accepted
    assert re.search(reason, why)
    first, why = decide_on(0, **evidence, **settings)
    assert first is True
    assert why == "the first round is always accepted"
