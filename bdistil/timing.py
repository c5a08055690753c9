"""Seconds of stages, of asking a rule, of leaving a batch and of schedules, measured warm on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdistil.anytime import BatchTimes
from bdistil.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.exit_rules import Rule, sureness
from bdistil.schedules import GROUPS, ONE
from bdistil.walk import Walk

BATCHES = (1, 8, 64, 256)
SECONDS = 0.3  # for the repeats of one batch size, beyond the first `LEAST`
LEAST, MOST = 7, 60
TYPICAL, LATE = 0.25, 0.95  # quantiles; other programs disturb the lower quartile less than a median
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
    began = time.perf_counter()
    with torch.no_grad():
        _walk_through(ensemble, x, rule)  # warm
        while len(rows) < LEAST or (len(rows) < MOST and time.perf_counter() - began < SECONDS):
            rows.append(_walk_through(ensemble, x, rule))
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


def _walk_through(ensemble: ProgressiveEnsemble, x: Tensor, rule: Rule) -> list[float]:
    """Seconds of each stage, of one question, of taking half of the batch out."""
    walk = ensemble.walk(x, count_votes=rule == "agreement")
    stage = walk.step  # the check of x belongs to no stage
    seconds = [_timed(stage, x.device) for _ in range(len(ensemble))]
    seconds.append(_timed(lambda: _ask(walk, rule), x.device))
    half = torch.arange(0, len(x), 2, device=x.device)
    seconds.append(_timed(lambda: _leave(walk, half), x.device))
    return seconds


def _ask(walk: Walk, rule: Rule) -> int:
    assert walk.total is not None
    logits = walk.total * walk.factors[-1]
    return len((~(sureness(logits, rule, 1.5, walk.votes) >= 0.5)).nonzero().flatten())


def _leave(walk: Walk, rows: Tensor) -> None:
    """What a prediction does when samples leave: their answers are put aside, the rest goes on."""
    assert walk.total is not None
    answers = torch.empty_like(walk.total)
    answers[rows] = walk.total.index_select(0, rows)
    walk.keep(rows)


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
