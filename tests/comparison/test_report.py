"""The words and numbers of the report of a comparison: units of the task, seeds that lack a prefix, one seed alone."""

import pytest

from bdistil.comparison.report import difference_table, prefix_table, summary_table, text_report, write_comparison


def row(method, seed, prefix, macs, score):
    costs = {"train_macs": 10 * macs, "seconds": 1.0, "latency_ms": 0.1 * macs}
    figures = {"val_accuracy": score, "test_accuracy": score, "test_calibration_error": None}
    return {"method": method, "seed": seed, "prefix": prefix, "macs": macs, **costs, **figures}


@pytest.fixture
def rows():
    """Two methods, two seeds, a teacher; boosting stopped after the first round with seed 1."""
    found = [row("teacher", 0, 1, 9999, 0.9)]
    for seed in (0, 1):
        found += [row("bdistil", seed, n, 100 * n, 0.5 + 0.1 * n + 0.02 * seed) for n in range(1, 3 - seed)]
        found += [row("joint", seed, n, 100 * n, 0.5 + 0.05 * n) for n in (1, 2)]
    return found


def test_seeds_that_lack_a_prefix_are_told(rows):
    _, ((_, first, second), (_, *others)) = prefix_table(rows)
    assert (first, second) == ("61.00 ± 1.41 @ 100", "70.00 @ 200 (1 of 2 seeds)")
    assert all("seeds" not in other for other in others)
    _, lines = difference_table(rows, "bdistil")
    assert lines[1] == ["2 @ 200", "+10.00 (1 of 2 seeds)"]


def test_one_seed_alone_has_neither_deviation_nor_interval(rows):
    text = text_report([r for r in rows if r["seed"] == 0], "classification", {"seeds": 1})
    assert "| 1 @ 100 | +5.00 |" in text
    assert "nan" not in text


def test_no_difference_has_no_minus():
    same = [
        row(method, seed, 1, 100, 0.6 - (1e-9 if method == "bdistil" else 0))
        for method in ("bdistil", "joint")
        for seed in (0, 1)
    ]
    _, lines = difference_table(same, "bdistil")
    assert lines == [["1 @ 100", "+0.00 [+0.00, +0.00]"]]


def test_r2_is_no_percentage(rows, tmp_path):
    assert summary_table(rows, "regression")[1][0][3] == "0.660 ± 0.057"
    text = text_report(rows, "regression", {"seeds": 2})
    assert text.startswith("R² on the test part, mean ± sd over the seeds.\n\n*seeds 2; teacher 0.900*\n")
    assert "0.610 ± 0.014 @ 100" in text
    page = write_comparison(tmp_path, rows, "regression", "the recipe", {"seeds": 2}).read_text()
    assert "%" not in page[page.index("<h1>") : page.index("Reproduce")].replace("95 % intervals", "").replace(
        "100%", ""
    )


def test_accuracies_are_in_percent(rows, tmp_path):
    text = text_report(rows, "classification", {"seeds": 2})
    assert text.startswith("Accuracy on the test part in %, mean ± sd over the seeds.\n\n*seeds 2; teacher 90.00 %*\n")
    page = write_comparison(tmp_path, rows, "classification", "the recipe", {"options": "--a <b>"}).read_text()
    assert "teacher: 90.00 % on the test part" in page
    assert "options: --a &lt;b&gt;" in page
    assert "in percentage points" in page


def test_students_of_other_macs_are_told(rows, tmp_path):
    oracle = [{**r, "method": "no_resched", "macs": 2 * r["macs"]} for r in rows if r["method"] == "bdistil"]
    said = "no_resched is more than 5% off in MACs: 200 for 100 (prefix 1, seed 0); "
    assert said in text_report([*rows, *oracle], "classification", {})
    assert said in write_comparison(tmp_path, [*rows, *oracle], "classification", "the recipe", {}).read_text()
    assert "off in MACs" not in text_report(rows, "classification", {})
