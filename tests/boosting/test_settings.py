"""Settings of a run and the values that are refused."""

import json
import math

import pytest

from bdistil.boosting.settings import BoostingSettings
from bdistil.errors import UserError
from bdistil.models.student import Rung


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
    plain = BoostingSettings().to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert [rung["links"] for rung in plain["ladder"]] == [0, 1, 2]
    again = BoostingSettings(**{**plain, "ladder": [Rung(**rung) for rung in plain["ladder"]]})
    assert again == BoostingSettings()


def test_ladders_are_not_shared():
    BoostingSettings().ladder.clear()
    assert len(BoostingSettings().ladder) == 3


def test_a_task_that_is_none_is_named():
    with pytest.raises(
        UserError, match=r"`task` of the boosting settings .*'classification', 'multilabel' or 'regression'"
    ):
        BoostingSettings(task="ranking")
