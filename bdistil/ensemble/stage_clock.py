"""Decisions from measured stage times: exit checks, removal of decided samples, and deadlines."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

# Cost of exit checks allowed, as a share of all stages, where the share of decided samples is unknown.
ALLOWANCE = 0.02


@dataclass(frozen=True)
class BatchTimes:
    """Seconds measured with a batch of one size, after a warm-up.

    Attributes:
        batch: samples.
        stages: of each stage, run one after the other; like all but `late` the lower quartile of the repeats.
        late: 99th percentile of each stage, used for deadlines.
        check: of one evaluation of an exit rule.
        compact: of one removal of decided samples from the batch.
        schedules: of all stages, by schedule; without those that the students do not support.
        schedule: the one to use where all stages run.
    """

    batch: int
    stages: tuple[float, ...]
    late: tuple[float, ...]
    check: float
    compact: float
    schedules: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "one"


def at_batch(times: Sequence[BatchTimes], batch: float, read: Callable[[BatchTimes], float]) -> float:
    """A time at any batch size: interpolated linearly between the measured sizes, proportional beyond the largest.

    Below the smallest size it is constant down to 1 sample. A batch below 1 is the expected number of samples; the time
    is proportional to it.

    Args:
        times: by batch size, smallest first.
        batch: samples.
        read: returns the time at one measured size, in seconds.
    """
    sizes = [t.batch for t in times]
    place = bisect_left(sizes, batch)
    if place == 0:
        return read(times[0]) * batch / sizes[0] if batch < 1 else read(times[0])
    if place == len(sizes):
        return read(times[-1]) * batch / sizes[-1]
    low, high = times[place - 1], times[place]
    part = (batch - low.batch) / (high.batch - low.batch)
    return read(low) * (1 - part) + read(high) * part


class StageClock:
    """Measured times of an ensemble on its device, and decisions from them.

    Args:
        times: by batch size, smallest first, at least one.
    """

    def __init__(self, times: Sequence[BatchTimes]) -> None:
        self.times = times
        self._until = {t.batch: (0.0, *accumulate(t.stages)) for t in times}  # seconds of the first stages
        self._checks: dict[Any, int] = {}  # a decision takes as long as a tiny student: cached

    def stage(self, number: int, batch: float) -> float:
        """Seconds of a stage, from 0."""
        return at_batch(self.times, batch, lambda t: t.stages[number])

    def late(self, number: int, batch: float) -> float:
        """99th percentile of the seconds of a stage, from 0."""
        return at_batch(self.times, batch, lambda t: t.late[number])

    def stages_to_check(self, batch: int, allowed: int, shares: tuple[float, ...] | None) -> int:
        """Number of first stages after which to check the exit rule; 0 where that costs more than it saves.

        Args:
            batch: samples.
            allowed: stages that may run.
            shares: expected share of samples decided at each stage; None allows checks to cost `ALLOWANCE`.
        """
        key = (batch, allowed, shares)
        if key not in self._checks:
            self._checks[key] = self._stages_to_check(*key)
        return self._checks[key]

    def _stages_to_check(self, batch: int, allowed: int, shares: tuple[float, ...] | None) -> int:
        check = at_batch(self.times, batch, lambda t: t.check)
        whole = sum(self.stage(number, batch) for number in range(allowed))
        if shares is None:
            return min(allowed - 1, int(ALLOWANCE * whole / check))
        extra = check + (at_batch(self.times, batch, lambda t: t.compact) if batch > 1 else 0.0)
        left, expected = 1.0, 0.0
        for number in range(allowed):
            more = extra if number + 1 < allowed else 0.0
            expected += self.stage(number, batch * left) + more * min(1.0, batch * left)
            left -= shares[number]
            left = max(left, 0.0)
        return allowed - 1 if expected < whole else 0

    def removal_pays(self, number: int, batch: int, left: int, allowed: int) -> bool:
        """Whether the stages after `number` save more on the samples left than the removal of the others costs."""

        def rest(t: BatchTimes) -> float:
            until = self._until[t.batch]
            return until[allowed] - until[number + 1]

        saved = at_batch(self.times, batch, rest) - at_batch(self.times, left, rest)
        return saved > at_batch(self.times, batch, lambda t: t.compact)


class Deadline:
    """Decides whether one more stage would end in time.

    With measured times, a stage is expected to take its 99th percentile, times the factor by which the stages so far
    were slower than measured. Without them, it is expected to take as long as the longest stage so far.

    Args:
        seconds: from `started`.
        clock: measured times, or None.
        now: returns the time in seconds.
        started: start of `seconds`, by `now`.
    """

    def __init__(self, seconds: float, clock: StageClock | None, now: Callable[[], float], started: float) -> None:
        self.seconds, self.clock, self.now = seconds, clock, now
        self.started = self.begun = started
        self.longest = self.spent = self.expected = 0.0

    def allows(self, number: int, batch: int) -> bool:
        """Whether a stage, from 0, may start now; the first always may."""
        self.begun = self.now()
        if number == 0:
            return True
        need = self.longest
        if self.clock is not None:
            need = self.clock.late(number, batch) * max(1.0, self.spent / self.expected)
        return self.begun - self.started + need <= self.seconds

    def done(self, number: int, batch: int) -> None:
        """Records the end of a stage that `allows` let start."""
        taken = self.now() - self.begun
        self.longest, self.spent = max(self.longest, taken), self.spent + taken
        if self.clock is not None:
            self.expected += self.clock.late(number, batch)
