"""Measures the seconds of stages, exit checks, compaction and schedules, after a warm-up, on the current device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from bdistil.ensemble.budget import Rule
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.stages import time_of, without_onednn
from bdistil.runner.exits import Exits, measure_stages
from bdistil.runner.stage_clock import BatchTimes, Guard
from bdistil.utils.trees import device_of, row_count, take_rows

BATCHES = (1, 2, 8, 16, 64, 256)  # torch convolves one sample by itself twice as fast as two
SECONDS = 0.3  # for the repeats of one batch size, beyond the first `LEAST`
LEAST, MOST = 7, 100
TYPICAL, LATE = 0.25, 0.99  # quantiles; other programs disturb the lower quartile less than a median
WORTH = 0.97  # bodies run together, or without oneDNN, only if that takes less than this share of the time
TOLERANCE = 1e-5


def measure_times(
    ensemble: ProgressiveEnsemble, x: Any, *, rule: Rule = "max_prob", batches: Sequence[int] = BATCHES
) -> tuple[BatchTimes, ...]:
    """Measures an ensemble at several batch sizes.

    Args:
        ensemble: the ensemble, on the device to be measured.
        x: samples (N, ...) on that device, repeated if a batch needs more.
        rule: exit rule whose check is timed.
        batches: batch sizes.

    Returns:
        Times by batch size, smallest first.
    """
    rows = [torch.arange(batch, device=device_of(x)) % row_count(x) for batch in sorted(batches)]
    return tuple(_times_of(ensemble, take_rows(x, index), rule) for index in rows)


@torch.no_grad()
def _times_of(ensemble: ProgressiveEnsemble, x: Any, rule: Rule) -> BatchTimes:
    native, schedules = _times_of_all(ensemble, x)
    fastest = min(schedules, key=lambda name: schedules[name] / (1 if name == "one" else WORTH))
    exits = Exits(rule, (0.5,) * len(ensemble), (1.5,) * len(ensemble))
    plan, now = ensemble.exit_plan(exits, Guard(None, len(ensemble))), partial(time_of, device_of(x))
    measure = partial(measure_stages, partial(ensemble.stage_runner, x), plan, now)
    with without_onednn() if native else nullcontext():
        measure()  # warm-up
        rows = _repeated(measure)
    *stages, check, compact = _quantile(rows, TYPICAL)
    late = _quantile(rows[:, : len(ensemble)], LATE)
    return BatchTimes(row_count(x), tuple(stages), tuple(late), check, compact, schedules, fastest, native)


def _times_of_all(ensemble: ProgressiveEnsemble, x: Any) -> tuple[bool, dict[str, float]]:
    """Whether the stages are faster without oneDNN, and the seconds of all stages by schedule."""

    def native() -> None:
        with without_onednn():
            ensemble(x, schedule="one")

    runs: dict[str, Callable[[], object]] = {"one": partial(ensemble, x, schedule="one")}
    if device_of(x).type == "cpu":
        runs["native"] = native
    if len(ensemble) > 1 and _supports_all(ensemble, x):
        runs["all"] = partial(ensemble, x, schedule="all")
    turns = _repeated(lambda: [_timed(run, device_of(x)) for run in runs.values()])
    seconds = dict(zip(runs, _quantile(turns, TYPICAL), strict=True))
    without = seconds.pop("native", seconds["one"])
    faster = without < WORTH * seconds["one"]
    return faster, {**seconds, "one": without} if faster else seconds


def _repeated(measure: Callable[[], list[float]]) -> np.ndarray[Any, Any]:
    """Repeats a measurement that returns several times; stops at enough repeats or elapsed time: (repeats, times)."""
    rows: list[list[float]] = []
    began = time.perf_counter()
    while len(rows) < LEAST or (len(rows) < MOST and time.perf_counter() - began < SECONDS):
        rows.append(measure())
    return np.array(rows)


def _quantile(rows: np.ndarray[Any, Any], part: float) -> list[float]:
    found: list[float] = np.quantile(rows, part, axis=0, method="lower").tolist()
    return found


def _timed(function: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    return time_of(device) - started


def _supports_all(ensemble: ProgressiveEnsemble, x: Any) -> bool:
    """Whether the bodies can run together and give the same logits as one after the other."""
    expected = ensemble(x, schedule="one")
    try:
        found = ensemble(x, schedule="all")
    except Exception:  # other shapes, an operator without a vmap rule, whatever user code raises under vmap
        return False
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
