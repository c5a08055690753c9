"""What a comparison says over the seeds: points, ranges, differences with their intervals, and which cells count."""

import json
import math
from dataclasses import asdict

import pytest

from bdistil import Rung
from bdistil.comparison.methods import TEACHER, Cell
from bdistil.comparison.report import difference_table, prefix_table
from bdistil.comparison.tables import area, bands, common_range, differences, gather, height_at, summaries, unequal
from bdistil.storage.run_directory import FORMAT, RunDirectory


def row(method, seed, prefix, macs, accuracy, **more):
    costs = {"train_macs": 10 * macs, "seconds": 1.0, "test_calibration_error": 0.1}
    return {"method": method, "seed": seed, "prefix": prefix, "macs": macs, "test_accuracy": accuracy, **costs, **more}


@pytest.fixture
def rows():
    """Two methods, three seeds; the second one has its points elsewhere, on lines over log MACs."""
    found = []
    for seed, shift in enumerate((0.0, 0.01, 0.05)):
        found += [row("bdistil", seed, 1, 100, 0.60 + shift), row("bdistil", seed, 2, 1000, 0.80 + shift)]
        found += [row("joint", seed, 1, 10, 0.50), row("joint", seed, 2, 1000, 0.70 + shift / 2)]
    return found


def test_heights_are_interpolated_over_log_macs_and_end_five_percent_beyond_a_curve():
    points = [(10, 0.5), (1000, 0.7)]
    assert height_at(points, 100) == pytest.approx(0.6)
    assert height_at(points, 1049) == pytest.approx(0.7)
    assert height_at(points, 1051) is None
    assert height_at(points, 9.4) is None


def test_differences_are_paired_over_seeds_with_an_interval_of_students_t(rows):
    first, second = differences(rows, "bdistil", "joint")
    gaps = [0.60 + s - (0.50 + (0.20 + s / 2) / 2) for s in (0.0, 0.01, 0.05)]
    mean = sum(gaps) / 3
    sd = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 2)
    half = 4.302652729911275 * sd / math.sqrt(3)  # t of 2 degrees of freedom, from a printed table
    assert (first.prefix, first.macs, first.seeds) == (1, 100, 3)
    assert (first.mean, first.low, first.high) == pytest.approx((mean, mean - half, mean + half))
    assert second.mean == pytest.approx(0.1 + 0.06 / 6)


def test_a_seed_that_only_one_method_has_is_left_out(rows):
    more = [*rows, row("bdistil", 3, 1, 100, 0.0), row("bdistil", 3, 2, 1000, 0.0)]
    assert differences(more, "bdistil", "joint") == differences(rows, "bdistil", "joint")


def test_one_seed_has_no_interval(rows):
    alone = [r for r in rows if r["seed"] == 0]
    assert all(math.isnan(d.low) for d in differences(alone, "bdistil", "joint"))


def test_areas_are_taken_in_the_range_that_all_curves_share(rows):
    assert common_range(rows) == (100, 1000)
    assert area([(10, 0.5), (1000, 0.7)], 100, 1000) == pytest.approx(0.65)
    joint = next(s for s in summaries(rows) if s.method == "joint")
    assert joint.area[0] == pytest.approx(sum(0.5 + 0.75 * (0.2 + s / 2) for s in (0.0, 0.01, 0.05)) / 3)


def test_training_costs_of_the_oracle_are_those_of_all_its_students(rows):
    oracle = [{**r, "method": "no_resched"} for r in rows if r["method"] == "joint"]
    by_method = {s.method: s for s in summaries([*rows, *oracle])}
    assert by_method["joint"].train_macs[0] == 10_000
    assert by_method["no_resched"].train_macs[0] == 10_100


def test_falls_are_counted(rows):
    fallen = [{**r, "test_accuracy": 1 - r["test_accuracy"]} for r in rows if r["method"] == "bdistil"]
    assert summaries(fallen)[0].falls[0] == 1.0
    assert summaries(rows)[0].falls[0] == 0.0


def test_bands_are_means_and_deviations_of_each_prefix(rows):
    first, *_ = bands(rows, "bdistil", "macs", "test_accuracy")
    assert first == (1, 100, pytest.approx(0.62), pytest.approx(0.02645751), 3)


def test_prefixes_keep_their_numbers_where_one_seed_took_a_wider_class():
    """Seed 0 stops after a second student that costs more than the three of seed 1."""
    points = {0: [(100, 0.5), (400, 0.7)], 1: [(100, 0.5), (200, 0.6), (280, 0.65)]}
    rows = [
        row("bdistil", seed, number, *point) for seed, own in points.items() for number, point in enumerate(own, 1)
    ] + [row("joint", seed, number, macs, 0.4) for seed in points for number, macs in ((1, 100), (2, 400))]
    header, (ours, _) = prefix_table(rows)
    assert header == ["method", "1", "2", "3"]
    assert ours[2].endswith("@ 300")
    assert ours[3] == "65.00 @ 280 (1 of 2 seeds)"
    assert [(d.prefix, d.seeds, round(d.mean, 3)) for d in differences(rows, "bdistil", "joint")] == [
        (1, 2, 0.1), (2, 2, 0.25), (3, 1, 0.25)
    ]  # fmt: skip


