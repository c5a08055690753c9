"""A batch on its way through the stages; decided samples may leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .budget import Array, confidence_of
from .graphs import Chain, Graph

ALWAYS = -1.0  # a threshold that every sample reaches


class StageRunner:
    """A batch before its first stage.

    Args:
        graphs: of the stages.
        chain: of the same, at the size of the batch; it is used until a sample leaves.
        x: the batch (B, ...).

    Attributes:
        rows: (n,), which samples are left.
        values: what the stages gave so far, of the samples that are left.
        votes: (n, L), how many students answered each class, where they are counted.
    """

    def __init__(self, graphs: Sequence[Graph], chain: Chain, x: Array) -> None:
        self.graphs, self._chain = graphs, chain
        self.values: dict[str, Array] = {"x": chain.values["x"]}
        self.values["x"][...] = x
        self.rows = np.arange(len(x))
        self.votes: Array | None = None
        self._whole = True

    def run(self, number: int) -> Array:
        """Runs a stage, from 0; gives its sum (n, L), which the next call may overwrite."""
        graph = self.graphs[number]
        if self._whole:
            self._chain.steps[number]()
            self.values.update((name, self._chain.values[name]) for name in graph.gives)
        else:
            graph.run(self.values)
        return self.values[f"total_{number + 1}"]

    def count_votes(self, number: int) -> None:
        """Counts the student's own answer, which is what it added to the sum."""
        own = self.values[f"total_{number + 1}"]
        own = own - self.values[f"total_{number}"] if number else own
        votes = np.zeros(own.shape, np.float32) if self.votes is None else self.votes
        votes[np.arange(len(own)), own.argmax(1)] += 1
        self.votes = votes

    def keep(self, left: Array) -> None:
        """Takes all samples but those numbered in `left` out of the batch."""
        self.rows, self._whole = self.rows[left], False
        self.values = {name: value[left] for name, value in self.values.items()}
        self.votes = None if self.votes is None else self.votes[left]


@dataclass(frozen=True)
class ExitRule:
    """How samples are decided.

    Attributes:
        rule: how confidence is read.
        thresholds: one a stage; a sample is decided where its confidence reaches it.
        temperatures: one a stage.
        shares: of samples that are expected to be decided at each stage, where that is known.
    """

    rule: str
    thresholds: Sequence[float]
    temperatures: Sequence[float]
    shares: Sequence[float] | None = None

    def decides(self, number: int, answer: Array, walk: StageRunner) -> Array:
        """Which samples (n,) are decided by a stage's answers (n, L)."""
        if self.rule == "agreement":
            walk.count_votes(number)
        return confidence_of(answer, self.rule, self.temperatures[number], walk.votes) >= self.thresholds[number]
