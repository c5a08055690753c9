"""Forms of the students of a comparison: MACs of the prefixes as a run has them, and widths of single students."""

from dataclasses import replace

import pytest
import torch
from helpers.toys import FEATURES, boost, make_plain, make_student, settings_for

from bdistil import Rung
from bdistil.comparison.forms import latencies, plan_forms, shared_forms, width_for, with_widths
from bdistil.comparison.tables import TOLERANCE
from bdistil.errors import UserError
from bdistil.models import ConvStudent, RecurrentSegmentStudent

X = torch.zeros(1, FEATURES)
DEEP = settings_for(3, ladder=[Rung(0), Rung(1, "deep", at=1)])
IMAGE = torch.zeros(1, 1, 28, 28)


def make_conv(round, width=1.0):
    return ConvStudent((16, 32), refine="residual", width=width)


def test_macs_of_the_prefixes_are_those_of_a_run(tmp_path):
    settings = settings_for(3, start=1)
    run = boost(tmp_path, settings=settings)
    forms = plan_forms(make_student, settings, X, widths=False)
    assert forms.prefixes == tuple(row["macs"] for row in run.run.rows()[1:])
    assert forms.widths == ()


def test_single_students_have_the_macs_of_the_prefixes():
    forms = plan_forms(make_conv, DEEP, IMAGE, widths=True)
    assert len(forms.oracle) == 3
    assert all(abs(own / goal - 1) <= TOLERANCE for own, goal in zip(forms.oracle, forms.prefixes, strict=True))
    assert sorted(forms.widths) == list(forms.widths)


def test_widths_are_found_above_and_below_the_start():
    assert width_for(10_000, lambda width: int(1000 * width)) == pytest.approx(10, abs=0.01)
    assert width_for(300, lambda width: int(1000 * width)) == pytest.approx(0.3, abs=0.01)


def test_students_without_a_width_are_refused_for_the_oracle_only():
    settings = settings_for(2, ladder=[Rung(0)])
    assert len(plan_forms(make_plain, settings, X, widths=False).prefixes) == 2
    with pytest.raises(UserError, match="Expected a student that takes `width`, for the method no_resched"):
        plan_forms(make_plain, settings, X, widths=True)


def test_students_that_read_segments_have_no_single_one_beside_them():
    def make_early(round, width=1.0):
        return RecurrentSegmentStudent(3, 5, segments=2, width=width)

    x = torch.zeros(1, 20, 3)
    assert len(plan_forms(make_early, settings_for(2), x, widths=False).prefixes) == 2
    with pytest.raises(UserError, match="a single one reads the first segment only"):
        plan_forms(make_early, settings_for(2), x, widths=True)


def test_prefixes_that_share_a_student_are_told():
    forms = plan_forms(make_conv, DEEP, IMAGE, widths=True)
    assert not shared_forms(forms)
    said = "Students of no_resched have equal MACs beside prefixes 2, 3: widths are rounded."
    assert shared_forms(replace(forms, oracle=(5, 8, 8))) == said


def test_planning_draws_no_random_numbers():
    before = torch.get_rng_state()
    plan_forms(make_conv, DEEP, IMAGE, widths=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_widths_follow_the_prefixes_that_a_run_reached():
    forms = plan_forms(make_conv, DEEP, IMAGE, widths=True)
    reached = [forms.prefixes[0], 2 * forms.prefixes[1]]
    then = with_widths(forms, make_conv, IMAGE, reached)
    assert then.prefixes == (*reached, 2 * forms.prefixes[1] + forms.prefixes[2] - forms.prefixes[1])
    assert all(abs(own / goal - 1) <= TOLERANCE for own, goal in zip(then.oracle, then.prefixes, strict=True))


def test_latencies_are_cumulative_and_measured_once_for_each_class():
    forms = plan_forms(make_conv, DEEP, IMAGE, widths=True)
    other, single = (Rung(0), Rung(0), Rung(1)), (Rung(0, width=forms.widths[-1]),)
    times = latencies(make_conv, [forms.rungs, other, single], IMAGE)
    assert forms.rungs == (Rung(0), *2 * [Rung(1, "deep", at=1)])
    assert set(times) == {chain[:n] for chain in (forms.rungs, other, single) for n in range(len(chain) + 1)}
    for chain in (forms.rungs, other):
        assert 0 < times[chain[:1]] < times[chain[:2]] < times[chain]
