"""`bdistil export`: one graph a stage, a manifest, and a runner that needs no torch.

The export is checked before it says done: every stage against PyTorch on 256 samples at several batch sizes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bdistil.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError, UserError
from bdistil.export_data import ExportData, data_of
from bdistil.export_folder import FORMAT, VERSION, check_output, graph_entry, new_folder, seal
from bdistil.export_graphs import (
    EXPORTERS,
    Exporter,
    Normalisation,
    Segment,
    links_by_stage,
    opset_of,
    quiet_exporters,
    require_symbolic,
    torch_file,
)
from bdistil.export_parity import Parity, Run, prove_parity, reference
from bdistil.run_directory import RunDirectory

EXAMPLE = 3  # samples; a batch of one may silently become a constant


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        format: ``onnx``, which runs without torch, or ``torch``, the .pt2 archives of torch.export for other tools.
        normalisation: ``declared`` exports students that read x as in training; ``inside`` puts the normalisation that
            the data module declares into the graphs, which then read raw x.
        quantise: int8 weights: ``dynamic`` takes the ranges of activations from each batch, ``static`` from training
            samples.
        fuse: ``pairs`` adds one graph for each two stages, used where it was measured to be faster.
        overwrite: replace an older export.
    """

    format: Literal["onnx", "torch"] = "onnx"
    normalisation: Literal["declared", "inside"] = "declared"
    quantise: Literal["dynamic", "static"] | None = None
    fuse: Literal["pairs"] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        chosen = [f"--{name}" for name in ("quantise", "fuse") if getattr(self, name)]
        if self.format == "torch" and chosen:
            raise UserError(f"`{chosen[0]}` is for --format onnx, got --format torch. Leave one out.")
        if len(chosen) == 2:
            raise UserError("`--quantise` and `--fuse` are for one stage and for two: give one of them, not both.")


class Export:
    """One export under way.

    Args:
        ensemble: on the CPU.
        data: samples and declarations.
        options: how to export.
    """

    def __init__(self, ensemble: ProgressiveEnsemble, data: ExportData, options: ExportOptions) -> None:
        self.ensemble, self.data, self.options = ensemble, data, options
        self.inside: Normalisation | None = None
        if options.normalisation == "inside":
            if data.normalisation is None:
                raise UserError(
                    "Expected a data module that declares its `normalisation` for --normalisation inside, got "
                    f"{type(data.datamodule).__name__} without it. Use --normalisation declared and normalise x before."
                )
            self.inside = data.normalisation
        self.raw = self.to_raw(data.x)
        self.values = {**reference(ensemble, data.x[:EXAMPLE]), "x": self.raw[:EXAMPLE]}

    def to_raw(self, x: Tensor) -> Tensor:
        """Samples as the graphs read them, of samples as in training."""
        return x if self.inside is None else x * self.inside[1] + self.inside[0]

    def segment(self, numbers: Sequence[int]) -> Segment:
        """Stages as one module."""
        return Segment(self.ensemble, numbers, self.inside)

    def write(self, folder: Path, name: str, numbers: Sequence[int], exporter: Exporter) -> dict[str, Any]:
        """Writes one graph; gives its entry in the manifest."""
        segment, path = self.segment(numbers), folder / name
        exporter(segment, [self.values[name] for name in segment.reads], path)
        return graph_entry(path, segment, self.values)

    def stages(self, folder: Path, suffix: str, exporter: Exporter) -> list[dict[str, Any]]:
        """Writes the graph of every stage."""
        weights = self.ensemble.figures.weights or (1.0,) * len(self.ensemble)
        entries = []
        for number, links in enumerate(links_by_stage(list(self.ensemble.students))):
            entry = self.write(folder, f"stage_{number + 1:02d}.{suffix}", [number], exporter)
            factor = self.ensemble.scale / sum(weights[: number + 1])
            more = {"links": [n + 1 for n in links], "macs": self.ensemble.macs[number], "factor": _plain(factor)}
            entries.append({**entry, **more, "weight": weights[number]})
        return entries

    def prove(self, run: Run) -> dict[str, Any]:
        """Compares with PyTorch; gives the differences for the manifest."""
        found: Parity = prove_parity(run, self.ensemble, self.data.x, self.raw, self.data.source)
        return asdict(found)


def export_run(run: RunDirectory, output: Path, options: ExportOptions | None = None) -> dict[str, Any]:
    """Exports the ensemble of a run.

    Args:
        run: the run directory.
        output: a new folder.
        options: how to export.

    Returns:
        The manifest.

    Raises:
        UserError: nothing is committed there, `output` is taken, or a package is missing.
        RunError: a graph could not be made or is not equal to PyTorch; nothing is left behind.
    """
    options = options or ExportOptions()
    check_output(output, options.overwrite)
    _require(["onnx", "onnxruntime"] if options.format == "onnx" else [])
    ensemble = ProgressiveEnsemble.load(run.root)
    export = Export(ensemble, data_of(run, ensemble), options)
    with new_folder(output) as folder:
        manifest = _manifest(export)
        torch_format = options.format == "torch"
        manifest |= _torch_files(export, folder) if torch_format else _onnx_files(export, folder, manifest)
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _require(packages: Sequence[str]) -> None:
    for package in packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UserError(
                f"Exporting needs the package `{package}`, which is not installed. pip install 'bdistil[export]'"
            ) from None


