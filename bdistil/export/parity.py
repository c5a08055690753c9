"""Comparison of exported stages with PyTorch, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError
from bdistil.export.graphs import activation_name
from bdistil.utils.trees import row_count, take_rows

TOLERANCE = 1e-4
BATCHES = (1, 2, 5, 64, 256)
MOST = 32  # maximum number of batches of each size
Values = dict[str, Tensor]
RunStage = Callable[[int, Values], Mapping[str, Tensor]]


@torch.no_grad()
def reference(ensemble: ProgressiveEnsemble, x: Any) -> Values:
    """Computes in PyTorch `total_k` (B, L) of every stage k, from 1, and the activations that later stages read."""
    runner, values = ensemble.stage_runner(x), {}
    for number in range(len(ensemble)):
        values[f"total_{number + 1}"] = runner.step().total
        for key in ensemble.wiring.gives[number]:
            values[activation_name(number, key)] = runner.activations[number, key]
    return values


def difference(given: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value if that is above 1; infinite if shapes differ."""
    if given.shape != expected.shape:
        return float("inf")
    largest = (given - expected).abs().max() / expected.abs().max().clamp(min=1)
    return float(largest) if torch.isfinite(largest) else float("inf")


def check_parity(
    run_stage: RunStage, ensemble: ProgressiveEnsemble, x: Any, raw: Any, batches: Sequence[int] = BATCHES
) -> list[float]:
    """Compares every stage, run on the outputs of the exported stages before it, with PyTorch.

    Args:
        run_stage: returns the outputs of a stage, counted from 0, by name, given all values so far.
        ensemble: evaluated on the same batches, since the answers of a student may depend on its batch.
        x: samples (N, ...) as in training.
        raw: the same samples as the graphs read them.
        batches: batch sizes.

    Returns:
        The largest difference of each stage, over its sum and its activations; see `difference`.

    Raises:
        RunError: a stage differs by more than `TOLERANCE`, or cannot be run at a batch size.
    """
    largest = [0.0] * len(ensemble)
    for batch in batches:
        found = [0.0] * len(ensemble)
        for begin in range(0, min(row_count(x), MOST * batch), batch):
            rows = slice(begin, begin + batch)
            expected = reference(ensemble, take_rows(x, rows))
            values = ensemble.inputs.take_apart(take_rows(raw, rows))
            for number in range(len(ensemble)):
                try:
                    given = run_stage(number, values)
                except Exception as error:  # errors of the runtimes share no base class
                    raise RunError(
                        f"Stage {number + 1} as exported cannot be run with a batch of {batch}: {error}. If its "
                        "student fixes the batch size, write its shapes as -1 or flatten(1)."
                    ) from error
                values.update(given)
                found[number] = max(found[number], *(difference(given[name], expected[name]) for name in given))
        for number, value in enumerate(found):
            if value > TOLERANCE:
                raise RunError(
                    f"Stage {number + 1} as exported differs from PyTorch by {value:.2g} at batch {batch} (allowed: "
                    f"{TOLERANCE:g}). Its student depends on the batch size or on the values of a batch in a way that "
                    "the exported graph does not follow."
                )
        largest = [max(pair) for pair in zip(largest, found, strict=True)]
    return largest
