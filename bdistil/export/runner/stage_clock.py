"""Decisions from measured stage times: whether to check exits or remove samples, and whether a stage ends in time."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALLOWANCE = 0.02  # cost of exit checks relative to all stages, where the share of decided samples is unknown


@dataclass(frozen=True)
class BatchTimes:
    """Seconds measured with a batch of one size: an entry of `times` in the manifest.

    Attributes:
        batch: samples.
        stages: median of each stage.
        late: 95th percentile of each stage, used for deadlines.
        check: of one evaluation of an exit rule.
        compact: of one removal of decided samples from the batch.
    """

    batch: int
    stages: list[float]
    late: list[float]
    check: float
    compact: float


class StageClock:
    """Measured times of an ensemble on this machine.

    Args:
        times: by batch size, smallest first, at least one.
    """

    def __init__(self, times: Sequence[BatchTimes]) -> None:
        self.times, self.sizes = times, [t.batch for t in times]

    def at(self, batch: float, read: Callable[[BatchTimes], float]) -> float:
        """A measured time at any batch size: linear between the measured sizes, and beyond the largest.

        Args:
            batch: samples; a fraction below 1 is an expected number of them, and scales the time.
            read: the time of one size, in seconds.
        """
        place = bisect_left(self.sizes, batch)
        if place == 0:
            return read(self.times[0]) * min(1.0, batch / self.sizes[0] if batch < 1 else 1.0)
        if place == len(self.sizes):
            return read(self.times[-1]) * batch / self.sizes[-1]
        low, high = self.times[place - 1], self.times[place]
        part = (batch - low.batch) / (high.batch - low.batch)
        return read(low) * (1 - part) + read(high) * part

    def stage(self, number: int, batch: float) -> float:
        """Median seconds of a stage, from 0."""
        return self.at(batch, lambda t: t.stages[number])

    def late(self, number: int, batch: float) -> float:
        """95th percentile of the seconds of a stage, from 0."""
        return self.at(batch, lambda t: t.late[number])

    def stages_to_check(self, batch: int, allowed: int, shares: Sequence[float] | None) -> int:
        """Number of first stages after which to check the exit rule; 0 where that costs more than it saves.

        Args:
            batch: samples.
            allowed: stages that may run.
            shares: expected share of samples decided at each stage; None allows checks to cost `ALLOWANCE`.
        """
        check = self.at(batch, lambda t: t.check)
        whole = sum(self.stage(number, batch) for number in range(allowed))
        if shares is None:
            return min(allowed - 1, int(ALLOWANCE * whole / check)) if check else allowed - 1
        extra = check + (self.at(batch, lambda t: t.compact) if batch > 1 else 0.0)
        left, expected = 1.0, 0.0
        for number in range(allowed):
            expected += self.stage(number, batch * left)
            expected += extra * min(1.0, batch * left) if number + 1 < allowed else 0.0
            left = max(left - shares[number], 0.0)
        return allowed - 1 if expected < whole else 0

    def removal_pays(self, number: int, batch: int, left: int, allowed: int) -> bool:
        """Whether the stages after `number` save more on the samples left than the removal of the others costs."""
        saved = sum(self.stage(n, batch) - self.stage(n, left) for n in range(number + 1, allowed))
        return saved > self.at(batch, lambda t: t.compact)


class Deadline:
    """Decides whether one more stage would end in time.

    With measured times, a stage is expected to take its 95th percentile, times the factor by which the stages so far
    were slower than measured. Without them, it is expected to take as long as the longest stage so far.

    Args:
        seconds: from now.
        clock: measured times, or None.
    """

    def __init__(self, seconds: float, clock: StageClock | None) -> None:
        self.seconds, self.clock = seconds, clock
        self.started = self.begun = time.perf_counter()
        self.longest = self.spent = self.expected = 0.0

    def allows(self, number: int, batch: int) -> bool:
        """Whether a stage, from 0, may start now; the first always may."""
        self.begun = time.perf_counter()
        if number == 0:
            return True
        need = self.longest
        if self.clock is not None:
            need = self.clock.late(number, batch) * max(1.0, self.spent / self.expected)
        return self.begun - self.started + need <= self.seconds

    def done(self, number: int, batch: int) -> None:
        """Records the end of a stage that `allows` let start."""
        taken = time.perf_counter() - self.begun
        self.longest, self.spent = max(self.longest, taken), self.spent + taken
        if self.clock is not None:
            self.expected += self.clock.late(number, batch)
