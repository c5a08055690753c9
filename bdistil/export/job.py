"""An export in progress: its options, the samples to compare on, and how a stage is written and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bdistil.data.loaders import first_samples
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.stages import prefix_factor
from bdistil.errors import UserError
from bdistil.evaluation.run_data import datamodule_of
from bdistil.export.folder import graph_entry
from bdistil.export.graphs import Exporter, Normalisation, Segment
from bdistil.export.parity import BATCHES, MOST, RunStage, check_parity, reference
from bdistil.storage.run_directory import RunDirectory

SAMPLES = 256
EXAMPLE = 3  # samples in the example input: a batch of one may become a constant of the graph


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        format: ``onnx`` runs without torch; ``torch`` writes `.pt2` archives of torch.export for other tools;
            ``executorch`` writes one program with a method per stage.
        normalisation: ``declared`` exports students that read x as in training; ``inside`` puts the normalisation that
            the data module declares into the graphs, which then read raw x.
        quantise: int8 weights: ``dynamic`` takes the ranges of activations from each batch, ``static`` from training
            samples.
        fuse: ``all`` adds one graph of all stages, ``exits`` one that stops at the first stage whose confidence
            reaches a threshold. The runner uses it if it was faster during the export.
        overwrite: replace an older export.

    Raises:
        UserError: two options exclude each other.
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
    """An export in progress.

    Args:
        run: the run directory.
        options: of the export.

    Attributes:
        ensemble: of the run, on the CPU.
        datamodule: of the run's recipe, set up; None if the run names no data.
        x: (256, ...), samples as in training: of the validation part, else random.
        raw: the same samples as the graphs read them.
        source: of the samples, in words.
        normalisation: mean and standard deviation that the data module declares, or None.
        inside: the same if the graphs apply it, else None.
        values: example of all tensors, by name.

    Raises:
        UserError: nothing is committed in the run, its x is not one tensor, or the normalisation is not declared.
    """

    def __init__(self, run: RunDirectory, options: ExportOptions) -> None:
        self.options, self.ensemble = options, ProgressiveEnsemble.load(run.root)
        if self.ensemble.inputs.shape is None:
            raise UserError(f"Expected students that read one tensor x, got others in {run.root}.")
        self.datamodule: Any = None
        if run.config.exists() and run.read_config().get("data"):
            self.datamodule = datamodule_of(run)
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        self.normalisation: Normalisation | None = getattr(self.datamodule, "normalisation", None)
        self.inside = self.normalisation if options.normalisation == "inside" else None
        if options.normalisation == "inside" and self.inside is None:
            raise UserError(
                "Expected a data module that declares its `normalisation` for --normalisation inside, got "
                f"{type(self.datamodule).__name__} without it. Use --normalisation declared and normalise x before."
            )
        self.x, self.source = self._samples()
        self.raw = self.to_raw(self.x)
        self.values = {**reference(self.ensemble, self.x[:EXAMPLE]), "x": self.raw[:EXAMPLE]}

    def _samples(self) -> tuple[Tensor, str]:
        if self.datamodule is None:
            return self.ensemble.inputs.random(SAMPLES), "random numbers, as the run names no data"
        x = first_samples(self.datamodule.val_dataloader(), SAMPLES)
        repeats = -(-SAMPLES // len(x))
        return x.repeat(repeats, *(1,) * (x.ndim - 1))[:SAMPLES], "the validation part"

    def to_raw(self, x: Tensor) -> Tensor:
        """Converts samples as in training to samples as the graphs read them."""
        return x if self.inside is None else x * self.inside[1] + self.inside[0]

    def segment(self, numbers: Sequence[int]) -> Segment:
        """The given stages, from 0, as one module."""
        return Segment(self.ensemble, numbers, self.inside)

    def write(self, folder: Path, name: str, numbers: Sequence[int], exporter: Exporter) -> dict[str, Any]:
        """Writes one graph; returns its entry in the manifest."""
        segment, path = self.segment(numbers), folder / name
        exporter(segment, [self.values[name] for name in segment.reads], path)
        return graph_entry(path, segment, self.values)

    def write_stages(self, folder: Path, suffix: str, exporter: Exporter) -> list[dict[str, Any]]:
        """Writes the graph of every stage; returns the entry `stages` of the manifest."""
        return [
            {**self.write(folder, f"stage_{number + 1:02d}.{suffix}", [number], exporter), **self.describe(number)}
            for number in range(len(self.ensemble))
        ]

    def describe(self, number: int) -> dict[str, Any]:
        """Values of a stage, from 0, in the manifest that do not depend on its file."""
        weights = self.ensemble.calibration.weights or (1.0,) * len(self.ensemble)
        return {
            "links": list(dict.fromkeys(n + 1 for n, _ in self.ensemble.wiring.reads[number])),
            "macs": self.ensemble.macs[number],
            "factor": to_list(prefix_factor(self.ensemble.scale, weights, number + 1)),
            "weight": weights[number],
        }

    def compare(self, run_stage: RunStage, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
        """Compares the stages with PyTorch, see `check_parity`; returns the entry `parity` of the manifest."""
        found = check_parity(run_stage, self.ensemble, self.x, self.raw, batches)
        compared = min(len(self.x), MOST * max(batches))
        return {"samples": compared, "source": self.source, "batches": tuple(batches), "differences": tuple(found)}


def to_list(value: float | Tensor | None) -> Any:
    """A factor for JSON; one value per output for real outputs."""
    return value.tolist() if isinstance(value, Tensor) else value
