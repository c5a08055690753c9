"""`bdistil export`: one graph per stage, a manifest, and a runner that needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdistil.errors import UserError
from bdistil.export.folder import check_output, new_folder
from bdistil.export.formats import FORMATS
from bdistil.export.job import Export, ExportOptions, to_list
from bdistil.reporting.tables import format_table
from bdistil.runner.graphs import FORMAT, VERSION
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils.packages import installed_versions

__all__ = ["ExportOptions", "export_run", "export_summary"]

PACKAGES = ("bdistil", "torch", "onnx", "onnxruntime", "executorch")  # their versions are in the manifest
# By format: the extra of this package and the packages it installs.
NEEDED = {"onnx": ("export", ("onnx", "onnxruntime")), "executorch": ("executorch", ("executorch",))}


def export_run(run: RunDirectory, output: Path, options: ExportOptions | None = None) -> dict[str, Any]:
    """Exports the ensemble of a run, after comparing every stage with PyTorch at several batch sizes.

    Example::

        manifest = export_run(RunDirectory("runs/digits"), Path("exported"), ExportOptions(fuse="exits"))
        print(max(manifest["parity"]["differences"]))

    Args:
        run: the run directory.
        output: a new folder.
        options: options of the export.

    Returns:
        The manifest.

    Raises:
        UserError: no round is committed in the run, `output` exists, or a package is missing.
        RunError: a graph could not be written or differs from PyTorch; nothing is left behind.
    """
    options = options or ExportOptions()
    check_output(output, options.overwrite)
    extra, packages = NEEDED.get(options.format, ("", ()))
    if missing := [package for package in packages if package not in installed_versions(packages)]:
        raise UserError(
            f"Exporting needs the package `{missing[0]}`, which is not installed. pip install 'bdistil[{extra}]'"
        )
    export = Export(run, options)
    with new_folder(output) as folder:
        manifest = _manifest(export)
        manifest |= FORMATS[options.format](export, folder, manifest)
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _manifest(export: Export) -> dict[str, Any]:
    """Entries of the manifest that do not depend on the files."""
    ensemble, labels = export.ensemble, _class_names(export.datamodule)
    outputs, normalisation = export.values["total_1"].shape[1], export.normalisation
    if labels is not None and len(labels) != outputs:
        raise UserError(f"Expected `labels` of the data module to be {outputs} names, got {len(labels)}.")
    declared = None
    if normalisation is not None:
        mean, deviation = (tensor.tolist() for tensor in normalisation)
        declared = {"mean": mean, "deviation": deviation, "inside": export.inside is not None}
    calibration = ensemble.calibration.to_dict()
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": export.options.format,
        "inputs": _inputs(export),
        "outputs": outputs,
        "labels": labels,
        "normalisation": declared,
        "task": ensemble.task,
        "scale": to_list(ensemble.scale),
        "offset": to_list(ensemble.offset),
        "temperatures": calibration["temperatures"],
        "exits": calibration["exits"],
        "shares": calibration["shares"],
        "quantised": None,
        "fused": None,
        "times": [],
        "versions": dict.fromkeys(PACKAGES) | installed_versions(PACKAGES),
    }


def _class_names(datamodule: Any) -> list[str] | None:
    """The attribute `labels` of a data module if it holds class names, and not, for example, the labels of samples."""
    labels = getattr(datamodule, "labels", None)
    names = list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else []
    return [str(name) for name in names] if names and all(isinstance(name, str) for name in names) else None


def _inputs(export: Export) -> list[dict[str, Any]]:
    """Manifest entries of the tensors of x: name, key in x, and sizes of one sample.

    A varying size is given by a name; `largest` holds its largest value in the data of the run, and `least` the
    smallest that the students read in PyTorch. `negative` tells whether they read negative numbers.
    """
    inputs, sizes, entries = export.ensemble.inputs, export.segment([0]).sizes, []
    least = export.least()
    for (name, spec), path in zip(inputs.tensors().items(), inputs.paths(), strict=True):
        known = zip(sizes[name], spec.shape or (), strict=True)
        largest = {axis: size[1] for axis, size in known if isinstance(size, tuple)}
        entry = {"name": name, "path": path, "shape": sizes[name], "dtype": spec.dtype}
        smallest, negative = {axis: least[str(axis)] for axis in largest}, export.reads_negative(name)
        entries.append({**entry, "largest": largest, "least": smallest, "negative": negative})
    return entries


def export_summary(manifest: Mapping[str, Any], output: Path) -> str:
    """Formats a summary of the export as a table with one row per stage."""
    parity = manifest["parity"]
    rows = [
        [f"{number}", f"{stage['macs']:,}", f"{stage['bytes']:,}", f"{difference:.1e}"]
        for number, (stage, difference) in enumerate(zip(manifest["stages"], parity["differences"], strict=True), 1)
    ]
    lines = [format_table(["stage", "macs", "bytes", "difference"], rows)]
    of = "The float graphs' differences" if manifest["quantised"] else "Differences"
    lines.append(f"\n{of} to PyTorch on {parity['samples']} samples of {parity['source']}.")
    if manifest["kind"] == "executorch":
        lines.append("All stages are methods of one file, whose bytes are shown; a method reads one sample per call.")
    if int8 := manifest["quantised"]:
        lines.append("Accuracy of the prefixes on the validation part, and bytes of all stages:")
        for name in ("float", "int8"):
            accuracies = "  ".join(f"{accuracy:.4f}" for accuracy in int8[name]["accuracy"])
            lines.append(f"  {name:<6} {accuracies}  {int8[name]['bytes']:>12,}")
    if fused := manifest["fused"]:
        kind = fused["kind"]
        for batch, found in fused["latency"].items():
            single, one = (" ".join(f"{v:.3f}" for v in np.atleast_1d(found[k])) for k in ("stages_ms", "fused_ms"))
            lines.append(f"Batch {batch}: {single} ms by single stages, {one} ms by --fuse {kind}.")
        use = "one sample with exits" if kind == "exits" else "all stages"
        lines.append(f"For {use} the runner uses {'the fused graph' if fused['faster'] else 'single stages'}.")
    return "\n".join([*lines, f"{output}"])
