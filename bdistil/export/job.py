"""An export in progress: its options, the samples to compare on, and how a stage is written and compared."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bdistil.data.loaders import first_samples
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.stages import prefix_factor
from bdistil.errors import UserError
from bdistil.evaluation.run_data import pairs_loader, run_data
from bdistil.export.folder import graph_entry
from bdistil.export.graphs import Exporter, Normalisation, Segment, ValueReads
from bdistil.export.parity import BATCHES, MOST, RunStage, check_parity, reference
from bdistil.models.inputs import InputSpec
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils.trees import row_count, take_rows

SAMPLES = 256
LENGTHS = 8  # number of additional lengths, if these vary, on which graphs are compared
VAL = "val_dataloader"
EXAMPLE = 3  # samples in the example input: a batch of one may become a constant of the graph

Format = Literal["onnx", "torch", "executorch"]
Normalising = Literal["declared", "inside"]
Quantised = Literal["dynamic", "static", None]
Fused = Literal["all", "exits", None]


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
            reaches its threshold. The runner uses it if it was faster during the export.
        overwrite: replace an older export.

    Raises:
        UserError: an option has an unknown value, or two exclude each other.
    """

    format: Format = "onnx"
    normalisation: Normalising = "declared"
    quantise: Quantised = None
    fuse: Fused = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        kinds = {"format": Format, "normalisation": Normalising, "quantise": Quantised, "fuse": Fused}
        for name, kind in kinds.items():
            if (value := getattr(self, name)) not in (values := get_args(kind)):
                raise UserError(f"Expected `{name}` to be one of {', '.join(map(repr, values))}, got {value!r}.")
        chosen = [f"--{name}" for name in ("quantise", "fuse") if getattr(self, name)]
        if self.format != "onnx" and chosen:
            raise UserError(f"`{chosen[0]}` is for --format onnx, got --format {self.format}. Leave one out.")
        if len(chosen) == 2:
            raise UserError("`--quantise` and `--fuse` cannot be combined: give one of them.")


