"""Decisions from measured times: whether to ask, whether leaving a batch pays, whether one more stage ends in time."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALLOWANCE = 0.02  # of all stages: what asking an exit rule may cost where the share of decided samples is not known


@dataclass(frozen=True)
class Times:
    """Seconds measured with a batch of one size: of each stage (usual, and 99th percentile), an exit rule, leaving.

    The arguments are those of an entry of `times` in the manifest.
    """

    batch: int
    stages: list[float]
    late: list[float]
    check: float
    compact: float


class Clock:
    """Measured times at any batch size: straight lines between the sizes that were measured."""

    def __init__(self, times: Sequence[Times]) -> None:
        self.times, self.sizes = times, [t.batch for t in times]

    def at(self, batch: float, read: Callable[[Times], float]) -> float:
        """A time in seconds; below the smallest batch, a part of it stands for how often there is one."""
        place = bisect_left(self.sizes, batch)
        if place == 0:
            return read(self.times[0]) * min(1.0, batch / self.sizes[0] if batch < 1 else 1.0)
        if place == len(self.sizes):
            return read(self.times[-1]) * batch / self.sizes[-1]
        low, high = self.times[place - 1], self.times[place]
        part = (batch - low.batch) / (high.batch - low.batch)
        return read(low) * (1 - part) + read(high) * part

    def stage(self, number: int, batch: float) -> float:
        """Median of a stage, from 0."""
        return self.at(batch, lambda t: t.stages[number])

    def stages_to_ask(self, batch: int, allowed: int, shares: Sequence[float] | None) -> int:
        """After how many of the first stages to ask the exit rule: none where that costs more than it saves."""
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

    def leaving_pays(self, number: int, batch: int, left: int, allowed: int) -> bool:
        """Do the stages after `number` save more on the samples that are left than taking the others out costs?"""
        saved = sum(self.stage(n, batch) - self.stage(n, left) for n in range(number + 1, allowed))
        return saved > self.at(batch, lambda t: t.compact)


class Deadline:
    """Says whether one more stage would end in time, also where this machine is slower than the one that measured."""

    def __init__(self, seconds: float | None, clock: Clock | None) -> None:
        self.seconds, self.clock = seconds, clock
        self.started = self.begun = time.perf_counter()
        self.longest = self.spent = self.expected = 0.0

    def allows(self, number: int, batch: int) -> bool:
        """May a stage, from 0, start with so many samples? The first always may."""
        if self.seconds is None:
            return True
        self.begun = time.perf_counter()
        if number == 0:
            return True
        need = self.longest
        if self.clock is not None:
            need = self.clock.at(batch, lambda t: t.late[number]) * max(1.0, self.spent / self.expected)
        return self.begun - self.started + need <= self.seconds

    def done(self, number: int, batch: int) -> None:
        """The stage has ended."""
        if self.seconds is None:
            return
        taken = time.perf_counter() - self.begun
        self.longest, self.spent = max(self.longest, taken), self.spent + taken
        if self.clock is not None:
            self.expected += self.clock.at(batch, lambda t: t.late[number])
