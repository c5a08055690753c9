"""Pairs of stages, or all, as one graph, measured beside the stages themselves.

Links join at the head, so the bodies of these stages have nothing to wait for and may run together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError
from bdistil.export.parity import BATCHES, TOLERANCE, difference
from bdistil.export.runner import ExportedEnsemble

MEASURED = (1, 64)  # batch sizes
TURNS = 100


def spans(kind: str, count: int) -> list[list[int]]:
    """Numbers, from 0, of the stages that run as one graph; of pairs an odd last stage stays alone."""
    return [list(range(count))] if kind == "all" else [[n, n + 1] for n in range(0, count - 1, 2)]


def fused_runner(folder: Path, manifest: Mapping[str, Any], fused: Mapping[str, Any] | None) -> ExportedEnsemble:
    """With these graphs in use, whether they are faster or not."""
    return ExportedEnsemble(folder, {**manifest, "fused": fused and {**fused, "faster": True}}, threads=1)


def fused_spans(
    folder: Path,
    manifest: Mapping[str, Any],
    graphs: Mapping[str, Any],
    ensemble: ProgressiveEnsemble,
    x: Tensor,
    raw: Tensor,
) -> dict[str, Any]:
    """Compares with PyTorch and measures all stages with and without these graphs.

    Args:
        folder: with the graphs.
        manifest: of the stages.
        graphs: `kind` and `graphs`, the entries.
        ensemble: as it was trained.
        x: (N, ...) samples as in training.
        raw: the same as the graphs read them.

    Returns:
        The part `fused` of the manifest: the graphs are `faster` where they are so for one sample.

    Raises:
        RunError: a graph differs from PyTorch.
    """
    plain, together = fused_runner(folder, manifest, None), fused_runner(folder, manifest, graphs)
    largest, latency = 0.0, {}
    for batch in BATCHES:
        given = together.predict(raw[:batch].numpy()).logits
        largest = max(largest, difference(Tensor(given), ensemble(x[:batch])))
    within_tolerance(largest, graphs["kind"])
    for batch in MEASURED:
        samples = raw[:batch].numpy()
        taken = interleaved_ms([runner_call(plain, samples), runner_call(together, samples)])
        latency[str(batch)] = dict(zip(("stages_ms", "fused_ms"), taken, strict=True))
    faster = latency["1"]["fused_ms"] < latency["1"]["stages_ms"]
    return {**graphs, "difference": largest, "latency": latency, "faster": faster}


def runner_call(runner: ExportedEnsemble, x: Any) -> Callable[[], object]:
    """All stages on x, to be measured."""
    return lambda: runner.predict(x)


def within_tolerance(found: float, kind: str) -> None:
    """Is the difference to PyTorch small enough?

    Raises:
        RunError: it is above `TOLERANCE`.
    """
    if found > TOLERANCE:
        raise RunError(f"The graphs of `--fuse {kind}` differ from PyTorch by {found:.2g} (allowed: {TOLERANCE:g}).")


def interleaved_ms(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Smallest time of each call, in turns, in ms."""
    taken = np.full((TURNS, len(calls)), np.inf)
    for turn in taken:
        for place, call in enumerate(calls):
            begun = time.perf_counter()
            call()
            turn[place] = 1e3 * (time.perf_counter() - begun)
    return [float(value) for value in taken.min(0)]
