"""One graph of all stages that leaves at the first stage that is sure: an If after each stage but the last.

An If sees one flag for the whole batch, that of its least sure sample, so the graph is for one sample.

onnxruntime optimises a branch only as far as it finds the weights in the branch itself: with weights in the outer graph
convolutions there took twice as long. So each branch keeps the weights of its stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

RULES = ("max_prob", "margin", "entropy")


class ExitsGraph:
    """Composes the graph from the files of the stages.

    It reads x and `thresholds` (T,), and gives `logits` (B, L) in the teacher's units and `stages`, how many answered.

    Args:
        folder: with the stages.
        stages: their entries in the manifest.
        temperatures: one a stage; none: 1.
        rule: how confidence is read, of `RULES`.
    """

    def __init__(
        self, folder: Path, stages: Sequence[Mapping[str, Any]], temperatures: Sequence[float], rule: str
    ) -> None:
        self.stages, self.rule = stages, rule
        self.temperatures = temperatures or [1.0] * len(stages)
        self.models = [onnx.load(str(folder / stage["file"])) for stage in stages]
        self.outputs = int(stages[0]["outputs"][0]["shape"][1])
        self.dtype = np.dtype(stages[0]["outputs"][0]["dtype"])

    def model(self) -> ModelProto:
        """The whole graph."""
        first, kind = self.models[0], helper.np_dtype_to_tensor_dtype(self.dtype)
        graph = self._from(0, "logits", "stages")
        graph.name = "exits"
        x = next(tensor for tensor in first.graph.input if tensor.name == "x")
        graph.input.extend([x, helper.make_tensor_value_info("thresholds", kind, [len(self.stages)])])
        graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", kind, ["batch", self.outputs]))
        opsets = {opset.domain: opset for model in self.models for opset in model.opset_import}
        functions = {function.name: function for model in self.models for function in model.functions}
        return helper.make_model(
            graph,
            ir_version=first.ir_version,
            opset_imports=list(opsets.values()),
            functions=list(functions.values()),
        )

    def _from(self, number: int, answer: str, count: str) -> GraphProto:
        """The stages from `number` on, with their weights: gives the answer and how many stages gave it."""
        stage, last = f"s{number + 1}_", number + 1 == len(self.stages)
        source = self.models[number].graph
        keep = {tensor.name for tensor in (*source.input, *source.output)}
        nodes = [_renamed(node, stage, keep) for node in source.node]
        weights = [_renamed_tensor(tensor, stage) for tensor in source.initializer]
        if last:
            more = self._answer(number, answer, count)
        else:
            leave = helper.make_graph(*self._answer(number, f"{stage}answer", f"{stage}count"))
            stay = self._from(number + 1, f"{stage}later", f"{stage}later_count")
            more = self._sure(number, stage)
            more[0].append(
                helper.make_node("If", [f"{stage}sure"], [answer, count], then_branch=leave, else_branch=stay)
            )
        outputs = [_output(answer, self.dtype, 2), _output(count, np.dtype(np.int64), 0)]
        return helper.make_graph([*nodes, *more[0]], f"{stage}on", [], outputs, [*weights, *more[-1]])

    def _answer(self, number: int, answer: str, count: str) -> tuple[Any, ...]:
        """The answer of a stage in the teacher's units; arguments of `make_graph`."""
        factor = self._constant(f"{answer}_factor", self.stages[number]["factor"])
        stages = numpy_helper.from_array(np.array(number + 1, np.int64), f"{count}_constant")
        nodes = [
            helper.make_node("Mul", [f"total_{number + 1}", factor.name], [answer]),
            helper.make_node("Identity", [stages.name], [count]),
        ]
        outputs = [_output(answer, self.dtype, 2), _output(count, np.dtype(np.int64), 0)]
        return nodes, f"{answer}_leave", [], outputs, [factor, stages]

    def _sure(self, number: int, stage: str) -> tuple[list[NodeProto], list[TensorProto]]:
        """Has the least sure sample of the batch reached the threshold of a stage?"""
        scale = self.stages[number]["factor"] / self.temperatures[number]
        constants = [self._constant(f"{stage}scale", scale), _index(f"{stage}number", number)]
        nodes = [
            helper.make_node("Mul", [f"total_{number + 1}", f"{stage}scale"], [f"{stage}scaled"]),
            helper.make_node("Softmax", [f"{stage}scaled"], [f"{stage}p"], axis=1),
        ]
        rule = self._entropy(stage) if self.rule == "entropy" else self._largest(stage)
        nodes += [
            *rule[0],
            helper.make_node("ReduceMin", [f"{stage}each"], [f"{stage}least"], keepdims=0),
            helper.make_node("Gather", ["thresholds", f"{stage}number"], [f"{stage}threshold"]),
            helper.make_node("GreaterOrEqual", [f"{stage}least", f"{stage}threshold"], [f"{stage}sure"]),
        ]
        return nodes, [*constants, *rule[1]]

    def _largest(self, stage: str) -> tuple[list[NodeProto], list[TensorProto]]:
        """The largest probability, or how far it is above the second."""
        margin = self.rule == "margin"
        top = numpy_helper.from_array(np.array([1 + margin], np.int64), f"{stage}top")
        nodes = [helper.make_node("TopK", [f"{stage}p", top.name], [f"{stage}best", f"{stage}places"], axis=1)]
        if not margin:
            return [*nodes, helper.make_node("Identity", [f"{stage}best"], [f"{stage}each"])], [top]
        places = [_index(f"{stage}{name}", place) for place, name in enumerate(("first", "second"))]
        nodes += [
            helper.make_node("Gather", [f"{stage}best", place.name], [f"{place.name}_p"], axis=1) for place in places
        ]
        return [*nodes, helper.make_node("Sub", [f"{stage}first_p", f"{stage}second_p"], [f"{stage}each"])], [
            top, *places
        ]  # fmt: skip

    def _entropy(self, stage: str) -> tuple[list[NodeProto], list[TensorProto]]:
        """1 less the entropy in units of that of equal probabilities."""
        names = ("tiny", "unit", "one")
        values = (float(np.finfo(self.dtype).tiny), 1 / math.log(self.outputs), 1.0)
        constants = [self._constant(f"{stage}{name}", value) for name, value in zip(names, values, strict=True)]
        axis = numpy_helper.from_array(np.array([1], np.int64), f"{stage}axis")
        steps = [
            ("Max", ["p", "tiny"], "held"), ("Log", ["held"], "log"), ("Mul", ["p", "log"], "terms"),
            ("ReduceSum", ["terms", "axis"], "sum"), ("Mul", ["sum", "unit"], "part"), ("Add", ["part", "one"], "each"),
        ]  # fmt: skip
        nodes = [
            helper.make_node(kind, [f"{stage}{name}" for name in reads], [f"{stage}{gives}"])
            for kind, reads, gives in steps
        ]
        return nodes, [*constants, axis]

    def _constant(self, name: str, value: float) -> TensorProto:
        return numpy_helper.from_array(np.array(value, self.dtype), name)


def _index(name: str, number: int) -> TensorProto:
    return numpy_helper.from_array(np.array(number, np.int64), name)


def _output(name: str, dtype: np.dtype[Any], rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [None] * rank)


def _renamed(node: NodeProto, prefix: str, keep: set[str]) -> NodeProto:
    """A node whose values, but those that stages hand over, have names of their own; also in its own branches."""
    new = NodeProto()
    new.CopyFrom(node)
    new.name = prefix + node.name
    for names in (new.input, new.output):
        names[:] = [name if name in keep or not name else prefix + name for name in names]
    for attribute in new.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            _rename_graph(graph, prefix, keep)
    return new


def _rename_graph(graph: GraphProto, prefix: str, keep: set[str]) -> None:
    nodes = [_renamed(node, prefix, keep) for node in graph.node]
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(nodes)
    for named in (*graph.input, *graph.output, *graph.initializer):
        named.name = named.name if named.name in keep else prefix + named.name


def _renamed_tensor(tensor: TensorProto, prefix: str) -> TensorProto:
    new = TensorProto()
    new.CopyFrom(tensor)
    new.name = prefix + tensor.name
    return new
