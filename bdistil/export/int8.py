"""Int8 weights by onnxruntime, with the accuracy of every prefix beside that of the float graphs.

What onnxruntime can make int8: convolutions and linear layers, and LSTMs where it is done dynamically; GRUs stay float.
The running sum and the features between the stages are float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from bdistil.data.loaders import single_loader
from bdistil.errors import UserError
from bdistil.export.folder import seal
from bdistil.export.runner import Array, ExportedEnsemble

Kind = Literal["dynamic", "static"]
CALIBRATION = 256  # samples
OPERATORS = ["Conv", "Gemm", "MatMul"]


class _Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """What a stage reads, in batches of 32."""

    def __init__(self, values: Mapping[str, Array], reads: Sequence[str]) -> None:
        rows = range(0, len(values["x"]), 32)
        self.batches: Iterator[dict[str, Array]] = iter(
            [{name: values[name][begin : begin + 32] for name in reads} for begin in rows]
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


def int8_stages(
    folder: Path, manifest: Mapping[str, Any], kind: Kind, datamodule: Any, to_raw: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Replaces the stages by int8 ones; gives the parts `stages` and `quantised` of the manifest.

    Args:
        folder: with the float graphs.
        manifest: of them.
        kind: see `quantise_stages`.
        datamodule: of the run, set up.
        to_raw: gives samples as the graphs read them.

    Raises:
        UserError: the run names no data.
    """
    if manifest["task"] == "regression":
        raise UserError(f"`--quantise {kind}` is judged by accuracy, which real outputs lack. Export without it.")
    if datamodule is None:
        raise UserError(
            f"`--quantise {kind}` is judged on the run's own data, but this run names none: it was not written by "
            "`bdistil fit`. Export it without."
        )
    train, validation = single_loader(datamodule.train_dataloader()), single_loader(datamodule.val_dataloader())
    count = min(CALIBRATION, len(train.dataset))
    samples = to_raw(train.collate_fn([train.dataset[number] for number in range(count)])[0]).numpy()
    batches = [(to_raw(batch[0]).numpy(), batch[1].numpy()) for batch in validation]
    figures = {"float": _figures(folder, manifest, batches)}
    entries = quantise_stages(folder, manifest, kind, samples)
    figures["int8"] = _figures(folder, {**manifest, "stages": entries}, batches)
    return {"stages": entries, "quantised": {"kind": kind, "calibration_samples": count, **figures}}


def _figures(folder: Path, manifest: Mapping[str, Any], batches: Sequence[tuple[Array, Array]]) -> dict[str, Any]:
    accuracy = prefix_accuracies(ExportedEnsemble(folder, manifest, 1), batches)
    return {"accuracy": accuracy, "bytes": sum(entry["bytes"] for entry in manifest["stages"])}


def quantise_stages(folder: Path, manifest: Mapping[str, Any], kind: Kind, samples: Array) -> list[dict[str, Any]]:
    """Replaces the graph of each stage by one with int8 weights; gives the new entries of the manifest.

    Args:
        folder: with the float graphs.
        manifest: of them.
        kind: static takes the ranges of activations from samples, dynamic from each batch as it comes.
        samples: of the training part, as the graphs read them.
    """
    values = {"x": samples}
    for graph in ExportedEnsemble(folder, manifest, 1).graphs:
        graph.run(values)
    entries = []
    for entry in manifest["stages"]:
        path = folder / entry["file"]
        plain, small = path.with_suffix(".plain"), path.with_suffix(".small")
        quant_pre_process(str(path), str(plain), skip_symbolic_shape=True)
        if kind == "dynamic":
            # Unsigned: for signed weights onnxruntime lacks the convolution on some processors.
            quantize_dynamic(str(plain), str(small), weight_type=QuantType.QUInt8)
        else:
            reader = _Samples(values, [tensor["name"] for tensor in entry["inputs"]])
            quantize_static(str(plain), str(small), reader, op_types_to_quantize=OPERATORS, per_channel=True)
        small.replace(path)
        plain.unlink()
        entries.append({**entry, **seal(path)})
    return entries


def prefix_accuracies(ensemble: ExportedEnsemble, batches: Iterable[tuple[Array, Array]]) -> list[float]:
    """Accuracy of every prefix on batches (x, y)."""
    right, samples = np.zeros(len(ensemble)), 0
    for x, y in batches:
        right += [(stage.logits.argmax(1) == y).sum() for stage in ensemble.stages(x)]
        samples += len(y)
    return [round(float(value) / samples, 6) for value in right]
