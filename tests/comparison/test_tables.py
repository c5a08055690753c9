"""What a comparison says over the seeds: points, ranges, differences with their intervals, and which cells count."""

import json
import math

import pytest

from bdistil.comparison.methods import Cell
from bdistil.comparison.tables import area, bands, common_range, differences, gather, height_at, summaries


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
    assert first == (100, pytest.approx(0.62), pytest.approx(0.02645751), 3)


def test_a_seed_that_stopped_early_goes_on_flat_in_the_area(rows):
    early = [r for r in rows if (r["method"], r["seed"], r["prefix"]) != ("bdistil", 0, 2)]
    assert common_range(early) == (100, 1000)
    first, *others = areas = [s.area[0] * 3 for s in (summaries(early)[0], summaries(rows)[0])]
    assert areas[0] == pytest.approx(0.60 + 0.71 + 0.75)
    assert first < others[0]


def test_of_two_losses_the_one_that_is_better_on_validation_counts(tmp_path):
    cells = [Cell("no_resched", 0, name, 1, prefix=2) for name in ("no_resched-2", "no_resched-2-game")]
    for cell, val, test in zip(cells, (0.5, 0.6), (0.9, 0.1), strict=True):
        folder = cell.folder(tmp_path)
        folder.mkdir(parents=True)
        figures = [{"prefix": 1, "macs": 5, "val_accuracy": val, "test_accuracy": test}]
        (folder / "figures.json").write_text(json.dumps(figures))
    (kept,) = gather(tmp_path, cells, {"no_resched": [1.0, 2.0]})
    assert (kept["cell"], kept["prefix"], kept["latency_ms"]) == ("no_resched-2-game", 2, 2.0)
