"""Stage-by-stage evaluation of a batch from which decided samples are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .confidence import Array
from .graphs import Graph, Pipeline, PipelinePool

BOUND = 8  # up to this many samples, arrays of reduced batches are pooled like those of whole batches


class StageRunner:
    """Runs the stages on a batch, one per call.

    Args:
        graphs: graphs of the stages.
        pool: pipelines of these graphs.
        arrays: a batch, arrays (B, ...) by name.

    Attributes:
        number: number of stages that ran.
        size: number of samples left in the batch.
        divisible: whether samples can be removed from the batch.
    """

    divisible = True

    def __init__(self, graphs: Sequence[Graph], pool: PipelinePool, arrays: Mapping[str, Array]) -> None:
        self.graphs, self.pool = graphs, pool
        self._pipeline: Pipeline | None = pool.acquire(arrays)
        self._values, self._sizes = self._pipeline.values, self._pipeline.sizes
        self.number, self.size = 0, len(next(iter(arrays.values())))

    def advance(self) -> None:
        """Runs the next stage."""
        if self._pipeline is not None:
            self._pipeline.steps[self.number]()
        else:
            self.graphs[self.number].run(self._values)
        self.number += 1

    def advance_to(self, count: int) -> None:
        """Runs the stages up to the first `count`."""
        if self._pipeline is None:
            while self.number < count:
                self.advance()
        else:  # no call besides those of the stages, which may take only microseconds
            for step in self._pipeline.steps[self.number : count]:
                step()
            self.number = count

    def total(self, number: int) -> Array:
        """Sum (n, L) of a stage that ran, from 0; it is overwritten once the runner is closed."""
        return self._values[f"total_{number + 1}"]

    def own(self, number: int) -> Array:
        """Weighted logits (n, L) of the student of a stage that ran, from 0: what it added to the sum."""
        return self.total(number) - self.total(number - 1) if number else self.total(number)

    def keep(self, rows: Array) -> None:
        """Reduces the batch to the given rows (m,)."""
        old, self.size = self._values, len(rows)
        names = self.pool.read_later[self.number]
        if self.size <= BOUND:
            pipeline = self.pool.take(tuple((n, self.size if n == "batch" else size) for n, size in self._sizes))
            for name in names:
                old[name].take(rows, 0, pipeline.values[name])
            self._replace(pipeline, pipeline.values)
        else:
            self._replace(None, {name: old[name].take(rows, 0) for name in names})

    def _replace(self, pipeline: Pipeline | None, values: Mapping[str, Array]) -> None:
        self.close()
        self._pipeline, self._values = pipeline, dict(values) if pipeline is None else pipeline.values

    def close(self) -> None:
        """Returns the arrays for the next batch."""
        if self._pipeline is not None:
            self.pool.release(self._pipeline)
            self._pipeline = None
