"""`bdistil export`: one graph a stage, a manifest, and a runner that needs no torch.

The export is checked before it says done: every stage against PyTorch on 256 samples at several batch sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.export.folder import FORMAT, VERSION, check_output, new_folder
from bdistil.export.formats import FORMATS
from bdistil.export.graphs import Normalisation
from bdistil.export.job import Export, ExportOptions, plain
from bdistil.export.samples import data_of
from bdistil.storage.run_directory import RunDirectory

__all__ = ["ExportOptions", "export_run"]

# By format: the extra of this package, and what it has to have brought.
NEEDED = {"onnx": ("export", ("onnx", "onnxruntime")), "executorch": ("executorch", ("executorch",))}


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
    _require(options.format)
    ensemble = ProgressiveEnsemble.load(run.root)
    export = Export(ensemble, data_of(run, ensemble), options)
    with new_folder(output) as folder:
        manifest = _manifest(export)
        manifest |= FORMATS[options.format](export, folder, manifest)
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _require(format: str) -> None:
    extra, packages = NEEDED.get(format, ("", ()))
    for package in packages:
        if _version(package) is None:
            raise UserError(
                f"Exporting needs the package `{package}`, which is not installed. pip install 'bdistil[{extra}]'"
            )


def _manifest(export: Export) -> dict[str, Any]:
    """What does not depend on the files."""
    ensemble, data, figures = export.ensemble, export.data, export.ensemble.calibration
    outputs = export.values["total_1"].shape[1]
    if data.labels is not None and len(data.labels) != outputs:
        raise UserError(f"Expected `labels` of the data module to be {outputs} names, got {len(data.labels)}.")
    names = ("bdistil", "torch", "onnx", "onnxruntime", "executorch")
    known = figures.to_dict()
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": export.options.format,
        "input": {"name": "x", "shape": list(data.x.shape[1:]), "dtype": str(data.x.dtype).removeprefix("torch.")},
        "outputs": outputs,
        "labels": data.labels,
        "normalisation": _declared(data.normalisation, export.inside is not None),
        "task": ensemble.task,
        "scale": plain(ensemble.scale),
        "offset": plain(ensemble.offset),
        "temperatures": known["temperatures"],
        "exits": known["exits"],
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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def export_summary(manifest: Mapping[str, Any], output: Path) -> str:
    """What was exported, as a table: a stage a row."""
    parity = manifest["parity"]
    lines = [f"{'stage':>5} {'macs':>12} {'bytes':>10} {'difference':>11}"]
    for number, (stage, found) in enumerate(zip(manifest["stages"], parity["differences"], strict=True), 1):
        lines.append(f"{number:>5} {stage['macs']:>12,} {stage['bytes']:>10,} {found:>11.1e}")
    lines.append(f"\nDifferences to PyTorch on {parity['samples']} samples of {parity['source']}.")
    if manifest["kind"] == "executorch":
        lines.append("The bytes are those of the one file in which each stage is a method; it reads one sample a call.")
    if int8 := manifest["quantised"]:
        lines.append("Accuracy of the prefixes on the validation part, and bytes of all stages:")
        for name in ("float", "int8"):
            figures = "  ".join(f"{accuracy:.4f}" for accuracy in int8[name]["accuracy"])
            lines.append(f"  {name:<6} {figures}  {int8[name]['bytes']:>12,}")
    if fused := manifest["fused"]:
        lines += _fused_lines(fused)
    return "\n".join([*lines, f"{output}"])


def _fused_lines(fused: Mapping[str, Any]) -> list[str]:
    """Latency of the stages and of the graphs of several."""
    lines = []
    for batch, found in fused["latency"].items():
        plain, together = (" ".join(f"{v:.3f}" for v in np.atleast_1d(found[k])) for k in ("stages_ms", "fused_ms"))
        lines.append(f"Batch {batch}: {plain} ms by stages, {together} ms by --fuse {fused['kind']}.")
    when = "one sample that may leave" if fused["kind"] == "exits" else "a whole run"
    return [*lines, f"For {when} the runner takes {fused['kind'] if fused['faster'] else 'stages'}."]
