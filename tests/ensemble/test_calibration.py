"""The figures of stopping early: there and back through the run directory, and files that are not to be used."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bdistil.ensemble.budget import RULES, add_votes, confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures, load_calibration, save_calibration
from bdistil.errors import RunError, UserError
from bdistil.runner.stage_clock import BatchTimes
from bdistil.storage.run_directory import RunDirectory

FIGURES = Calibration(
    count=2,
    exits=ExitFigures("margin", (0.5, 0.0), "lose at most 0.2 points", (0.75, 0.25), 0.9, 0.91, 12.5),
    temperatures=(1.5, 0.7),
    calibration_error=((0.1, 0.02), (0.2, 0.03)),
    times=(BatchTimes(1, (1e-3, 2e-3), (2e-3, 3e-3), 1e-5, 1e-4, {"one": 3e-3}),),
)


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path)
    run.prepare()
    for number in range(2):
        run.commit(number, {"w": torch.zeros(1)}, {})
    return run


@pytest.mark.parametrize("figures", [FIGURES, Calibration(2)], ids=["all", "none"])
def test_figures_come_back_as_they_were(run, figures):
    assert load_calibration(run) is None
    save_calibration(run, figures)
    assert load_calibration(run) == figures


def test_no_run_gets_the_figures_of_another(run, tmp_path):
    for root in (run.root, tmp_path / "misspelt"):
        with pytest.raises(UserError, match=r"calibration of the \d committed rounds of .* got one of 9 stages"):
            save_calibration(RunDirectory(root), Calibration(9))
    assert not (tmp_path / "misspelt").exists()


def test_another_round_makes_them_stale(run):
    save_calibration(run, FIGURES)
    run.commit(2, {"w": torch.zeros(1)}, {})
    assert load_calibration(run) is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "Expecting value"),
        ("[]", "cannot be used"),
        (json.dumps(FIGURES.to_dict())[:-9], "anytime.json cannot be used"),
        (json.dumps({"count": 2, "surprise": 1}), "surprise"),
        (json.dumps({**FIGURES.to_dict(), "temperatures": [1.0]}), "1 numbers for 2 stages"),
        (json.dumps({**FIGURES.to_dict(), "temperatures": [1.0, 0.0]}), "temperatures that are not positive"),
        (json.dumps(replace(FIGURES, count=3, exits=None, temperatures=(), calibration_error=(), times=()).to_dict()),
         "of 3 stages, 2 are committed"),
    ],
    ids=["empty", "no object", "torn", "unknown key", "too few", "no temperature", "another ensemble"],
)  # fmt: skip
def test_a_file_that_is_not_to_be_used_is_named(run, text, names):
    (run.root / "anytime.json").write_text(text)
    with pytest.raises(RunError, match=names) as error:
        load_calibration(run)
    assert "bdistil calibrate" in str(error.value)


# ---- exit rules, by the formula and sample by sample


def by_hand(logits, rule, temperature, students):
    """Sureness of one sample from its logits (L,), and the answers of the students that it is made of."""
    if rule == "agreement":
        return students.count(max(range(len(logits)), key=logits.__getitem__)) / len(students) if students[1:] else 0.0
    powers = [math.exp(z / temperature) for z in logits]
    p = sorted((power / sum(powers) for power in powers), reverse=True)
    entropy = -sum(q * math.log(q) for q in p)
    return {"max_prob": p[0], "margin": p[0] - p[1], "entropy": 1 - entropy / math.log(len(p))}[rule]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("students", [1, 3])
@pytest.mark.parametrize("classes", [5, 20])  # fewer than a register holds, and more
def test_sureness_is_its_formula(rule, students, classes):
    own = torch.randn(students, 50, classes, dtype=torch.float64)
    votes = None
    for answer in own:
        votes = add_votes(votes, answer)
    logits = 3 * own.mean(0)
    expected = [
        by_hand(row.tolist(), rule, 1.7, answers.argmax(-1).tolist())
        for row, answers in zip(logits, own.transpose(0, 1), strict=True)
    ]
    found = confidence_of(logits, rule, 1.7, votes)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.min() >= 0
    assert found.max() <= 1