def test_methods_without_a_common_range_have_no_area(rows):
    apart = [{**r, "macs": 1000 * r["macs"]} if r["method"] == "joint" else r for r in rows]
    assert common_range(apart) is None
    assert all(math.isnan(figure) for summary in summaries(apart) for figure in summary.area)


def test_prefixes_of_equal_macs_are_one_point(rows):
    """As students have whose widths are rounded: to a multiple of 8, or to heads."""
    equal = [{**r, "method": "no_resched", "prefix": 3} for r in rows if (r["method"], r["prefix"]) == ("joint", 2)]
    oracle = [{**r, "method": "no_resched"} for r in rows if r["method"] == "joint"]
    twice = [*rows, *oracle, *({**r, "macs": 300, "prefix": n} for r in equal for n in (3, 4))]
    found = {s.method: s for s in summaries(twice)}
    assert 0 < found["no_resched"].area[0] < 1
    assert area([(10, 0.4), (10, 0.6), (1000, 0.7)], 10, 1000) == pytest.approx(0.6)
    assert height_at([(10, 0.4), (10, 0.6), (1000, 0.7)], 10) == pytest.approx(0.5)


def test_a_figure_that_is_not_a_number_has_no_difference(rows):
    lost = [{**r, "test_accuracy": math.nan} if (r["method"], r["seed"]) == ("joint", 1) else r for r in rows]
    assert all(math.isnan(d.mean) and math.isnan(d.low) for d in differences(lost, "bdistil", "joint"))
    assert [line[1] for line in difference_table(lost, "bdistil")[1]] == ["–", "–"]


def test_a_seed_that_stopped_early_goes_on_flat_in_the_area(rows):
    early = [r for r in rows if (r["method"], r["seed"], r["prefix"]) != ("bdistil", 0, 2)]
    assert common_range(early) == (100, 1000)
    first, *others = areas = [s.area[0] * 3 for s in (summaries(early)[0], summaries(rows)[0])]
    assert areas[0] == pytest.approx(0.60 + 0.71 + 0.75)
    assert first < others[0]


def finish(cell, output, rungs, figures):
    """A finished cell, as far as `gather` reads it."""
    run = RunDirectory(cell.folder(output))
    for number, rung in enumerate(rungs):
        run.folder(number).mkdir(parents=True)
        (run.folder(number) / "round.json").write_text(json.dumps({"format": FORMAT, "rung": asdict(rung)}))
    run.write("figures", figures)


def test_of_two_losses_the_one_that_is_better_on_validation_counts(tmp_path):
    cells = [Cell("no_resched", 0, name, prefix=2) for name in ("no_resched-2", "no_resched-2-game")]
    wide = (Rung(0, width=2.0),)
    costs = {"prefix": 1, "macs": 5, "train_macs": 50, "seconds": 1.5}
    for cell, val, test in zip(cells, (0.5, 0.6), (0.9, 0.1), strict=True):
        finish(cell, tmp_path, wide, [{**costs, "val_accuracy": val, "test_accuracy": test}])
    for order in (cells, cells[::-1]):
        (kept,) = gather(tmp_path, order, (), {wide: 2.0})
        assert (kept["cell"], kept["prefix"], kept["latency_ms"]) == ("no_resched-2-game", 2, 2.0)
        assert (kept["train_macs"], kept["seconds"]) == (100, 3.0)  # of both


def test_latencies_are_those_of_the_classes_that_a_run_took(tmp_path):
    """Of a round that was rejected in its first class, and of joint training, which trains the planned ones."""
    planned, taken = (Rung(0), Rung(1)), (Rung(0), Rung(2, "hidden"))
    cells = [Cell("bdistil", 0, "bdistil"), Cell("joint", 0, "joint", kind="joint"), TEACHER]
    figures = [{"prefix": n, "macs": n, "val_accuracy": 0.5, "test_accuracy": 0.5} for n in (1, 2)]
    for cell, rungs, count in zip(cells, (taken, (), ()), (2, 2, 1), strict=True):
        finish(cell, tmp_path, rungs, figures[:count])
    rows = gather(tmp_path, cells, planned, {planned[:1]: 1.0, planned: 2.0, taken: 3.0})
    assert [row["latency_ms"] for row in rows] == [1.0, 3.0, 1.0, 2.0, None]


def test_students_whose_macs_are_off_are_named(rows):
    oracle = [{**r, "method": "no_resched", "macs": r["macs"] * 1.04} for r in rows if r["method"] == "bdistil"]
    assert unequal([*rows, *oracle]) == []
    oracle[1]["macs"] = 1060
    assert unequal([*rows, *oracle]) == ["1,060 for 1,000 (prefix 2, seed 0)"]
    assert unequal(oracle) == []
