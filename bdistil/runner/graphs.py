"""Files of an exported folder, checked against its manifest, and the onnxruntime sessions that run its graphs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .budget import ExportError
from .confidence import Array

FORMAT, VERSION = "bdistil-export", 1
Sizes = tuple[tuple[str, int], ...]  # sizes that vary, by name
SPARE = 16  # batch sizes for which a pool keeps arrays


def read_manifest(root: Path) -> dict[str, Any]:
    """Reads the manifest of an exported folder.

    Raises:
        ExportError: it is missing, damaged, or of another format or version.
    """
    path = root / "manifest.json"
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"Expected {path} to be the manifest of an export, got {type(error).__name__}: {error}. Give the folder "
            "that `bdistil export` wrote, or export again."
        ) from error
    if not known:
        raise ExportError(
            f"Expected {path} of format {FORMAT!r}, got {manifest['format']!r}. Give the folder that `bdistil export` "
            "wrote."
        )
    version = manifest.get("version", "none")
    if type(version) is not int or version != VERSION:
        raise ExportError(
            f"{path} has version {version!r}, but this runner reads version {VERSION}: export the run again, or load "
            f"it with the runner in {root}."
        )
    return manifest


def read_file(root: Path, entry: Mapping[str, Any]) -> bytes:
    """Reads a file that the manifest names.

    Raises:
        ExportError: it lies outside the folder, is missing, or differs from its size or sha256 in the manifest.
    """
    name, remedy = str(entry["file"]), "Copy the exported folder again, or export again."
    path = root / name
    if name != os.path.basename(name) or "\\" in name or name in ("", ".", "..") or path.is_symlink():
        raise ExportError(
            f"Expected the manifest of {root} to name a file in this folder, got {name!r}: no path may leave it. "
            f"{remedy}"
        )
    if not path.is_file():
        raise ExportError(f"{path} is missing; expected {entry['bytes']} bytes, sha256 {entry['sha256']}. {remedy}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        state = f"{len(data)} of {entry['bytes']} bytes" if len(data) < entry["bytes"] else "another file"
        raise ExportError(f"{path} is {state}: sha256 {found}, expected {entry['sha256']}. {remedy}")
    return data


class Graph:
    """The onnxruntime session of one graph.

    Args:
        root: the exported folder.
        entry: manifest entry of the graph.
        threads: threads of onnxruntime.

    Attributes:
        reads: names of the inputs.
        gives: names of the outputs.

    Raises:
        ExportError: onnxruntime cannot run the file, or its tensors are not those of the manifest.
    """

    def __init__(self, root: Path, entry: Mapping[str, Any], threads: int) -> None:
        import onnxruntime as ort  # only here: ensembles in torch use this package without it

        self.inputs, self.outputs, self.file = entry["inputs"], entry["outputs"], entry["file"]
        options, data = ort.SessionOptions(), read_file(root, entry)
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.log_severity_level = 4
        try:
            self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise ExportError(f"{self.file} cannot be run by onnxruntime {ort.__version__}: {error}") from error
        self.reads = [tensor["name"] for tensor in self.inputs]
        self.gives = [tensor["name"] for tensor in self.outputs]
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Compares names and shapes of the graph with the manifest, by whose shapes arrays are allocated."""
        found = sorted(tensor.name for tensor in self.session.get_inputs())
        if found != sorted(self.reads):
            raise ExportError(f"{self.file} reads {found}, but the manifest has {sorted(self.reads)}.")
        shapes = {tensor.name: tensor.shape for tensor in (*self.session.get_inputs(), *self.session.get_outputs())}
        for tensor in (*self.inputs, *self.outputs):
            declared, shape = tensor["shape"], shapes.get(tensor["name"], ())
            same = [a == b or not isinstance(b, int) for a, b in zip(declared, shape)]  # noqa: B905
            if shape and not (len(declared) == len(shape) and all(same)):
                raise ExportError(f"{self.file} has {tensor['name']} as {shape}, but the manifest has {declared}.")

    def run(self, values: dict[str, Array]) -> None:
        """Runs the graph on `values`, by name, and adds its outputs to them."""
        outputs = self.session.run(self.gives, {name: values[name] for name in self.reads})
        values.update(zip(self.gives, outputs))  # noqa: B905


