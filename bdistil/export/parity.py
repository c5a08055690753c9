"""Is an exported ensemble the one that was trained? Each stage against PyTorch, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError

TOLERANCE = 1e-4
BATCHES = (1, 2, 5, 64, 256)
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Parity:
    """Measured differences.

    Attributes:
        samples: how many were compared.
        source: of the samples, in words.
        batches: sizes.
        differences: largest of each stage, of its sum and its features, at all batch sizes; absolute where the numbers
            are below 1, else relative to the largest of them.
    """

    samples: int
    source: str
    batches: tuple[int, ...]
    differences: tuple[float, ...]


@torch.no_grad()
def reference(ensemble: ProgressiveEnsemble, x: Tensor) -> Values:
    """Sums `total_k` and features `features_k` of every stage, by PyTorch."""
    runner, values, found = ensemble.stage_runner(x), {}, 0
    for number in range(len(ensemble)):
        values[f"total_{number + 1}"] = runner.step().total
        if len(runner.features) > found:
            values[f"features_{number + 1}"], found = runner.features[-1], len(runner.features)
    return values


def difference(given: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted number where that is above 1; infinite for another shape."""
    if given.shape != wanted.shape:
        return float("inf")
    largest = (given - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    return float(largest) if torch.isfinite(largest) else float("inf")


Run = Callable[[int, Values], Mapping[str, Tensor]]


def stage_differences(run: Run, ensemble: ProgressiveEnsemble, x: Tensor, raw: Tensor, batch: int) -> list[float]:
    """Largest difference of each stage when samples come in batches of a size, each stage on what those before gave.

    Args:
        run: gives the outputs of a stage, from 0, by name, from all values so far.
        ensemble: as it was trained; it reads the same batches, for what a student answers may depend on its batch.
        x: as in training, (N, ...).
        raw: the same samples as the graphs read them.
        batch: size.
    """
    largest = [0.0] * len(ensemble)
    for begin in range(0, len(x), batch):
        rows = slice(begin, begin + batch)
        wanted, values = reference(ensemble, x[rows]), {"x": raw[rows]}
        for number in range(len(ensemble)):
            given = run(number, values)
            values.update(given)
            largest[number] = max(largest[number], *(difference(value, wanted[name]) for name, value in given.items()))
    return largest


def prove_parity(
    run: Run, ensemble: ProgressiveEnsemble, x: Tensor, raw: Tensor, source: str, batches: Sequence[int] = BATCHES
) -> Parity:
    """Compares all stages at several batch sizes; 32 batches of each size at most, to save time.

    Args:
        run: see `stage_differences`.
        ensemble: as it was trained.
        x: (N, ...) as in training.
        raw: the same samples as the graphs read them.
        source: of the samples, in words.
        batches: sizes.

    Raises:
        RunError: a stage differs by more than `TOLERANCE`, or cannot be run at a batch size.
    """
    largest = [0.0] * len(ensemble)
    for batch in batches:
        part = slice(32 * batch)
        found = stage_differences(_named(run, batch), ensemble, x[part], raw[part], batch)
        largest = [max(pair) for pair in zip(largest, found, strict=True)]
        for number, value in enumerate(found):
            if value > TOLERANCE:
                raise RunError(
                    f"Stage {number + 1} as exported differs from PyTorch by {value:.2g} at batch {batch} (allowed: "
                    f"{TOLERANCE:g}). Something in its student depends on the batch size or the values of a batch in a "
                    "way that the exported graph does not follow."
                )
    compared = min(len(x), 32 * max(batches))
    return Parity(compared, source, tuple(batches), tuple(largest))


def _named(run: Run, batch: int) -> Run:
    def named(number: int, values: Values) -> Mapping[str, Tensor]:
        try:
            return run(number, values)
        except Exception as error:  # onnxruntime has no common class for its errors
            raise RunError(f"Stage {number + 1} as exported cannot be run with a batch of {batch}: {error}") from error

    return named
