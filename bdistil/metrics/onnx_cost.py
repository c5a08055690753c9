"""Cost of an ONNX graph, read from the file without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from bdistil.metrics.cost import OutsideCost

# Standard operators with matmul-like work that are not counted; the others of the standard domain are free.
UNCOUNTED = frozenset((
    "Attention", "ConvInteger", "DeformConv", "DFT", "Einsum", "If", "Loop", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "RNN", "GRU", "LSTM", "Scan",
))  # fmt: skip


def graph_cost(path: Path, shapes: Mapping[str, Sequence[int]]) -> OutsideCost:
    """Multiply-adds of a graph for inputs of given shapes, by name, and the size of its weights."""
    import onnx
    from onnx import shape_inference

    model = onnx.load(path)
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    width = {t.name: onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in model.graph.initializer}
    for value in model.graph.input:
        if value.name in shapes:
            shape = value.type.tensor_type.shape  # empty where the file does not know the rank
            del shape.dim[:]
            for number in shapes[value.name]:
                shape.dim.add(dim_value=number)
    del model.graph.value_info[:]  # shapes of another batch
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    known = {v.name: _dims(v) for v in (*graph.input, *graph.value_info, *graph.output)} | weights
    macs, missed = 0, Counter[str]()
    for node in graph.node:
        counted = _macs(node, known)
        macs += counted or 0
        if counted is None:
            missed[f"{node.domain or 'onnx'}::{node.op_type}"] += 1
    size = sum(prod(dims) * width[name] for name, dims in weights.items())
    return OutsideCost(macs, sum(map(prod, weights.values())), size, dict(missed))


def _dims(value: Any) -> list[int] | None:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value for d in dims] if all(d.dim_value > 0 for d in dims) else None


def _macs(node: Any, known: Mapping[str, list[int] | None]) -> int | None:
    """Multiply-adds of a node; None if unknown."""
    if node.domain not in ("", "ai.onnx") or node.op_type in UNCOUNTED:
        return None
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second, out = (known.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if not first or not second or not out:
        return None
    if node.op_type == "Conv":
        return prod(out) * prod(second[1:])
    if node.op_type == "ConvTranspose":
        return prod(first) * prod(second[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return prod(out) * (first[0] if transposed else first[-1])
