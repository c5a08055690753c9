"""Decisions from measured stage times: is there time for one more stage, does leaving the batch pay?"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from bdistil.ensemble.calibration import BatchTimes

# What asking an exit rule may cost beside a run of all stages, where nobody knows how many samples it will decide.
ALLOWANCE = 0.02


def at_batch(times: Sequence[BatchTimes], batch: float, read: Callable[[BatchTimes], float]) -> float:
    """A measured time at any batch size: straight lines between the sizes measured, and on from the last of them.

    Below the smallest size a part of a batch stands for how often there is one: the time falls to 0 with it.

    Args:
        times: by batch size, smallest first.
        batch: samples.
        read: the figure of one size, in seconds.
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
    """Measured times of an ensemble on the device at hand.

    Args:
        times: by batch size, smallest first, at least one.
    """

    def __init__(self, times: Sequence[BatchTimes]) -> None:
        self.times = times
        self._until = {t.batch: (0.0, *accumulate(t.stages)) for t in times}  # seconds of the first stages
        self._asked: dict[Any, int] = {}  # what was decided once: deciding takes as long as a tiny student

    def stage(self, number: int, batch: float) -> float:
        """Seconds of a stage, from 0."""
        return at_batch(self.times, batch, lambda t: t.stages[number])

    def late(self, number: int, batch: float) -> float:
        """Seconds that a stage, from 0, keeps to in 99 of 100 runs."""
        return at_batch(self.times, batch, lambda t: t.late[number])

    def stages_to_ask(self, batch: int, allowed: int, shares: tuple[float, ...] | None) -> int:
        """After how many of the first stages to ask the exit rule: none where that costs more than it saves.

        Args:
            batch: samples.
            allowed: stages that may run.
            shares: of samples decided at each stage; where it is not known, asking may cost `ALLOWANCE` of all stages.
        """
        key = (batch, allowed, shares)
        if key not in self._asked:
            self._asked[key] = self._stages_to_ask(*key)
        return self._asked[key]

    def _stages_to_ask(self, batch: int, allowed: int, shares: tuple[float, ...] | None) -> int:
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

    def leaving_pays(self, number: int, batch: int, left: int, allowed: int) -> bool:
        """Do the stages after `number` save more on the samples that are left than taking the others out costs?"""

        def rest(t: BatchTimes) -> float:
            until = self._until[t.batch]
            return until[allowed] - until[number + 1]

        saved = at_batch(self.times, batch, rest) - at_batch(self.times, left, rest)
        return saved > at_batch(self.times, batch, lambda t: t.compact)


class Deadline:
    """Says whether one more stage would end in time.

    With measured times a stage is taken to need what it kept to when it was measured, and more where this machine has
    so far been slower than that; without them as long as the longest stage so far.

    Args:
        seconds: from `started`.
        clock: measured times, where there are any.
        now: gives the time in seconds.
        started: from when `seconds` count, by `now`.
    """

    def __init__(self, seconds: float, clock: StageClock | None, now: Callable[[], float], started: float) -> None:
        self.seconds, self.clock, self.now = seconds, clock, now
        self.started = self.begun = started
        self.longest = self.spent = self.expected = 0.0

    def allows(self, number: int, batch: int) -> bool:
        """May a stage, from 0, be started now? The first always may."""
        self.begun = self.now()
        if number == 0:
            return True
        need = self.longest
        if self.clock is not None:
            need = self.clock.late(number, batch) * max(1.0, self.spent / self.expected)
        return self.begun - self.started + need <= self.seconds

    def done(self, number: int, batch: int) -> None:
        """A stage that `allows` let start has ended."""
        taken = self.now() - self.begun
        self.longest, self.spent = max(self.longest, taken), self.spent + taken
        if self.clock is not None:
            self.expected += self.clock.late(number, batch)
