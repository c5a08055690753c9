"""Decisions from measured stage times: when to evaluate exit rules, when to remove decided samples, and deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

RARE = 0.01  # added to shares, which are those of a limited number of samples
PAYS = 3.0  # factor on measured costs: in a prediction a check is slower, and slows the stage after it
CACHED = 4096  # cached decisions: computing one takes as long as a tiny student


@dataclass(frozen=True)
class BatchTimes:
    """Seconds measured with a batch of one size, after a warm-up.

    Attributes:
        batch: number of samples.
        stages: time of each stage, run in sequence; like all but `late`, a typical value of the repeats.
        late: a high quantile of each stage's time, used for deadlines.
        check: time of one evaluation of an exit rule.
        compact: time of one removal of decided samples from the batch.
        schedules: time of all stages in torch, by schedule; only those that the students support.
        schedule: the one to use if all stages run.
        native: whether torch's own convolutions were faster than those of oneDNN, and were measured.
    """

    batch: int
    stages: Sequence[float]
    late: Sequence[float]
    check: float
    compact: float
    schedules: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "one"
    native: bool = False


class StageClock:
    """Measured times of an ensemble on its device, at any batch size.

    Times are interpolated linearly between the measured sizes. They are proportional to the batch beyond the largest
    size, and below 1, which is an expected number of samples.

    Args:
        times: measurements by batch size, smallest first, at least one.
    """

    def __init__(self, times: Sequence[BatchTimes]) -> None:
        self.times, self._largest = times, times[-1].batch
        columns = [(*accumulate(t.stages), *t.late, t.check, t.compact) for t in times]
        sizes, batches = [t.batch for t in times], range(self._largest + 1)
        # Seconds at each batch size, precomputed per column: a decision takes as long as a tiny student.
        until = [np.interp(batches, sizes, column).tolist() for column in zip(*columns)]  # noqa: B905
        count = len(times[0].stages)
        self._until, self._late = [[0.0] * len(batches), *until[:count]], until[count:-2]
        self._check, self._compact = until[-2:]

    def _at(self, column: Sequence[float], batch: float) -> float:
        if batch < 1:
            return column[1] * batch
        if batch >= self._largest:
            return column[-1] * batch / self._largest
        low = int(batch)
        return column[low] + (column[low + 1] - column[low]) * (batch - low)

    def stage(self, number: int, batch: float) -> float:
        """Seconds of a stage, from 0."""
        return self.rest(number, number + 1, batch)

    def late(self, number: int, batch: float) -> float:
        """A high quantile of the seconds of a stage, from 0."""
        return self._at(self._late[number], batch)

    def rest(self, count: int, allowed: int, batch: float) -> float:
        """Seconds of the stages after the first `count`, up to `allowed`."""
        return self._at(self._until[allowed], batch) - self._at(self._until[count], batch)

    def check(self, batch: float) -> float:
        """Seconds of one evaluation of an exit rule."""
        return self._at(self._check, batch)

    def compact(self, batch: float) -> float:
        """Seconds of one removal of decided samples."""
        return self._at(self._compact, batch)


class Guard:
    """Decides after which stages to evaluate the exit rule, and when to remove decided samples from the batch.

    It affects only the running time: a sample whose rule is evaluated later, or which stays in the batch, gets the
    same answer. Without measured times or shares the rule is evaluated after each stage; without times, decided samples
    are removed at once.

    Args:
        clock: measured times, or None.
        allowed: number of stages that may run.
        shares: expected share of samples decided at each stage, or None.
    """

    def __init__(self, clock: StageClock | None, allowed: int, shares: Sequence[float] | None = None) -> None:
        self.clock, self.allowed, self.shares = clock, allowed, shares
        self._decisions: dict[tuple[int, int, int], int] = {}

    def next_check(self, checked: int, batch: int, left: int) -> int:
        """Number of first stages after which to evaluate the rule next; `allowed` if no further check is due.

        Args:
            checked: number of first stages at which it was evaluated.
            batch: samples in the batch.
            left: how many of them are undecided.
        """
        if self.clock is None or self.shares is None:
            return checked + 1
        key = (checked, batch, left)
        if key not in self._decisions:
            if len(self._decisions) >= CACHED:
                self._decisions.clear()
            later = range(checked + 1, self.allowed)
            pays = (n for n in later if self._check_pays(self.clock, self.shares, n, checked, batch, left))
            self._decisions[key] = next(pays, self.allowed)
        return self._decisions[key]

    def _check_pays(
        self, clock: StageClock, shares: Sequence[float], count: int, checked: int, batch: int, left: int
    ) -> bool:
        """Whether the samples that the first `count` stages decide save more than it costs to find them."""
        staying = left * (sum(shares[count:]) + RARE) / (sum(shares[checked:]) + RARE)
        removal = clock.compact(batch) * min(1.0, staying) if batch > 1 else 0.0
        saved = clock.rest(count, self.allowed, batch) - clock.rest(count, self.allowed, staying)
        return saved > PAYS * (clock.check(batch) + removal)

    def removes(self, count: int, batch: int, left: int) -> bool:
        """Whether the stages after the first `count` save more on the samples left than removing the others costs."""
        if self.clock is None:
            return True
        saved = self.clock.rest(count, self.allowed, batch) - self.clock.rest(count, self.allowed, left)
        return saved > PAYS * self.clock.compact(batch)


class Deadline:
    """Decides whether one more stage would end in time.

    With measured times, a stage is expected to take a high quantile of them, times the factor by which the stages so
    far were slower than measured. Without them, it is expected to take as long as the longest stage so far.

    Args:
        seconds: time limit, from `started`.
        clock: measured times, or None.
        now: returns the time in seconds.
        started: start of `seconds`, by `now`; None: now.
    """

    def __init__(
        self,
        seconds: float,
        clock: StageClock | None,
        now: Callable[[], float] = time.perf_counter,
        started: float | None = None,
    ) -> None:
        self.seconds, self.clock, self.now = seconds, clock, now
        self.started = self.begun = now() if started is None else started
        self.longest = self.spent = self.expected = 0.0

    def allows(self, number: int, batch: int) -> bool:
        """Whether a stage, from 0, may start now; the first always may."""
        self.begun = self.now()
        if number == 0:
            return True
        need = self.longest
        if self.clock is not None:
            need = self.clock.late(number, max(batch, 1)) * max(1.0, self.spent / self.expected)
        return self.begun - self.started + need <= self.seconds

    def done(self, number: int, batch: int) -> None:
        """Records the end of a stage that `allows` admitted."""
        taken = self.now() - self.begun
        self.longest, self.spent = max(self.longest, taken), self.spent + taken
        if self.clock is not None:
            self.expected += self.clock.late(number, max(batch, 1))
