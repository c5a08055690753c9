"""Measures the seconds of stages, exit checks, compaction and schedules, after a warm-up, on the current device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bdistil.ensemble.budget import Rule
from bdistil.ensemble.calibration import Exits
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.prediction import ExitPlan, time_of
from bdistil.ensemble.stage_clock import BatchTimes, Guard
from bdistil.errors import UserError
from bdistil.utils.trees import device_of, row_count, take_rows

BATCHES = (1, 2, 8, 64, 256)  # torch convolves one sample by itself twice as fast as two
SECONDS = 0.3  # for the repeats of one batch size, beyond the first `LEAST`
LEAST, MOST = 7, 100
TYPICAL, LATE = 0.25, 0.99  # quantiles; other programs disturb the lower quartile less than a median
WORTH = 0.97  # bodies run together where that takes less than this share of one after the other
TOLERANCE = 1e-5


def measure_times(
    ensemble: ProgressiveEnsemble, x: Any, *, rule: Rule = "max_prob", batches: Sequence[int] = BATCHES
) -> tuple[BatchTimes, ...]:
    """Measures an ensemble at several batch sizes.

    Args:
        ensemble: on the device to be measured.
        x: samples (N, ...) on that device, repeated where a batch needs more.
        rule: exit rule whose check is timed.
        batches: sizes.

    Returns:
        Times by batch size, smallest first.
    """
    rows = [torch.arange(batch, device=device_of(x)) % row_count(x) for batch in sorted(batches)]
    return tuple(_times_of(ensemble, take_rows(x, index), rule) for index in rows)


@torch.no_grad()
def _times_of(ensemble: ProgressiveEnsemble, x: Any, rule: Rule) -> BatchTimes:
    exits = Exits(rule, (0.5,) * len(ensemble), (1.5,) * len(ensemble))
    plan = ExitPlan(exits, float(ensemble.scale), ensemble.calibration.weights, Guard(None, len(ensemble)))
    _time_once(ensemble, x, plan)  # warm-up
    rows = _repeated(lambda: _time_once(ensemble, x, plan))
    *stages, check, compact = _quantile(rows, TYPICAL)
    names = ["one", "all"] if len(ensemble) > 1 and _supports_all(ensemble, x) else ["one"]
    turns = _repeated(lambda: [_timed(partial(ensemble, x, schedule=name), device_of(x)) for name in names])
    schedules = dict(zip(names, _quantile(turns, TYPICAL), strict=True))
    fastest = min(names, key=lambda name: schedules[name] / (1 if name == "one" else WORTH))
    late = _quantile(rows[:, : len(ensemble)], LATE)
    return BatchTimes(row_count(x), tuple(stages), tuple(late), check, compact, schedules, fastest)


def _repeated(measure: Callable[[], list[float]]) -> np.ndarray[Any, Any]:
    """Repeats a measurement of several times, until there are enough repeats or the time is up: (repeats, times)."""
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


def _time_once(ensemble: ProgressiveEnsemble, x: Any, plan: ExitPlan) -> list[float]:
    """Seconds of each stage, of one check of the exit rule, and of removing half of the batch."""
    count_votes, device = plan.rule == "agreement", device_of(x)
    runner = ensemble.stage_runner(x, count_votes=count_votes)  # checks x, which belongs to no stage
    seconds = [_timed(lambda: runner.step().logits, device) for _ in range(len(ensemble))]
    # The check follows a student, as in a prediction: its own code and numbers are then no longer in the cache.
    runner = ensemble.stage_runner(x, count_votes=count_votes)
    runner.advance()
    answers = plan.answers(runner)
    answers.add()
    seconds.append(_timed(answers.check, device))
    if runner.samples > 1:
        answers.open = np.arange(runner.samples) % 2 == 0
        seconds.append(_timed(answers.remove, device))
    else:  # there is nothing to remove from a batch of one
        seconds.append(0.0)
    return seconds


def _supports_all(ensemble: ProgressiveEnsemble, x: Any) -> bool:
    """Whether the bodies can run together, with the same logits."""
    expected = ensemble(x, schedule="one")
    try:
        found = ensemble(x, schedule="all")
    except (UserError, RuntimeError, NotImplementedError):  # other shapes, or an operator without a vmap rule
        return False
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
