"""Times of stages on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .budget import Array, confidence_of
from .graphs import Chain, Graph
from .stages import StageRunner


def example(batch: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """A batch (B, ...) to measure with: standard normal, or zeros where samples are whole numbers."""
    size = (batch, *shape)
    x = np.random.default_rng(0).standard_normal(size) if dtype.kind == "f" else np.zeros(size)
    return x.astype(dtype)


def stage_times(graphs: Sequence[Graph], chain: Chain, x: Array, repeats: int) -> dict[str, Any]:
    """Seconds of each stage, of asking an exit rule and of taking half the samples out; an entry of `times`.

    Args:
        graphs: of the stages.
        chain: of them, at the size of the batch.
        x: the batch (B, ...).
        repeats: how often; three more come first.
    """
    taken, count = np.zeros((repeats + 3, len(graphs) + 2)), len(graphs)
    half = np.arange(0, len(x), 2)
    for row in taken:
        walk = StageRunner(graphs, chain, x)
        for number in range(count):
            begun = time.perf_counter()
            total = walk.run(number)
            row[number] = time.perf_counter() - begun
        begun = time.perf_counter()
        confidence_of(total, "max_prob")
        row[-2] = time.perf_counter() - begun
        walk.keep(half)
        row[-1] = time.perf_counter() - begun - row[-2]
    median, late = np.median(taken[3:], 0).tolist(), np.quantile(taken[3:, :-2], 0.95, 0).tolist()
    return {"batch": len(x), "stages": median[:-2], "late": late, "check": median[-2], "compact": median[-1]}
