"""Writers of the files of each format; they return the manifest entries."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdistil.errors import RunError, UserError
from bdistil.export.folder import copy_runner, graph_entry
from bdistil.export.graphs import EXPORTERS, Segment, torch_file, traced_onnx
from bdistil.export.job import Export
from bdistil.export.parity import RunStage


def torch_files(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a `.pt2` archive per stage."""
    entries = export.write_stages(folder, "pt2", torch_file)
    modules = [torch.export.load(folder / entry["file"]).module() for entry in entries]

    def run_stage(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        entry = entries[number]
        outputs = modules[number](*(values[tensor["name"]] for tensor in entry["inputs"]))
        return dict(zip((tensor["name"] for tensor in entry["outputs"]), outputs, strict=True))

    return {"exporter": "torch.export", "stages": entries, "parity": export.compare(run_stage)}


def onnx_files(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the graphs of the first exporter that matches PyTorch, and the runner with its times on this machine."""
    import onnx

    from bdistil.runner import ExportedEnsemble

    problems, exporters = [], dict(EXPORTERS)
    if export.datamodule is None and any(map(export.reads_values, range(len(export.ensemble)))):
        # Random samples may all take one branch, or have one length: the comparison would miss what became a constant.
        exporters["torchscript"] = partial(traced_onnx, constants=False)
    for name, exporter in exporters.items():
        try:
            entries = export.write_stages(folder, "onnx", exporter)
            parity = export.compare(_onnx_stages(folder, entries))
            break
        except Exception as error:  # errors of torch's exporters share no base class
            problems.append(f"{name}: {error}")
    else:
        raise RunError(
            "\n".join(("No exporter of torch wrote graphs that match PyTorch.", *problems))
            + "\nReplace what they name in the students; in place of pack_padded_sequence, mask the padded steps."
        )
    opset = onnx.load(str(folder / entries[0]["file"])).opset_import[0].version
    found: dict[str, Any] = {"exporter": name, "opset": opset, "stages": entries, "parity": parity}
    found["runner"] = copy_runner(folder)
    options = export.options
    if options.quantise:
        from bdistil.export.int8 import int8_stages

        found |= int8_stages(export, folder, {**manifest, **found})
    if options.fuse:
        from bdistil.export.fusion import fuse_all, fuse_exits

        fuse = fuse_exits if options.fuse == "exits" else fuse_all
        found["fused"] = fuse(export, folder, {**manifest, **found})
    return {**found, "times": ExportedEnsemble(folder, {**manifest, **found}, threads=1).measure()}


def _onnx_stages(folder: Path, entries: Sequence[Mapping[str, Any]]) -> RunStage:
    """Returns a function that runs the stages with the code of the runner."""
    from bdistil.runner import Graph

    graphs = [Graph(folder, entry, threads=1) for entry in entries]

    def run_stage(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = graphs[number]
        arrays = {name: values[name].numpy() for name in graph.reads}
        graph.run(arrays)
        return {name: torch.from_numpy(arrays[name]) for name in graph.gives}

    return run_stage


def executorch_files(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one program with a method per stage, for one sample per call, as is usual on a device.

    A dynamic batch size is left to ONNX, as lowering silently narrows its range if a stage reads outputs of another.
    """
    if export.ensemble.inputs.varies:
        raise UserError(
            "Expected samples of one shape for --format executorch, whose memory is planned ahead, got lengths that "
            "vary. Pad them to one length in the data, or export to onnx."
        )
    path, segments = folder / "ensemble.pte", [export.segment([number]) for number in range(len(export.ensemble))]
    values = {name: value[:1] for name, value in export.values.items()}
    _write_program(segments, values, path)
    entries = [
        {**graph_entry(path, segment, values, batch=1), "method": method_name(number), **export.describe(number)}
        for number, segment in enumerate(segments)
    ]
    parity = export.compare(_program_stages(path, segments), batches=(1,))
    return {"exporter": "executorch", "stages": entries, "parity": parity}


def method_name(number: int) -> str:
    """Name of the ExecuTorch method of a stage, counted from 0."""
    return f"stage_{number + 1:02d}"


def _write_program(segments: Sequence[Segment], values: Mapping[str, Tensor], path: Path) -> None:
    """Writes a `.pte` file that delegates supported operators to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and ExecuTorch warn about their own code
        programs = {
            method_name(number): torch.export.export(segment, tuple(values[name] for name in segment.reads))
            for number, segment in enumerate(segments)
        }
        lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)


def _program_stages(path: Path, segments: Sequence[Segment]) -> RunStage:
    """Returns a function that runs the stages with the ExecuTorch runtime."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(path))
    methods = [program.load_method(method_name(number)) for number in range(len(segments))]

    def run_stage(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert program.method_names  # keeps `program` alive, without which its methods crash
        outputs: Sequence[Any] = methods[number].execute([values[name].contiguous() for name in segments[number].reads])
        # The runtime returns views of memory that the next call overwrites.
        return {name: tensor.clone() for name, tensor in zip(segments[number].gives, outputs, strict=True)}

    return run_stage


FORMATS = {"onnx": onnx_files, "torch": torch_files, "executorch": executorch_files}
