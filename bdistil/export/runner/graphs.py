"""Graphs of onnxruntime, alone and in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .budget import Array
from .files import ExportError, read_file

SPARE = 8  # batch sizes whose arrays are kept


def open_session(data: bytes, name: str, threads: int) -> ort.InferenceSession:
    """A graph ready to run.

    Raises:
        ExportError: it is no graph that onnxruntime can run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common class for its errors
        raise ExportError(f"{name} cannot be run by onnxruntime {ort.__version__}: {error}") from error


class Graph:
    """A session, the names of what it reads and gives, and the stages that it runs, from 1."""

    def __init__(self, root: Path, entry: Mapping[str, Any], threads: int) -> None:
        self.session = open_session(read_file(root, entry), entry["file"], threads)
        self.inputs, self.outputs, self.file = entry["inputs"], entry["outputs"], entry["file"]
        self.first, self.last = entry["first"], entry["last"]
        self.reads = [tensor["name"] for tensor in self.inputs]
        self.gives = [tensor["name"] for tensor in self.outputs]
        found = sorted(tensor.name for tensor in self.session.get_inputs())
        if found != sorted(self.reads):
            raise ExportError(f"{self.file} reads {found}, but the manifest says {sorted(self.reads)}.")
        self._hold_to_shapes()

    def _hold_to_shapes(self) -> None:
        """Arrays are made by the manifest's shapes, so these have to be those of the graph, where it knows them."""
        have = {tensor.name: tensor.shape for tensor in (*self.session.get_inputs(), *self.session.get_outputs())}
        for tensor in (*self.inputs, *self.outputs):
            said, real = tensor["shape"], have.get(tensor["name"], ())
            same = [a == b or not isinstance(b, int) for a, b in zip(said, real)]  # noqa: B905
            if real and not (len(said) == len(real) and all(same)):
                raise ExportError(f"{self.file} has {tensor['name']} as {real}, but the manifest says {said}.")

    def run(self, values: dict[str, Array]) -> None:
        """Adds what the graph gives to the values."""
        gives = self.session.run(self.gives, {name: values[name] for name in self.reads})
        values.update(zip(self.gives, gives))  # noqa: B905


def require_order(graphs: Sequence[Graph]) -> None:
    """Does each graph read only x and what those before it gave?

    Raises:
        ExportError: one reads something else, which would be left-over memory.
    """
    given = {"x"}
    for graph in graphs:
        if missing := sorted(set(graph.reads) - given):
            raise ExportError(f"{graph.file} reads {missing}, which no stage before it gives. Export again.")
        given |= set(graph.gives)


class Chain:
    """Graphs in a row over arrays of their own, at one batch size.

    The arrays are bound once, so that between two graphs nothing is allocated, named or checked: for tiny students that
    is a quarter of the time. What is read from `values` has to be copied before the next run.

    Attributes:
        values: by name; whoever runs the chain writes what no graph gives.
        steps: one call a graph.
    """

    def __init__(self, graphs: Sequence[Graph], batch: int) -> None:
        self.values: dict[str, Array] = {}
        self.steps: list[Callable[[], object]] = []
        for graph in graphs:
            binding = graph.session.io_binding()
            for tensor in graph.inputs:
                binding.bind_input(*self._bound(tensor, batch))
            for tensor in graph.outputs:
                binding.bind_output(*self._bound(tensor, batch))
            self.steps.append(partial(graph.session.run_with_iobinding, binding))

    def _bound(self, tensor: Mapping[str, Any], batch: int) -> tuple[Any, ...]:
        """Name, device, type, shape and address of the array of a tensor, which is made where there is none yet."""
        name = tensor["name"]
        if name not in self.values:
            shape = [batch if size == "batch" else size for size in tensor["shape"]]
            self.values[name] = np.zeros(shape, tensor["dtype"])
        array = self.values[name]
        return name, "cpu", 0, array.dtype, array.shape, array.ctypes.data


class Chains:
    """Chains of the same graphs by batch size. One that is taken belongs to the taker alone, also among threads."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self.graphs = graphs
        self._spare: dict[int, Chain] = {}

    def take(self, batch: int) -> Chain:
        """A chain for a batch size, kept or new."""
        return self._spare.pop(batch, None) or Chain(self.graphs, batch)

    def put(self, batch: int, chain: Chain) -> None:
        """Keeps a chain for the next taker."""
        if len(self._spare) >= SPARE:
            self._spare.clear()
        self._spare[batch] = chain
