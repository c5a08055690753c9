"""The table of a comparison, with a row per method, seed and prefix, and statistics over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t

from bdistil.comparison.methods import Cell
from bdistil.comparison.students import Rungs
from bdistil.metrics.curve import area_under_curve, merge_points, violations_of_monotony
from bdistil.models.student import Rung
from bdistil.storage.run_directory import RunDirectory

Row = Mapping[str, Any]
Point = tuple[float, float]
SLACK = 0.05  # relative distance in MACs by which a curve is extended beyond its ends
CONFIDENCE = 0.95
TOLERANCE = 0.05  # relative difference allowed between the MACs of a prefix and of its single student


def rungs_of(output: Path, cell: Cell, planned: Rungs) -> Rungs:
    """The classes of the students of a finished cell; those of joint training are as planned."""
    run = RunDirectory(cell.folder(output))
    if cell.kind != "rounds":
        return planned if cell.kind == "joint" else ()
    return tuple(Rung(**run.record(number)["rung"]) for number in range(run.committed()))


def gather(
    output: Path, cells: Sequence[Cell], planned: Rungs, latencies: Mapping[Rungs, float]
) -> list[dict[str, Any]]:
    """Collects the rows of all finished cells; of students that differ only in the loss, keeps the best on validation.

    The training costs of all of them are added up, as the best one was selected by training the others.

    Args:
        output: folder of the comparison.
        cells: cells of the comparison.
        planned: the classes of the recipe's students.
        latencies: result of `bdistil.comparison.students.latencies`.
    """
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for cell in cells:
        rungs = rungs_of(output, cell, planned)
        for row in RunDirectory(cell.folder(output)).read("figures") or []:
            number = cell.prefix or row["prefix"]
            key = (cell.method, cell.seed, number)
            latency = latencies[rungs[: row["prefix"]]] if rungs else None
            new = {
                "method": cell.method, "seed": cell.seed, "cell": cell.name, **row, "prefix": number,
                "latency_ms": latency,
            }  # fmt: skip
            if (old := found.get(key)) is not None:
                spent = {name: old[name] + new[name] for name in ("train_macs", "seconds")}
                new = {**(new if new["val_accuracy"] > old["val_accuracy"] else old), **spent}
            found[key] = new
    return list(found.values())


def unequal(rows: Sequence[Row]) -> list[str]:
    """Descriptions of `no_resched` students whose MACs differ too much from those of their bdistil prefix."""
    goals = {(row["seed"], row["prefix"]): row["macs"] for row in rows if row["method"] == "bdistil"}
    pairs = ((row, goals.get((row["seed"], row["prefix"]))) for row in rows if row["method"] == "no_resched")
    return [
        f"{row['macs']:,} for {goal:,} (prefix {row['prefix']}, seed {row['seed']})"
        for row, goal in pairs
        if goal and abs(row["macs"] / goal - 1) > TOLERANCE
    ]


def methods_of(rows: Sequence[Row]) -> list[str]:
    """The methods in the order of the rows, without the teacher."""
    return [method for method in dict.fromkeys(row["method"] for row in rows) if method != "teacher"]


def seeds_of(rows: Sequence[Row]) -> int:
    """Number of seeds of a comparison; the teacher has one."""
    return len({row["seed"] for row in rows if row["method"] != "teacher"})


def curves(rows: Sequence[Row], method: str, x: str = "macs", y: str = "test_accuracy") -> dict[int, list[Point]]:
    """The points of a method by seed, in ascending order of x; points without x or y are omitted."""
    found: dict[int, list[Point]] = {}
    for row in rows:
        if row["method"] == method and row.get(x) and row.get(y) is not None:
            found.setdefault(row["seed"], []).append((row[x], row[y]))
    return {seed: sorted(points) for seed, points in found.items()}


class Band(NamedTuple):
    """A prefix over the seeds that have it: its number, mean x, mean y, and sd of y."""

    prefix: int
    x: float
    mean: float
    sd: float
    seeds: int


def bands(rows: Sequence[Row], method: str, x: str, y: str) -> list[Band]:
    """The band of every prefix of a method, in their order."""
    groups: dict[int, list[Point]] = {}
    for row in rows:
        if row["method"] == method and row.get(x) and row.get(y) is not None:
            groups.setdefault(row["prefix"], []).append((row[x], row[y]))
    return sorted(
        Band(prefix, statistics.fmean(a for a, _ in points), *mean_sd([b for _, b in points]), len(points))
        for prefix, points in groups.items()
    )


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; the latter is NaN for a single value, both are NaN if a value is.

    Example:
        >>> mean_sd([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    if any(map(math.isnan, values)):  # `statistics` fails on NaN
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def height_at(points: Sequence[Point], macs: float) -> float | None:
    """Height of a curve at a number of MACs, interpolated over log MACs; None outside of its range.

    Example:
        >>> height_at([(10, 0.5), (1000, 0.7)], 100), height_at([(10, 0.5), (1000, 0.7)], 2000)
        (0.6, None)
    """
    first, last = points[0][0], points[-1][0]
    if not first * (1 - SLACK) <= macs <= last * (1 + SLACK):
        return None
    costs, heights = merge_points(points)  # students of some widths have equal MACs
    return round(float(np.interp(np.log(macs), np.log(costs), heights)), 12)


class Difference(NamedTuple):
    """Paired difference in accuracy at the MACs of a prefix: its mean over seeds, and a 95 % interval of the mean."""

    prefix: int
    macs: float
    mean: float
    low: float
    high: float
    seeds: int


def differences(rows: Sequence[Row], method: str, other: str, y: str = "test_accuracy") -> list[Difference]:
    """Score differences between a method and another at the MACs of its own prefixes, paired by seed.

    The interval for the mean difference over the seeds is based on Student's t-distribution.
    """
    theirs, pairs = curves(rows, other, y=y), dict[int, list[Point]]()
    for row in rows:
        if row["method"] == method and row["seed"] in theirs and row.get(y) is not None:
            height = height_at(theirs[row["seed"]], row["macs"])
            if height is not None:
                pairs.setdefault(row["prefix"], []).append((row["macs"], row[y] - height))
    found = []
    for prefix, points in sorted(pairs.items()):
        gaps = [gap for _, gap in points]
        mean, half = statistics.fmean(gaps), _half_interval(gaps)
        macs = statistics.fmean(cost for cost, _ in points)
        found.append(Difference(prefix, macs, mean, mean - half, mean + half, len(points)))
    return found


def _half_interval(values: Sequence[float]) -> float:
    if len(values) < 2 or any(map(math.isnan, values)):  # `statistics` fails
        return math.nan
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def common_range(rows: Sequence[Row]) -> tuple[float, float] | None:
    """The range of MACs that the curves of all methods have in common; None if it is empty.

    The range of a method ends at its largest prefix of any seed: boosting may stop earlier with other seeds, whose last
    prefix then also gives the score at larger MACs.
    """
    found = [list(lines.values()) for method in methods_of(rows) if (lines := curves(rows, method))]
    low = max((points[0][0] for lines in found for points in lines), default=0.0)
    high = min((max(points[-1][0] for points in lines) for lines in found), default=0.0)
    return (low, high) if low < high else None


def area(points: Sequence[Point], low: float, high: float) -> float:
    """Mean height of a curve between two numbers of MACs, over log MACs; constant beyond its last point.

    Example:
        >>> round(area([(1, 0.5), (100, 0.7)], 10, 100), 3)
        0.65
    """
    costs, heights = merge_points(points)
    inside = [low, *(x for x in costs if low < x < high), high]
    return area_under_curve(inside, np.interp(np.log(inside), np.log(costs), heights).tolist())


class Summary(NamedTuple):
    """Statistics of a method over the seeds as (mean, sd); area is NaN if the methods have no common range of MACs."""

    method: str
    seeds: int
    macs: float
    accuracy: tuple[float, float]
    area: tuple[float, float]
    calibration_error: tuple[float, float]
    falls: tuple[float, float]
    train_macs: tuple[float, float]
    seconds: tuple[float, float]


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Statistics of each method: scores of its largest prefix, area, falls of its curve, and training costs.

    A fall is a prefix that is less accurate than the previous one. Training costs cover all prefixes of a method; for
    `no_resched` they are summed over all its students, including those with the worse loss.
    """
    shared = common_range(rows)
    return [_summary(rows, method, shared) for method in methods_of(rows)]


def _summary(rows: Sequence[Row], method: str, shared: tuple[float, float] | None) -> Summary:
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        if row["method"] == method:
            by_seed.setdefault(row["seed"], []).append(row)
    lines = [sorted(own, key=lambda row: row["prefix"]) for own in by_seed.values()]
    last = [line[-1] for line in lines]
    areas = [area(points, *shared) if shared else math.nan for points in curves(rows, method).values()]
    errors = [row["test_calibration_error"] for row in last if row["test_calibration_error"] is not None]

    def total(key: str) -> list[float]:
        return [sum(row[key] for row in line) if method == "no_resched" else line[-1][key] for line in lines]

    return Summary(
        method,
        len(lines),
        statistics.fmean(row["macs"] for row in last),
        mean_sd([row["test_accuracy"] for row in last]),
        mean_sd(areas),
        mean_sd(errors) if errors else (math.nan, math.nan),
        mean_sd([float(violations_of_monotony([row["test_accuracy"] for row in line])) for line in lines]),
        mean_sd(total("train_macs")),
        mean_sd(total("seconds")),
    )
