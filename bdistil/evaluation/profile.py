"""What each stage of a finished run costs, the teacher beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.metrics.cost import latency_ms, measure_cost
from bdistil.models.student import linked_features, links_of
from bdistil.storage.run_directory import RunDirectory


def profile_run(run: RunDirectory, batch_size: int = 1) -> list[dict[str, Any]]:
    """Costs of each stage, the teacher's first: MACs per sample, parameters, bytes, latency.

    The teacher's are those of the start of the run: it is not there any more, and was measured with a batch of one.

    Args:
        run: the run directory.
        batch_size: samples a call, for the activation bytes and the latency.

    Raises:
        UserError: `batch_size` < 1, no round is committed, or x is no tensor.
    """
    if batch_size < 1:
        raise UserError(f"Expected `batch_size` to be >= 1, got {batch_size}.")
    ensemble = ProgressiveEnsemble.load(run.root)
    x = _example(ensemble, batch_size)
    teacher = run.teacher_figures()
    rows = [_teacher_row(teacher, batch_size)] if teacher else []
    for number, student in enumerate(ensemble.students):
        row = _stage_row(student, list(ensemble.students)[:number], x)
        rows.append({"stage": number + 1, **row, "cumulative_macs": ensemble.macs[number]})
    return rows


def _example(ensemble: ProgressiveEnsemble, batch_size: int) -> Tensor:
    shape, dtype = ensemble.inputs.shape, getattr(torch, ensemble.inputs.dtype or "float32")
    if shape is None:
        raise UserError("Expected x of this run to be a tensor, to profile its stages; it was something else.")
    numbers = torch.randn(batch_size, *shape)
    return numbers.to(dtype) if dtype.is_floating_point else torch.zeros_like(numbers, dtype=dtype)


def _teacher_row(figures: dict[str, Any], batch_size: int) -> dict[str, Any]:
    once = batch_size == 1
    return {
        "stage": "teacher",
        "macs": figures["macs"],
        "link_macs": 0,
        "params": figures["params"],
        "weight_bytes": figures["weight_bytes"],
        "activation_bytes": figures["activation_bytes"] if once else None,
        "latency_ms": round(figures["latency_ms"], 3) if once else None,
        "cumulative_macs": figures["macs"],
    }


def _stage_row(student: nn.Module, earlier: list[nn.Module], x: Tensor) -> dict[str, Any]:
    inputs = (x, linked_features(student, earlier, x)) if links_of(student) else (x,)
    cost = measure_cost(student, inputs, uncounted="record")
    return {
        "macs": cost.macs // len(x),
        "link_macs": cost.by_module.get("join", 0) // len(x),
        "params": cost.params,
        "weight_bytes": cost.weight_bytes,
        "activation_bytes": cost.activation_bytes,
        "latency_ms": round(latency_ms(student, inputs), 3),
    }
