"""The graph with exits in an export: written, compared with PyTorch, measured beside the stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from bdistil.ensemble.budget import NEVER, confidence_of
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError, UserError
from bdistil.export.exit_graph import RULES, ExitsGraph
from bdistil.export.folder import seal
from bdistil.export.fusion import fused_runner, interleaved_ms, within_tolerance
from bdistil.export.parity import difference
from bdistil.export.runner import ALWAYS, ExitRule

COMPARED = 32  # samples, each at every exit
NEAR = 1e-4  # of a threshold: such a sample may be decided either way


def write_exits(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the graph; gives `kind`, `graphs` and `rule`, that of the fitted thresholds where the graph has it.

    Args:
        folder: with the stages.
        manifest: of them.

    Raises:
        UserError: the answers are real outputs.
    """
    if manifest["task"] == "regression":
        raise UserError("`--fuse exits` leaves where an answer is sure, which real outputs cannot be. Leave it out.")
    fitted, stages, path = manifest["exits"], manifest["stages"], folder / "exits.onnx"
    rule = fitted["rule"] if fitted and fitted["rule"] in RULES else RULES[0]
    onnx.save(ExitsGraph(folder, stages, manifest["temperatures"], rule).model(), str(path))
    total = stages[0]["outputs"][0]
    thresholds = {"name": "thresholds", "shape": [len(stages)], "dtype": total["dtype"]}
    entry = {
        **seal(path),
        "first": 1,
        "last": len(stages),
        "inputs": [stages[0]["inputs"][0], thresholds],
        "outputs": [{**total, "name": "logits"}, {"name": "stages", "shape": [], "dtype": "int64"}],
    }
    return {"kind": "exits", "graphs": [entry], "rule": rule}


def leaving(number: int, count: int) -> list[float]:
    """Thresholds that no sample reaches before a stage, from 0, and every sample there."""
    return [NEVER] * number + [ALWAYS] * (count - number)


def prove_exits(
    folder: Path,
    manifest: Mapping[str, Any],
    fused: Mapping[str, Any],
    ensemble: ProgressiveEnsemble,
    x: Tensor,
    raw: Tensor,
) -> float:
    """Largest difference to PyTorch, with thresholds that let a sample leave at each stage, and with real ones.

    Raises:
        RunError: the graph leaves at another stage than PyTorch, or its answer differs.
    """
    runner, count, largest = fused_runner(folder, manifest, fused), len(ensemble), 0.0
    answers = [stage.logits for stage in ensemble.stages(x[:COMPARED])]
    sure = torch.stack(
        [confidence_of(logits, fused["rule"], ensemble.calibration.temperature(n)) for n, logits in enumerate(answers)]
    )
    medians = sure.median(1).values
    for row in range(len(answers[0])):
        over = sure[:, row] - medians
        cases = [(number, leaving(number, count)) for number in range(count)]
        if not (over[:-1].abs() < NEAR).any():
            cases.append((next((n for n in range(count - 1) if over[n] >= 0), count - 1), medians.tolist()))
        for number, thresholds in cases:
            given = runner.leave(raw[row : row + 1].numpy(), thresholds, count)
            if given.stages[0] != number + 1:
                raise RunError(f"The graph with exits left after stage {given.stages[0]}, expected {number + 1}.")
            largest = max(largest, difference(Tensor(given.logits), answers[number][row : row + 1]))
    within_tolerance(largest, "exits")
    return largest


def measure_exits(folder: Path, manifest: Mapping[str, Any], fused: Mapping[str, Any], raw: Tensor) -> dict[str, Any]:
    """Latency of one sample that leaves at each stage, by this graph and stage by stage."""
    plain, graph = fused_runner(folder, manifest, None), fused_runner(folder, manifest, fused)
    x, count, rows = raw[:1].numpy(), len(plain), []
    for number in range(count):
        exits = ExitRule(fused["rule"], leaving(number, count), [1.0] * count)
        rows.append(
            interleaved_ms([_call(plain.decide, x, exits, count), _call(graph.leave, x, exits.thresholds, count)])
        )
    stages, together = (list(column) for column in zip(*rows, strict=True))
    return {"latency": {"1": {"stages_ms": stages, "fused_ms": together}}, "faster": sum(together) < sum(stages)}


def _call(function: Any, *given: Any) -> Any:
    return lambda: function(*given)


def fused_exits(
    folder: Path, manifest: Mapping[str, Any], ensemble: ProgressiveEnsemble, x: Tensor, raw: Tensor
) -> dict[str, Any]:
    """The part `fused` of the manifest; arguments as of `fused_spans`.

    Raises:
        UserError: the answers are real outputs.
        RunError: the graph differs from PyTorch.
    """
    fused = write_exits(folder, manifest)
    found = prove_exits(folder, manifest, fused, ensemble, x, raw)
    return {**fused, "difference": found, **measure_exits(folder, manifest, fused, raw)}
