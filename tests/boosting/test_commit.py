"""The decision on a student: accepted or not, and the reason."""

import math
import re

import pytest

from bdistil import BoostingSettings
from bdistil.boosting.commit import decide
from bdistil.boosting.ledger.records import RoundEvidence


def decide_on(number, *, before=1.0, after=1.0, share=0.0, **settings):
    """The decision on evidence that speaks for the other verdict in the part that does not count."""
    training = RoundEvidence(share, -1.0, before, before * 1.5 if after < before else before / 2, 9.0)
    validation = RoundEvidence(1 - share, -1.0, before, after, 9.0)
    return decide(BoostingSettings(**settings), number, training, validation)


@pytest.mark.parametrize(
    ("evidence", "settings", "accepted", "reason"),
    [
        ({"after": 0.98}, {"min_progress": 0.01}, True, r"fell by more than 0.01: 1.0000 -> 0.9800, -2.00%"),
        ({"after": 0.98}, {"min_progress": 0.03}, False, r"did not fall by more than 0.03: 1.0000 -> 0.9800"),
        ({"after": 1.0}, {"min_progress": 0.0}, False, "did not fall"),
        ({"after": 2.0}, {}, False, r"did not fall by more than 0.002: 1.0000 -> 2.0000, \+100.00%"),
        ({"before": 0.01, "after": 0.009}, {}, True, "fell by more than 0.002"),  # relative to the prefix before
        ({"before": 10.0, "after": 9.99}, {}, False, "did not fall by more than 0.002"),
        ({"before": 0.0, "after": 0.0}, {}, False, "did not fall"),
        ({"before": 0.5, "after": math.nan}, {}, False, "did not fall.*nan"),
        ({"share": 0.7}, {"accept": "margin"}, True, "70% of the outputs meet their margin, at least 50%"),
        ({"share": 0.5}, {"accept": "margin", "margin_share": 0.5}, True, "50% of the outputs .* at least 50%"),
        ({"share": 0.25}, {"accept": "margin", "margin_share": 0.5}, False, "25% of the outputs .* less than 50%"),
        ({"share": math.nan}, {"accept": "margin"}, False, "less than 50%"),
    ],
)
def test_the_decision(evidence, settings, accepted, reason):
    verdict, why = decide_on(1, **evidence, **settings)
    assert verdict is accepted
    assert re.search(reason, why)
    assert decide_on(0, **evidence, **settings) == (True, "the first round is always accepted")
