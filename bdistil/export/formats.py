"""The files of each format, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdistil.errors import RunError
from bdistil.export.folder import copy_runner, graph_entry
from bdistil.export.graphs import EXPORTERS, opset_of, quiet_exporters, require_symbolic, torch_file
from bdistil.export.job import Export
from bdistil.export.parity import Run


def torch_files(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A `.pt2` archive a stage."""
    entries = export.stages(folder, "pt2", torch_file)
    modules = [torch.export.load(folder / entry["file"]).module() for entry in entries]

    def run(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        segment = entries[number]
        gives = modules[number](*(values[tensor["name"]] for tensor in segment["inputs"]))
        return dict(zip((tensor["name"] for tensor in segment["outputs"]), gives, strict=True))

    return {"exporter": "torch.export", "stages": entries, "parity": export.prove(run)}


def executorch_files(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """One program with a method a stage."""
    from bdistil.export.executorch import method_name, program_run, write_program

    path, segments = folder / "ensemble.pte", [export.segment([number]) for number in range(len(export.ensemble))]
    write_program(segments, export.values, path)
    entries = []
    for number, segment in enumerate(segments):
        one = {name: value[:1] for name, value in export.values.items()}
        entry = graph_entry(path, segment, one, batch=1)
        entries.append({**entry, "method": method_name(number), **export.about(number)})
    parity = export.prove(program_run(path, segments), batches=(1,))
    return {"exporter": "executorch", "stages": entries, "parity": parity}


def onnx_files(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The graphs of the first exporter whose graphs are equal to PyTorch, the runner, and what it measures here."""
    from bdistil.export.runner import ExportedEnsemble

    quiet_exporters()
    problems = []
    for name, exporter in EXPORTERS.items():
        try:
            entries = export.stages(folder, "onnx", exporter)
            parity = export.prove(onnx_run(folder, entries))
            break
        except Exception as error:  # torch's exporters have no common class for their errors
            problems.append(f"{name}: {error}")
    else:
        raise RunError("No exporter of torch gave graphs that are equal to PyTorch.\n" + "\n".join(problems))
    found: dict[str, Any] = {
        "exporter": name,
        "opset": opset_of(folder / entries[0]["file"]),
        "stages": entries,
        "parity": parity,
        "runner": copy_runner(folder),
    }
    manifest, options = {**manifest, **found}, export.options
    if options.quantise:
        from bdistil.export.int8 import int8_stages

        found |= int8_stages(folder, manifest, options.quantise, export.data.datamodule, export.to_raw)
    if options.fuse:
        from bdistil.export.fusion import fuse_all, fuse_exits

        fuse = fuse_exits if options.fuse == "exits" else fuse_all
        found["fused"] = fuse(export, folder, {**manifest, **found})
    return {**found, "times": ExportedEnsemble(folder, {**manifest, **found}, threads=1).measure()}


def onnx_run(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Run:
    """Stages run by the runner's own code.

    Raises:
        RunError: a graph is fixed at one batch size.
    """
    from bdistil.export.runner import Graph

    graphs = [Graph(folder, entry, threads=1) for entry in entries]
    for graph in graphs:
        require_symbolic({tensor.name: tensor.shape[0] for tensor in graph.session.get_inputs()})

    def run(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = graphs[number]
        arrays = {name: values[name].numpy() for name in graph.reads}
        graph.run(arrays)
        return {name: torch.from_numpy(arrays[name]) for name in graph.gives}

    return run


FORMATS = {"onnx": onnx_files, "torch": torch_files, "executorch": executorch_files}
