"""One export under way: its options, its samples, and how a stage is written and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.stages import prefix_factor
from bdistil.errors import UserError
from bdistil.export.folder import graph_entry
from bdistil.export.graphs import Exporter, Normalisation, Segment, links_by_stage
from bdistil.export.parity import BATCHES, Parity, Run, prove_parity, reference
from bdistil.export.samples import ExportData

EXAMPLE = 3  # samples; a batch of one may silently become a constant


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        format: ``onnx``, which runs without torch; ``torch``, the .pt2 archives of torch.export for other tools; or
            ``executorch``, one program with a method a stage.
        normalisation: ``declared`` exports students that read x as in training; ``inside`` puts the normalisation that
            the data module declares into the graphs, which then read raw x.
        quantise: int8 weights: ``dynamic`` takes the ranges of activations from each batch, ``static`` from training
            samples.
        fuse: ``all`` adds one graph of all stages, ``exits`` one that stops at the first stage whose confidence
            reaches a threshold. The runner uses it if it was faster when exported.
        overwrite: replace an older export.
    """

    format: Literal["onnx", "torch", "executorch"] = "onnx"
    normalisation: Literal["declared", "inside"] = "declared"
    quantise: Literal["dynamic", "static"] | None = None
    fuse: Literal["all", "exits"] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        chosen = [f"--{name}" for name in ("quantise", "fuse") if getattr(self, name)]
        if self.format != "onnx" and chosen:
            raise UserError(f"`{chosen[0]}` is for --format onnx, got --format {self.format}. Leave one out.")
        if len(chosen) == 2:
            raise UserError("`--quantise` and `--fuse` cannot be combined: give one of them.")


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
        return [
            {**self.write(folder, f"stage_{number + 1:02d}.{suffix}", [number], exporter), **self.about(number)}
            for number in range(len(self.ensemble))
        ]

    def about(self, number: int) -> dict[str, Any]:
        """What the manifest says of a stage beside its file."""
        weights = self.ensemble.calibration.weights
        links = links_by_stage(list(self.ensemble.students))[number]
        return {
            "links": [n + 1 for n in links],
            "macs": self.ensemble.macs[number],
            "factor": plain(prefix_factor(self.ensemble.scale, weights, number + 1)),
            "weight": weights[number] if weights else 1.0,
        }

    def prove(self, run: Run, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
        """Compares with PyTorch; gives the differences for the manifest."""
        found: Parity = prove_parity(run, self.ensemble, self.data.x, self.raw, self.data.source, batches)
        return asdict(found)


def plain(value: float | Tensor | None) -> Any:
    """A factor for JSON: of real outputs one an output."""
    return value.tolist() if isinstance(value, Tensor) else value
