"""Stage-by-stage evaluation of a batch from which decided samples are removed, and its measured times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .budget import Array, confidence_of
from .graphs import Graph, Pipeline

ALWAYS = -1.0  # a threshold that every sample reaches


class StageRunner:
    """Runs the stages on a batch, one per call.

    Args:
        graphs: of the stages.
        pipeline: of these graphs, with the batch as its input; used until samples are removed.

    Attributes:
        rows: (n,), indices of the samples that are left.
        values: outputs of the stages so far, of these samples.
        votes: (n, L), number of students that answer each class, for the rule agreement.
    """

    def __init__(self, graphs: Sequence[Graph], pipeline: Pipeline) -> None:
        self.graphs, self._pipeline = graphs, pipeline
        self.values: dict[str, Array] = {"x": pipeline.values["x"]}
        self.rows = np.arange(len(self.values["x"]))
        self.votes: Array | None = None
        self._complete = True

    def run(self, number: int) -> Array:
        """Runs a stage, from 0; returns its sum (n, L), which the next call may overwrite."""
        graph = self.graphs[number]
        if self._complete:
            self._pipeline.steps[number]()
            self.values.update((name, self._pipeline.values[name]) for name in graph.gives)
        else:
            graph.run(self.values)
        return self.values[f"total_{number + 1}"]

    def count_votes(self, number: int) -> None:
        """Adds the answers of the student of a stage: the classes of what it added to the sum."""
        total = self.values[f"total_{number + 1}"]
        own = total - self.values[f"total_{number}"] if number else total
        self.votes = np.zeros(own.shape, np.float32) if self.votes is None else self.votes
        self.votes[np.arange(len(own)), own.argmax(1)] += 1

    def keep(self, rows: Array) -> None:
        """Reduces the batch to the given rows (m,)."""
        self.rows, self._complete = self.rows[rows], False
        self.values = {name: value[rows] for name, value in self.values.items()}
        self.votes = None if self.votes is None else self.votes[rows]


@dataclass(frozen=True)
class Exits:
    """Exit rule and its thresholds.

    Attributes:
        rule: one of `RULES`.
        thresholds: one per stage; a sample is decided where its confidence reaches it.
        temperatures: one per stage.
        shares: expected share of samples decided at each stage, where known.
    """

    rule: str
    thresholds: Sequence[float]
    temperatures: Sequence[float]
    shares: Sequence[float] | None = None

    def decided(self, number: int, logits: Array, runner: StageRunner) -> Array:
        """Samples (n,) bool that are decided by the logits (n, L) of a stage, from 0."""
        if self.rule == "agreement":
            runner.count_votes(number)
        confidence = confidence_of(logits, self.rule, self.temperatures[number], runner.votes)
        decided: Array = confidence >= self.thresholds[number]
        return decided


def measure_stages(graphs: Sequence[Graph], pipeline: Pipeline, repeats: int) -> dict[str, Any]:
    """Measures the seconds of each stage, of an exit rule, and of removing half of the samples.

    Args:
        graphs: of the stages.
        pipeline: of these graphs, with a batch as its input.
        repeats: measurements, after three that are discarded.

    Returns:
        An entry of `times` in the manifest.
    """
    taken, batch = np.zeros((repeats + 3, len(graphs) + 2)), len(pipeline.values["x"])
    for row in taken:
        runner = StageRunner(graphs, pipeline)
        for number in range(len(graphs)):
            begun = time.perf_counter()
            total = runner.run(number)
            row[number] = time.perf_counter() - begun
        begun = time.perf_counter()
        confidence_of(total, "max_prob")
        row[-2] = time.perf_counter() - begun
        runner.keep(np.arange(0, batch, 2))
        row[-1] = time.perf_counter() - begun - row[-2]
    median, late = np.median(taken[3:], 0).tolist(), np.quantile(taken[3:, :-2], 0.95, 0).tolist()
    return {"batch": batch, "stages": median[:-2], "late": late, "check": median[-2], "compact": median[-1]}
