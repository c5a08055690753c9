"""The samples that an export is checked on, and what the data module says of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bdistil.data.loaders import first_samples
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.run_data import datamodule_of
from bdistil.export.graphs import Normalisation
from bdistil.storage.run_directory import RunDirectory

SAMPLES = 256


@dataclass(frozen=True)
class ExportData:
    """Samples and declarations.

    Attributes:
        x: (256, ...) to compare on, as in training.
        source: of them, in words.
        normalisation: mean and standard deviation that the data module takes of raw samples, where it declares them.
        labels: names of the classes, where it declares them.
        datamodule: of the run's recipe, set up; None where the run names no data.
    """

    x: Tensor
    source: str
    normalisation: Normalisation | None = None
    labels: list[str] | None = None
    datamodule: Any = None


def data_of(run: RunDirectory, ensemble: ProgressiveEnsemble) -> ExportData:
    """Samples of the recipe's validation part, or random ones where the run names no data.

    Raises:
        UserError: x of the run is not one tensor.
    """
    if ensemble.inputs.shape is None:
        raise UserError(
            f"Expected students that read one tensor x, got those of {run.root}, which read something else."
        )
    if not run.config.exists() or not run.read_config().get("data"):
        return ExportData(ensemble.inputs.random(SAMPLES), "random numbers, as the run names no data")
    module = datamodule_of(run)
    module.prepare_data()
    module.setup("fit")
    x = first_samples(module.val_dataloader(), SAMPLES)
    repeated = x.repeat(-(-SAMPLES // len(x)), *(1,) * (x.ndim - 1))[:SAMPLES]
    labels = getattr(module, "labels", None)
    return ExportData(
        repeated,
        "the validation part",
        getattr(module, "normalisation", None),
        [str(label) for label in labels] if labels is not None else None,
        module,
    )
