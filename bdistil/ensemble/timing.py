"""Seconds of stages, of asking a rule, of leaving a batch and of schedules, measured warm on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bdistil.ensemble.budget import Exits
from bdistil.ensemble.calibration import BatchTimes
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.exit_rules import Rule
from bdistil.ensemble.prediction import Answers
from bdistil.ensemble.stacking import GROUPS, ONE
from bdistil.errors import UserError

BATCHES = (1, 8, 64, 256)
SECONDS = 0.3  # for the repeats of one batch size, beyond the first `LEAST`
LEAST, MOST = 7, 100
TYPICAL, LATE = 0.25, 0.99  # quantiles; other programs disturb the lower quartile less than a median
WORTH = 0.97  # a schedule is chosen when it takes less than this of one after the other
TOLERANCE = 1e-5


def measure_times(
    ensemble: ProgressiveEnsemble, x: Tensor, *, rule: Rule = "max_prob", batches: Sequence[int] = BATCHES
) -> tuple[BatchTimes, ...]:
    """Times by batch size, smallest first.

    Args:
        ensemble: on the device to be measured.
        x: samples (N, ...) on that device, repeated where a batch needs more.
        rule: whose question is timed.
        batches: sizes.
    """
    return tuple(_at(ensemble, _rows(x, batch), rule) for batch in sorted(batches))


def _rows(x: Tensor, batch: int) -> Tensor:
    return x[torch.arange(batch, device=x.device) % len(x)]


def _at(ensemble: ProgressiveEnsemble, x: Tensor, rule: Rule) -> BatchTimes:
    rows: list[list[float]] = []
    exits = Exits(rule, (0.5,) * len(ensemble), (1.5,) * len(ensemble))
    began = time.perf_counter()
    with torch.no_grad():
        _time_once(ensemble, x, exits)  # warm
        while len(rows) < LEAST or (len(rows) < MOST and time.perf_counter() - began < SECONDS):
            rows.append(_time_once(ensemble, x, exits))
        *stages, check, compact = zip(*rows, strict=True)
        typical, late = (tuple(_quantile(stage, part) for stage in stages) for part in (TYPICAL, LATE))
        schedules = _schedules(ensemble, x)
    fastest = min(schedules, key=lambda name: schedules[name] / (1 if name == ONE else WORTH))
    return BatchTimes(
        len(x), typical, late, _quantile(check, TYPICAL), _quantile(compact, TYPICAL), schedules, fastest
    )  # fmt: skip


def _quantile(seconds: Sequence[float], part: float) -> float:
    return sorted(seconds)[int(part * (len(seconds) - 1))]


def _timed(function: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def _time_once(ensemble: ProgressiveEnsemble, x: Tensor, exits: Exits) -> list[float]:
    """Seconds of each stage, of one question, of taking half of the batch out."""
    runner = ensemble.stage_runner(x, count_votes=exits.rule == "agreement")  # the check of x belongs to no stage
    seconds = [_timed(lambda: runner.step().logits, x.device) for _ in range(len(ensemble))]
    # The question comes right after a student, when its own code and numbers are no longer in the cache.
    runner = ensemble.stage_runner(x, count_votes=exits.rule == "agreement")
    runner.advance()
    answers = Answers(runner)
    seconds.append(_timed(lambda: answers.decided(exits), x.device))
    half = np.arange(len(x)) % 2 == 0
    seconds.append(_timed(lambda: answers.compact(half), x.device))
    return seconds


def _schedules(ensemble: ProgressiveEnsemble, x: Tensor) -> dict[str, float]:
    """Seconds of all stages by schedule, taken in turns: those that the students can run with the same numbers."""
    expected = ensemble(x, schedule=ONE)
    names = [ONE, *(name for name in GROUPS if len(ensemble) > 1 and _same(ensemble, x, name, expected))]
    turns: list[list[float]] = []
    began = time.perf_counter()
    while len(turns) < LEAST or (len(turns) < MOST and time.perf_counter() - began < SECONDS):
        turns.append([_timed(lambda: ensemble(x, schedule=name), x.device) for name in names])  # noqa: B023
    return {name: _quantile(seconds, TYPICAL) for name, seconds in zip(names, zip(*turns, strict=True), strict=True)}


def _same(ensemble: ProgressiveEnsemble, x: Tensor, name: str, expected: Tensor) -> bool:
    try:
        found = ensemble(x, schedule=name)
    except (UserError, RuntimeError, NotImplementedError):  # other shapes, or an operator that cannot be stacked
        return False
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
