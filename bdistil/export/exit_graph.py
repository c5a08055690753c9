"""Composition of the graphs of the stages into one ONNX graph with early exits: an `If` after each stage but the last.

The condition of an `If` is a single boolean for the whole batch, determined by the sample with the lowest confidence,
so the graph is intended for one sample.

The weights of a stage are stored in the branch that uses them, as onnxruntime fully optimises a branch only if it
contains its weights: with weights in the outer graph, convolutions took twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, compose, helper, numpy_helper, parser

from bdistil.export.folder import seal

# Confidence of each sample, as in `bdistil.ensemble.budget.confidence_of`.
CONFIDENCE = {
    "max_prob": "confidence, index = TopK <axis = 1> (probability, one)",
    "margin": """
        largest, indices = TopK <axis = 1> (probability, two)
        first, second = Split <axis = 1> (largest, sizes)
        confidence = Sub (first, second)
    """,
    "entropy": """
        logarithm = LogSoftmax <axis = 1> (scaled)
        terms = Mul (probability, logarithm)
        sum = ReduceSum (terms, one)
        negative = Mul (sum, unit)
        confidence = Add (negative, unity)
    """,
}
RULES = tuple(CONFIDENCE)

DECISION = """
    scaled = Mul (TOTAL, scale)
    probability = Softmax <axis = 1> (scaled)
    CONFIDENCE
    lowest = ReduceMin <keepdims = 0> (confidence)
    threshold = Gather (thresholds, place)
    reached = GreaterOrEqual (lowest, threshold)
"""

ANSWER = """
    logits = Mul (TOTAL, factor)
    stages = Identity (number)
"""


def write_exits(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `exits.onnx`, with the rule of the fitted thresholds if it is one of `RULES`, otherwise `max_prob`.

    Args:
        folder: folder with the graphs of the stages.
        manifest: manifest of these graphs.

    Returns:
        `kind`, `graphs` and `rule` of the manifest's entry `fused`.
    """
    fitted, stages, path = manifest["exits"], manifest["stages"], folder / "exits.onnx"
    rule = fitted["rule"] if fitted and fitted["rule"] in RULES else RULES[0]
    onnx.save(ExitGraph(folder, manifest, rule).model(), str(path))
    total = stages[0]["outputs"][0]
    thresholds = {"name": "thresholds", "shape": [len(stages)], "dtype": total["dtype"]}
    entry = {
        **seal(path),
        "first": 1,
        "last": len(stages),
        "inputs": [*stages[0]["inputs"], thresholds],
        "outputs": [{**total, "name": "logits"}, {"name": "stages", "shape": [], "dtype": "int64"}],
    }
    return {"kind": "exits", "graphs": [entry], "rule": rule}


class ExitGraph:
    """Graph from x and `thresholds` (T,) to `logits` (B, L), in the teacher's units, and `stages`, the students run.

    Args:
        folder: folder with the graphs of the stages.
        manifest: manifest of these graphs.
        rule: exit rule, one of `RULES`.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], rule: str) -> None:
        self.stages, self.rule = manifest["stages"], rule
        self.temperatures = manifest["temperatures"] or [1.0] * len(self.stages)
        self.models = [onnx.load(str(folder / stage["file"])) for stage in self.stages]
        total = self.stages[0]["outputs"][0]
        self.outputs, self.dtype = int(total["shape"][1]), np.dtype(total["dtype"])
        self.onnx_dtype = helper.np_dtype_to_tensor_dtype(self.dtype)

    def model(self) -> ModelProto:
        """The complete model."""
        first, graph = self.models[0], self._from_stage(0)
        graph.input.extend(first.graph.input)  # the first stage reads only x
        graph.input.extend([helper.make_tensor_value_info("thresholds", self.onnx_dtype, [len(self.stages)])])
        opsets = {opset.domain: opset for model in self.models for opset in model.opset_import}
        functions = {function.name: function for model in self.models for function in model.functions}
        return helper.make_model(
            graph,
            ir_version=first.ir_version,
            opset_imports=list(opsets.values()),
            functions=list(functions.values()),
        )

    def _from_stage(self, number: int) -> GraphProto:
        """Graph of stage `number`, counted from 0, and all later ones, each with its weights."""
        prefix, source = f"s{number + 1}_", self.models[number].graph
        # add_prefix_graph renames weights after the subgraphs that may read them, unless they are in name_map.
        weights = {tensor.name: prefix + tensor.name for tensor in source.initializer}
        graph = compose.add_prefix_graph(source, prefix, rename_inputs=False, rename_outputs=False, name_map=weights)
        for field in ("input", "output", "value_info"):
            graph.ClearField(field)
        result = f"{prefix}result." if number else ""  # prefix of the outputs
        if number + 1 == len(self.stages):
            self._append(graph, ANSWER, number, result)
        else:
            self._append(graph, DECISION.replace("CONFIDENCE", CONFIDENCE[self.rule]), number, f"{prefix}exit.")
            answer = GraphProto(name=f"{prefix}answer", output=self._outputs(f"{prefix}answer."))
            self._append(answer, ANSWER, number, f"{prefix}answer.")
            branches = {"then_branch": answer, "else_branch": self._from_stage(number + 1)}
            names = [f"{result}logits", f"{result}stages"]
            graph.node.append(helper.make_node("If", [f"{prefix}exit.reached"], names, **branches))
        graph.output.extend(self._outputs(result))
        return graph

    def _append(self, graph: GraphProto, text: str, number: int, prefix: str) -> None:
        """Appends nodes, given as ONNX text, and the constants they read; prefixes all names that they define."""
        factor = self.stages[number]["factor"]
        scalars = {"factor": factor, "scale": factor / self.temperatures[number], "unity": 1.0}
        scalars["unit"] = 1 / math.log(self.outputs) if self.outputs > 1 else 1.0
        constants = {name: np.array(value, self.dtype) for name, value in scalars.items()}
        whole = {"place": number, "number": number + 1, "one": [1], "two": [2], "sizes": [1, 1]}
        constants |= {name: np.array(value, np.int64) for name, value in whole.items()}
        part = parser.parse_graph(f"part () => () {{{text.replace('TOTAL', f'total_{number + 1}')}}}")
        read = {name for node in part.node for name in node.input}
        part.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in constants.items() if name in read
        )
        part = compose.add_prefix_graph(part, prefix)
        graph.node.extend(part.node)
        graph.initializer.extend(part.initializer)

    def _outputs(self, prefix: str) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(f"{prefix}logits", self.onnx_dtype, ["batch", self.outputs]),
            helper.make_tensor_value_info(f"{prefix}stages", onnx.TensorProto.INT64, []),
        ]