def _manifest(export: Export) -> dict[str, Any]:
    """What does not depend on the files."""
    ensemble, data, figures = export.ensemble, export.data, export.ensemble.figures
    outputs = export.values["total_1"].shape[1]
    if data.labels is not None and len(data.labels) != outputs:
        raise UserError(f"Expected `labels` of the data module to be {outputs} names, got {len(data.labels)}.")
    names = ("bdistil", "torch", "onnx", "onnxruntime")
    plain = figures.plain()
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": export.options.format,
        "input": {"name": "x", "shape": list(data.x.shape[1:]), "dtype": str(data.x.dtype).removeprefix("torch.")},
        "outputs": outputs,
        "labels": data.labels,
        "normalisation": _declared(data.normalisation, export.inside is not None),
        "task": ensemble.task,
        "scale": _plain(ensemble.scale),
        "offset": _plain(ensemble.offset),
        "temperatures": plain["temperatures"],
        "exits": plain["exits"],
        "quantised": None,
        "fused": None,
        "times": [],
        "versions": {name: _version(name) for name in names},
    }


def _declared(normalisation: Normalisation | None, inside: bool) -> dict[str, Any] | None:
    if normalisation is None:
        return None
    mean, deviation = (tensor.tolist() for tensor in normalisation)
    return {"mean": mean, "deviation": deviation, "inside": inside}


def _plain(value: float | Tensor | None) -> Any:
    """A factor for JSON: of real outputs one an output."""
    return value.tolist() if isinstance(value, Tensor) else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_files(export: Export, folder: Path) -> dict[str, Any]:
    entries = export.stages(folder, "pt2", torch_file)
    modules = [torch.export.load(folder / entry["file"]).module() for entry in entries]

    def run(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        segment = entries[number]
        gives = modules[number](*(values[tensor["name"]] for tensor in segment["inputs"]))
        return dict(zip((tensor["name"] for tensor in segment["outputs"]), gives, strict=True))

    return {"exporter": "torch.export", "stages": entries, "parity": export.prove(run)}


def _onnx_files(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The graphs of the first exporter whose graphs are equal to PyTorch, the runner, and what it measures here."""
    from bdistil.runner import ExportedEnsemble

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
    runner = folder / "runner.py"
    shutil.copyfile(Path(__file__).with_name("runner.py"), runner)
    found: dict[str, Any] = {
        "exporter": name,
        "opset": opset_of(folder / entries[0]["file"]),
        "stages": entries,
        "parity": parity,
        "runner": seal(runner),
    }
    manifest, options = {**manifest, **found}, export.options
    if options.quantise:
        from bdistil.export_int8 import int8_stages

        found |= int8_stages(folder, manifest, options.quantise, export.data.datamodule, export.to_raw)
    if options.fuse:
        from bdistil.export_fuse import choose_pairs, pairs_of, prove_pairs

        pairs = [
            export.write(folder, f"pair_{first + 1:02d}_{last + 1:02d}.onnx", [first, last], EXPORTERS[name])
            for first, last in pairs_of(len(entries))
        ]
        found["fused"] = choose_pairs(folder, manifest, pairs, export.raw)
        difference = prove_pairs(folder, {**manifest, **found}, export.ensemble, export.data.x, export.raw)
        found["fused"]["difference"] = difference
    return {**found, "times": ExportedEnsemble(folder, {**manifest, **found}, threads=1).measure()}


def onnx_run(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Run:
    """Stages run by the runner's own code.

    Raises:
        RunError: a graph is fixed at one batch size.
    """
    from bdistil.runner import Graph

    graphs = [Graph(folder, entry, threads=1) for entry in entries]
    for graph in graphs:
        require_symbolic({tensor.name: tensor.shape[0] for tensor in graph.session.get_inputs()})

    def run(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = graphs[number]
        arrays = {name: values[name].numpy() for name in graph.reads}
        graph.run(arrays)
        return {name: torch.from_numpy(arrays[name]) for name in graph.gives}

    return run


def export_summary(manifest: Mapping[str, Any], output: Path) -> str:
    """What was exported, as a table: a stage a row."""
    parity = manifest["parity"]
    lines = [f"{'stage':>5} {'macs':>12} {'bytes':>10} {'difference':>11}"]
    for number, (stage, found) in enumerate(zip(manifest["stages"], parity["differences"], strict=True), 1):
        lines.append(f"{number:>5} {stage['macs']:>12,} {stage['bytes']:>10,} {found:>11.1e}")
    lines.append(f"\nDifferences to PyTorch on {parity['samples']} samples of {parity['source']}.")
    if int8 := manifest["quantised"]:
        lines.append("Accuracy of the prefixes on the validation part, and bytes of all stages:")
        for name in ("float", "int8"):
            figures = "  ".join(f"{accuracy:.4f}" for accuracy in int8[name]["accuracy"])
            lines.append(f"  {name:<6} {figures}  {int8[name]['bytes']:>12,}")
    if fused := manifest["fused"]:
        chosen = "pairs" if fused["faster"] else "stages"
        for batch, found in fused["latency"].items():
            lines.append(f"Batch {batch}: {found['stages_ms']:.3f} ms by stages, {found['pairs_ms']:.3f} ms by pairs.")
        lines.append(f"Without exits the runner takes {chosen}.")
    return "\n".join([*lines, f"{output}"])