class Export:
    """An export in progress.

    Args:
        run: the run directory.
        options: options of the export.

    Attributes:
        run: the run directory.
        ensemble: ensemble of the run, on the CPU.
        datamodule: data module of the run's recipe, set up; None if the run names no data.
        x: (256, ...), validation samples as in training, padded to one length; random if the run names no data.
        alone: batches of one sample with other lengths, if lengths vary.
        raw: the samples x as the graphs read them.
        source: description of the origin of the samples.
        normalisation: mean and standard deviation that the data module declares, or None.
        inside: `normalisation` if the graphs apply it, otherwise None.
        values: example values of all tensors, by name.

    Raises:
        UserError: the run has no committed round, the shape of its x is unknown, or the normalisation is not declared.
    """

    def __init__(self, run: RunDirectory, options: ExportOptions) -> None:
        self.run, self.options, self.ensemble = run, options, ProgressiveEnsemble.load(run.root)
        if not self.ensemble.inputs.known:
            raise UserError(
                f"Expected students that read a tensor x, or several in a tuple or mapping, got others in {run.root}. "
                "A packed sequence or an object of another class has no graph."
            )
        self.datamodule: Any = None
        self.loader: Any = None
        if run.config.exists() and run.read_config().get("data"):
            with run_data(run) as self.datamodule:
                self.loader = pairs_loader(run, self.datamodule.val_dataloader(), VAL)
        self.normalisation = _normalisation(self.datamodule)
        self.inside = self.normalisation if options.normalisation == "inside" else None
        if options.normalisation == "inside" and self.inside is None:
            raise UserError(
                "Expected a data module that declares its `normalisation` for --normalisation inside, got "
                f"{type(self.datamodule).__name__} without it. Use --normalisation declared and normalise x before."
            )
        if self.inside is not None and self.ensemble.inputs.parts is not None:
            raise UserError(
                "Expected students that read one tensor x for --normalisation inside, got several. Use "
                "--normalisation declared and normalise x before."
            )
        self.x, self.distinct, self.source = self._samples()
        self.alone = self._alone()
        self.raw = self.to_raw(self.x)
        x, raw = (take_rows(batch, slice(EXAMPLE)) for batch in (self.x, self.raw))
        self.values = {**reference(self.ensemble, x), **self.tensors(raw)}
        wide = [name for name, value in self.values.items() if name not in self.tensors(raw) and value.ndim > 2]
        if wide and self.alone:
            raise UserError(
                f"Expected links to features (B, D) where lengths vary, got {wide[0]} of shape "
                f"{tuple(self.values[wide[0]].shape)}, whose size would vary, too. Pad x to one length in the data."
            )

    def _samples(self) -> tuple[Any, int, str]:
        """Samples on which the graphs are compared, the number of different ones among them, and their source."""
        if self.loader is None:
            return self.ensemble.inputs.random(SAMPLES), SAMPLES, "random numbers, as the run names no data"
        x = first_samples(self.loader, SAMPLES)
        count = row_count(x)
        return take_rows(x, torch.arange(SAMPLES) % count), count, "the validation part"

    def _alone(self) -> list[Any]:
        inputs = self.ensemble.inputs
        if not inputs.varies:
            return []
        if self.loader is None:
            return [inputs.random(1, smallest=True)]
        data = self.loader.dataset
        found = (self.loader.collate_fn([data[n]])[0] for n in range(min(len(data), SAMPLES)))
        shapes = {str(InputSpec.of_batch(x)): x for x in found}
        return list(shapes.values())[:LENGTHS]

    def least(self) -> dict[str, int]:
        """The smallest sizes that the students read, by name of the size that varies.

        Below them PyTorch raises an error, but onnxruntime answers from nothing, or ends the process in a GRU.
        """
        inputs = self.ensemble.inputs
        tensors = inputs.take_apart(inputs.random(1, smallest=True))
        sizes = [
            (name, axis, size[0])
            for name, spec in inputs.tensors().items()
            for axis, size in enumerate(spec.shape or (), 1)
            if isinstance(size, tuple)
        ]

        def works(most: int) -> bool:
            cut = dict(tensors)
            for name, axis, size in sizes:
                cut[name] = cut[name].narrow(axis, 0, min(size, most))
            return self._works(cut)

        tried = range(1, max((size for *_, size in sizes), default=1))
        least = 1 + bisect_left(tried, True, key=works)
        return {f"{name}_{axis}": min(size, least) for name, axis, size in sizes}

    def _works(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the students read these tensors of x without an error."""
        try:
            reference(self.ensemble, self.ensemble.inputs.put_together(tensors))
        except Exception:  # errors of the user's code share no base class
            return False
        return True

    def reads_negative(self, name: str) -> bool:
        """Whether the students read a negative number in this tensor of x, or the samples have one.

        PyTorch refuses one as an index of an embedding; ONNX counts it from the end.
        """
        if bool((self.tensors(self.x)[name] < 0).any()):
            return True
        inputs = self.ensemble.inputs
        tensors = inputs.take_apart(inputs.random(1))
        return tensors[name].dtype.is_signed and self._works(tensors | {name: torch.full_like(tensors[name], -1)})

    def tensors(self, x: Any) -> dict[str, Tensor]:
        """Maps names of graph inputs to the tensors of x."""
        return self.ensemble.inputs.take_apart(x)

    def arrays(self, x: Any) -> Any:
        """Converts a batch for the runner: an array, or a tuple or dictionary of arrays."""
        arrays = {name: tensor.numpy() for name, tensor in self.tensors(x).items()}
        return self.ensemble.inputs.put_together(arrays)

    def to_raw(self, x: Any) -> Any:
        """Converts samples as in training to samples as the graphs read them."""
        return x if self.inside is None else x * self.inside[1] + self.inside[0]

    def segment(self, numbers: Sequence[int]) -> Segment:
        """The given stages, from 0, as one module."""
        return Segment(self.ensemble, numbers, self.inside)

    def reads_values(self, number: int) -> bool:
        """Whether Python code of a stage reads a value of a tensor, as in `if x.max() > 1`."""
        segment = self.segment([number])
        with torch.no_grad(), ValueReads() as reads:
            segment(*(self.values[name] for name in segment.reads))
        return bool(reads.found)

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
        """Manifest values of a stage, counted from 0, that do not depend on its file."""
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
        for x in self.alone:
            single = check_parity(run_stage, self.ensemble, x, self.to_raw(x), (1,))
            found = [max(pair) for pair in zip(found, single, strict=True)]
        compared = min(self.distinct, MOST * max(batches))
        return {"samples": compared, "source": self.source, "batches": tuple(batches), "differences": tuple(found)}


def to_list(value: float | Tensor | None) -> Any:
    """Converts a factor for JSON; a list with one value per output for real outputs."""
    return value.tolist() if isinstance(value, Tensor) else value


def _normalisation(datamodule: Any) -> Normalisation | None:
    """Mean and standard deviation that a data module declares as `normalisation`, float32."""
    given = getattr(datamodule, "normalisation", None)
    if given is None:
        return None
    try:
        mean, deviation = (torch.as_tensor(value, dtype=torch.float32) for value in given)
    except (TypeError, ValueError) as error:
        raise UserError(
            "Expected `normalisation` of the data module to be (mean, standard deviation), numbers or tensors that "
            f"broadcast over a sample, got {given!r}."
        ) from error
    return mean, deviation