class Pipeline:
    """Graphs in sequence on preallocated arrays of one size.

    Inputs and outputs are bound once, so that a run allocates nothing: this saves a quarter of the time of tiny
    convolutional students. Copy results from `values` before the next run.

    Args:
        graphs: graphs in order.
        sizes: (name, size) pairs of the sizes that vary: ``batch`` and lengths.

    Attributes:
        values: arrays by name; the caller fills those that no graph computes.
        steps: one call per graph.
        sizes: as given.
    """

    def __init__(self, graphs: Sequence[Graph], sizes: Sizes) -> None:
        self.sizes, named = sizes, dict(sizes)
        self.values: dict[str, Array] = {}
        self.steps: list[Callable[[], object]] = []
        for graph in graphs:
            binding = graph.session.io_binding()
            for tensor in graph.inputs:
                binding.bind_input(*self._bound(tensor, named))
            for tensor in graph.outputs:
                binding.bind_output(*self._bound(tensor, named))
            # onnxruntime ends the process where a GRU or LSTM gets no sample; there is nothing to compute.
            self.steps.append(partial(graph.session.run_with_iobinding, binding) if named["batch"] else _nothing)

    def _bound(self, tensor: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """Arguments that bind a tensor to its array, which is allocated at its first use."""
        name = tensor["name"]
        if name not in self.values:
            shape = [sizes[size] if isinstance(size, str) else size for size in tensor["shape"]]
            self.values[name] = np.zeros(shape, tensor["dtype"])
        array = self.values[name]
        return name, "cpu", 0, array.dtype, array.shape, array.ctypes.data


def _nothing() -> None:
    """The step of a graph without samples."""


class PipelinePool:
    """Thread-safe pool of pipelines of the same graphs, by size. Each acquired one is used by a single caller.

    Args:
        graphs: graphs in order.
        inputs: names of the arrays that the caller fills.

    Raises:
        ExportError: a graph reads an array that neither the caller nor an earlier graph fills.
    """

    def __init__(self, graphs: Sequence[Graph], inputs: Sequence[str] = ("x",)) -> None:
        self.graphs, known = graphs, set(inputs)
        self._spare: dict[Sizes, Pipeline] = {}
        self._varying = {  # (array, axis) of each size that varies, by its name
            size: (tensor["name"], axis)
            for graph in graphs
            for tensor in graph.inputs
            for axis, size in enumerate(tensor["shape"])
            if isinstance(size, str) and tensor["name"] in inputs
        }
        for graph in graphs:
            if missing := sorted(set(graph.reads) - known):
                raise ExportError(f"{graph.file} reads {missing}, which no stage before it gives. Export again.")
            known |= set(graph.gives)
        self.read_later = [self._read_later(count) for count in range(len(graphs) + 1)]

    def _read_later(self, count: int) -> list[str]:
        """Names of the arrays, available after the first `count` graphs, that later ones read."""
        given = {name for graph in self.graphs[count:] for name in graph.gives}
        return sorted({name for graph in self.graphs[count:] for name in graph.reads} - given)

    def acquire(self, arrays: Mapping[str, Array]) -> Pipeline:
        """A pooled or new pipeline with a batch, arrays (B, ...) by name, as its inputs."""
        sizes = tuple((size, arrays[name].shape[axis]) for size, (name, axis) in self._varying.items())
        pipeline = self.take(sizes)
        for name, array in arrays.items():
            pipeline.values[name][...] = array
        return pipeline

    def take(self, sizes: Sizes) -> Pipeline:
        """A pooled or new pipeline whose inputs are yet to be filled."""
        return self._spare.pop(sizes, None) or Pipeline(self.graphs, sizes)

    def release(self, pipeline: Pipeline) -> None:
        """Returns a pipeline to the pool."""
        if len(self._spare) >= SPARE:
            self._spare.clear()
        self._spare[pipeline.sizes] = pipeline
