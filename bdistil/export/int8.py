"""Int8 quantisation by onnxruntime, with the accuracy of every prefix in int8 and in float.

onnxruntime quantises convolutions and linear layers, and LSTMs in dynamic mode only; GRUs stay float. The running sum
and the features passed between stages are float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bdistil.data.loaders import with_trainer
from bdistil.data.loaders.fingerprints import spread
from bdistil.errors import UserError
from bdistil.evaluation.run_data import pairs_loader
from bdistil.export.folder import seal
from bdistil.export.job import Export
from bdistil.metrics.quality import class_numbers
from bdistil.runner import Array, ExportedEnsemble

CALIBRATION = 256  # number of calibration samples
BATCH = 32  # calibration samples per batch
OPERATORS = ["Conv", "Gemm", "MatMul"]


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Yields the inputs of a stage, batch by batch."""

    def __init__(self, values: Mapping[str, Array]) -> None:
        rows = range(0, len(next(iter(values.values()))), BATCH)
        self.batches = iter([{name: value[i : i + BATCH] for name, value in values.items()} for i in rows])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


def int8_stages(export: Export, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the stages by int8 ones.

    Args:
        export: export of the run.
        folder: folder with the float graphs.
        manifest: manifest of these graphs.

    Returns:
        The manifest entries `stages`, `quantised` and `exits`. The promise of fitted thresholds is omitted, as it was
        tested on float graphs.

    Raises:
        UserError: the run is a regression, or names no data.
    """
    kind, datamodule = export.options.quantise, export.datamodule
    if manifest["task"] != "classification":
        raise UserError(
            f"`--quantise {kind}` reports accuracy, which a {manifest['task']} task does not have. Export without it."
        )
    if datamodule is None:
        raise UserError(
            f"`--quantise {kind}` needs the data of the run, but this run names none: it was not written by "
            "`bdistil fit`. Export without it."
        )
    with with_trainer(datamodule):
        train = pairs_loader(export.run, datamodule.train_dataloader(), "train_dataloader")
    rows = spread(len(train.dataset), CALIBRATION)  # the first samples may all belong to one class
    samples = export.to_raw(train.collate_fn([train.dataset[number] for number in rows])[0])
    batches = []
    for x, y in export.loader:
        if y is None:
            raise UserError(f"`--quantise {kind}` reports accuracy, but the run has no labels. Export without it.")
        batches.append((export.arrays(export.to_raw(x)), class_numbers(y).numpy()))
    quantised = {"kind": kind, "calibration_samples": len(rows), "float": _quality(folder, manifest, batches)}
    values = {name: tensor.numpy() for name, tensor in export.tensors(samples).items()}
    for graph in ExportedEnsemble(folder, manifest, 1).graphs:
        graph.run(values)
    stages = [_quantise(folder, entry, kind == "dynamic", values) for entry in manifest["stages"]]
    quantised["int8"] = _quality(folder, {**manifest, "stages": stages}, batches)
    exits = manifest["exits"] and {**manifest["exits"], "promise": None}
    return {"stages": stages, "quantised": quantised, "exits": exits}


def _quality(folder: Path, manifest: Mapping[str, Any], batches: Sequence[tuple[Any, Array]]) -> dict[str, Any]:
    """Accuracy of every prefix on the labelled samples of batches (x, y), and bytes of all stages."""
    ensemble = ExportedEnsemble(folder, manifest, 1)
    correct = sum(np.array([(stage.logits.argmax(1) == y).sum() for stage in ensemble.stages(x)]) for x, y in batches)
    accuracy = np.round(correct / sum((y >= 0).sum() for _, y in batches), 6).tolist()
    return {"accuracy": accuracy, "bytes": sum(entry["bytes"] for entry in manifest["stages"])}


def _quantise(folder: Path, entry: Mapping[str, Any], dynamic: bool, values: Mapping[str, Array]) -> dict[str, Any]:
    """Replaces a graph by one with int8 weights; returns its new manifest entry.

    Args:
        folder: folder with the float graph.
        entry: manifest entry of the float graph.
        dynamic: take the ranges of activations from each batch at run time, not from `values`.
        values: outputs of all float stages on training samples.
    """
    path = folder / entry["file"]
    prepared, quantised = path.with_suffix(".prepared"), path.with_suffix(".int8")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    if dynamic:
        # Unsigned, as onnxruntime has no convolution with signed weights on some processors.
        quantize_dynamic(str(prepared), str(quantised), weight_type=QuantType.QUInt8)
    else:
        reader = _Batches({tensor["name"]: values[tensor["name"]] for tensor in entry["inputs"]})
        quantize_static(str(prepared), str(quantised), reader, op_types_to_quantize=OPERATORS, per_channel=True)
    quantised.replace(path)
    prepared.unlink()
    return {**entry, **seal(path)}
