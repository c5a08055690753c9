"""All stages as one graph, plain or with early exits: compared with PyTorch, and timed against the separate stages."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdistil.ensemble.budget import NEVER, Rule, confidence_of
from bdistil.errors import RunError, UserError
from bdistil.export.exit_graph import write_exits
from bdistil.export.graphs import EXPORTERS
from bdistil.export.job import Export
from bdistil.export.parity import BATCHES, TOLERANCE, difference
from bdistil.runner import ALWAYS, Exits, ExportedEnsemble
from bdistil.utils.trees import take_rows

MEASURED = (1, 64)  # timed batch sizes
REPEATS = 100
COMPARED = 32  # number of compared samples, each at every exit
NEAR = 1e-3  # distance of the thresholds from the confidence of a compared sample


def fuse_all(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Exports all stages as one graph.

    Args:
        export: export of the run.
        folder: folder with the graphs of the stages.
        manifest: manifest of these graphs.

    Returns:
        The manifest entry `fused`; `faster` tells whether the graph is faster for one sample.

    Raises:
        RunError: the graph differs from PyTorch.
    """
    count = len(export.ensemble)
    entry = export.write(folder, f"stages_01_{count:02d}.onnx", range(count), EXPORTERS[manifest["exporter"]])
    fused = {"kind": "all", "graphs": [entry]}
    stages, whole = fused_runner(folder, manifest, None), fused_runner(folder, manifest, fused)
    largest, latency = 0.0, {}
    for batch in BATCHES:
        rows = slice(batch)
        logits = whole.predict(export.arrays(take_rows(export.raw, rows))).logits
        largest = max(largest, difference(Tensor(logits), export.ensemble(take_rows(export.x, rows))))
    _check_tolerance(largest, "all")
    for batch in MEASURED:
        x = export.arrays(take_rows(export.raw, slice(batch)))
        latency[str(batch)] = {"stages_ms": best_ms(stages.predict, x), "fused_ms": best_ms(whole.predict, x)}
    faster = latency["1"]["fused_ms"] < latency["1"]["stages_ms"]
    return {**fused, "difference": largest, "latency": latency, "faster": faster}


def fuse_exits(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the graph with early exits; arguments and result as for `fuse_all`.

    Raises:
        UserError: the run is a regression.
        RunError: the graph differs from PyTorch.
    """
    if manifest["task"] != "classification":
        raise UserError(
            "`--fuse exits` needs the confidence of classes, which real outputs and several labels do not have. Leave "
            "it out."
        )
    fused = write_exits(folder, manifest)
    stages, whole = fused_runner(folder, manifest, None), fused_runner(folder, manifest, fused)
    largest = _exit_difference(export, whole, fused["rule"])
    _check_tolerance(largest, "exits")
    x, count = whole.check(export.arrays(take_rows(export.raw, slice(1)))), len(stages)
    taken: dict[str, list[float]] = {"stages_ms": [], "fused_ms": []}
    for number in range(count):
        exits = Exits(fused["rule"], exit_after(number, count), [1.0] * count)
        taken["stages_ms"].append(best_ms(stages.run_stages, x, stages.plan_of(exits, count), count))
        taken["fused_ms"].append(best_ms(whole.run_exits, x, exits.thresholds, count))
    faster = sum(taken["fused_ms"]) < sum(taken["stages_ms"])
    return {**fused, "difference": largest, "latency": {"1": taken}, "faster": faster}


def _exit_difference(export: Export, runner: ExportedEnsemble, rule: Rule) -> float:
    """Largest difference from PyTorch over samples and exits.

    To force an exit at a stage, the thresholds are set just above the confidences of the sample at all earlier stages,
    and just below from that stage on.

    Raises:
        RunError: the graph exits at another stage.
    """
    ensemble, count, largest = export.ensemble, len(export.ensemble), 0.0
    answers = [stage.logits for stage in ensemble.stages(take_rows(export.x, slice(COMPARED)))]
    confidence = torch.stack(
        [confidence_of(logits, rule, ensemble.calibration.temperature(n)) for n, logits in enumerate(answers)], 1
    )
    for row, at_stages in enumerate(confidence):
        for number in range(count):
            shift = [NEAR] * number + [-NEAR] * (count - number)
            thresholds = (at_stages + torch.tensor(shift)).tolist()
            one = runner.check(export.arrays(take_rows(export.raw, slice(row, row + 1))))
            given = runner.run_exits(one, thresholds, count)
            if given.stages[0] != number + 1:
                raise RunError(f"The graph with exits stopped after stage {given.stages[0]}, expected {number + 1}.")
            largest = max(largest, difference(Tensor(given.logits), answers[number][row : row + 1]))
    return largest


def exit_after(number: int, count: int) -> list[float]:
    """Thresholds (T,) at which every sample exits after stage `number`, counted from 0."""
    return [NEVER] * number + [ALWAYS] * (count - number)


def fused_runner(folder: Path, manifest: Mapping[str, Any], fused: Mapping[str, Any] | None) -> ExportedEnsemble:
    """A runner that uses the fused graph, if there is one, even if it is slower."""
    return ExportedEnsemble(folder, {**manifest, "fused": fused and {**fused, "faster": True}}, threads=1)


def best_ms(function: Callable[..., object], *args: Any) -> float:
    """Shortest time of a call in milliseconds."""
    return 1e3 * min(timeit.repeat(lambda: function(*args), number=1, repeat=REPEATS))


def _check_tolerance(found: float, kind: str) -> None:
    if found > TOLERANCE:
        raise RunError(f"The graph of `--fuse {kind}` differs from PyTorch by {found:.2g} (allowed: {TOLERANCE:g}).")
