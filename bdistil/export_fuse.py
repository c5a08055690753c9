"""One graph for each pair of stages, measured beside the stages themselves.

Links join at the head, so the bodies of a pair have nothing to wait for and may run together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bdistil.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError
from bdistil.export_parity import BATCHES, TOLERANCE, difference
from bdistil.runner import ExportedEnsemble

MEASURED = (1, 64)  # batch sizes
TURNS = 100


def pairs_of(count: int) -> list[list[int]]:
    """Numbers, from 0, of stages two by two; an odd last one stays alone."""
    return [[number, number + 1] for number in range(0, count - 1, 2)]


def choose_pairs(folder: Path, manifest: Mapping[str, Any], pairs: Sequence[Any], raw: Tensor) -> dict[str, Any]:
    """Latency of all stages with and without pairs, and whether pairs are faster for one sample.

    Args:
        folder: with the graphs of stages and pairs.
        manifest: of the stages.
        pairs: entries of the pairs.
        raw: samples as the graphs read them.

    Returns:
        The part `fused` of the manifest.
    """
    fused = {"pairs": list(pairs), "faster": True}
    plain, paired = (ExportedEnsemble(folder, {**manifest, "fused": f}, 1) for f in (None, fused))
    latency = {}
    for batch in MEASURED:
        x = raw[:batch].numpy()
        latency[str(batch)] = dict(zip(("stages_ms", "pairs_ms"), interleaved_ms([plain, paired], x), strict=True))
    fused["faster"] = latency["1"]["pairs_ms"] < latency["1"]["stages_ms"]
    return {**fused, "latency": latency}


def prove_pairs(
    folder: Path, manifest: Mapping[str, Any], ensemble: ProgressiveEnsemble, x: Tensor, raw: Tensor
) -> float:
    """Largest difference to PyTorch when pairs run as one graph.

    Raises:
        RunError: it is above `TOLERANCE`.
    """
    paired = ExportedEnsemble(folder, {**manifest, "fused": {**manifest["fused"], "faster": True}}, 1)
    largest = 0.0
    for batch in BATCHES:
        given = paired.predict(raw[:batch].numpy()).logits
        largest = max(largest, difference(Tensor(given), ensemble(x[:batch])))
    if largest > TOLERANCE:
        raise RunError(f"The graphs of pairs differ from PyTorch by {largest:.2g} (allowed: {TOLERANCE:g}).")
    return largest


def interleaved_ms(ensembles: Sequence[ExportedEnsemble], x: Any) -> list[float]:
    """Smallest time of all stages of each ensemble, in turns, in ms."""
    taken = np.full((TURNS, len(ensembles)), np.inf)
    for turn in taken:
        for place, ensemble in enumerate(ensembles):
            begun = time.perf_counter()
            ensemble.predict(x)
            turn[place] = 1e3 * (time.perf_counter() - begun)
    return [float(value) for value in taken.min(0)]
