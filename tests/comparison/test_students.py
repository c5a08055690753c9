"""The students of a comparison: MACs of the prefixes as a run has them, and widths of single students."""

from dataclasses import replace

import pytest
import torch
from helpers.toys import FEATURES, boost, make_plain, make_student, settings_for

from bdistil import Rung
from bdistil.comparison.students import equal_macs_note, latencies, plan_students, width_for, with_widths
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
    planned = plan_students(make_student, settings, X, widths=False)
    assert planned.prefix_macs == tuple(row["macs"] for row in run.run.rows()[1:])
    assert planned.single_widths == ()


def test_single_students_have_the_macs_of_the_prefixes():
    planned = plan_students(make_conv, DEEP, IMAGE, widths=True)
    assert len(planned.single_macs) == 3
    assert all(
        abs(own / goal - 1) <= TOLERANCE for own, goal in zip(planned.single_macs, planned.prefix_macs, strict=True)
    )
    assert sorted(planned.single_widths) == list(planned.single_widths)


def test_widths_are_found_above_and_below_the_start():
    assert width_for(10_000, lambda width: int(1000 * width)) == pytest.approx(10, abs=0.01)
    assert width_for(300, lambda width: int(1000 * width)) == pytest.approx(0.3, abs=0.01)


def test_students_without_a_width_are_refused_for_the_oracle_only():
    settings = settings_for(2, ladder=[Rung(0)])
    assert len(plan_students(make_plain, settings, X, widths=False).prefix_macs) == 2
    with pytest.raises(UserError, match="Expected a student that takes `width`, for the method no_resched"):
        plan_students(make_plain, settings, X, widths=True)


def test_students_that_read_segments_have_no_single_one_beside_them():
    def make_early(round, width=1.0):
        return RecurrentSegmentStudent(3, 5, segments=2, width=width)

    x = torch.zeros(1, 20, 3)
    assert len(plan_students(make_early, settings_for(2), x, widths=False).prefix_macs) == 2
    with pytest.raises(UserError, match="a single one reads the first segment only"):
        plan_students(make_early, settings_for(2), x, widths=True)


def test_prefixes_that_share_a_student_are_told():
    planned = plan_students(make_conv, DEEP, IMAGE, widths=True)
    assert not equal_macs_note(planned)
    said = "Students of no_resched have equal MACs beside prefixes 2, 3: widths are rounded."
    assert equal_macs_note(replace(planned, single_macs=(5, 8, 8))) == said


def test_planning_draws_no_random_numbers():
    before = torch.get_rng_state()
    plan_students(make_conv, DEEP, IMAGE, widths=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_widths_follow_the_prefixes_that_a_run_reached():
    planned = plan_students(make_conv, DEEP, IMAGE, widths=True)
    reached = [planned.prefix_macs[0], 2 * planned.prefix_macs[1]]
    then = with_widths(planned, make_conv, IMAGE, reached)
    assert then.prefix_macs == (*reached, 2 * planned.prefix_macs[1] + planned.prefix_macs[2] - planned.prefix_macs[1])
    assert all(abs(own / goal - 1) <= TOLERANCE for own, goal in zip(then.single_macs, then.prefix_macs, strict=True))


def test_latencies_are_cumulative_and_measured_once_for_each_class():
    planned = plan_students(make_conv, DEEP, IMAGE, widths=True)
    other, single = (Rung(0), Rung(0), Rung(1)), (Rung(0, width=planned.single_widths[-1]),)
    times = latencies(make_conv, [planned.rungs, other, single], IMAGE)
    assert planned.rungs == (Rung(0), *2 * [Rung(1, "deep", at=1)])
    assert set(times) == {chain[:n] for chain in (planned.rungs, other, single) for n in range(len(chain) + 1)}
    for chain in (planned.rungs, other):
        assert 0 < times[chain[:1]] < times[chain[:2]] < times[chain]
