"""The samples that an export is checked on, and what the data module says of its input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bdistil.data.loaders import single_loader
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
        return ExportData(random_samples(ensemble), "random numbers, as the run names no data")
    module = datamodule_of(run)
    module.prepare_data()
    module.setup("fit")
    x, _ = first_samples(module.val_dataloader(), SAMPLES)
    repeated = x.repeat(-(-SAMPLES // len(x)), *(1,) * (x.ndim - 1))[:SAMPLES]
    labels = getattr(module, "labels", None)
    return ExportData(
        repeated,
        "the validation part",
        getattr(module, "normalisation", None),
        [str(label) for label in labels] if labels is not None else None,
        module,
    )


def random_samples(ensemble: ProgressiveEnsemble) -> Tensor:
    """Standard normal samples (256, ...); zeros and ones where the students read whole numbers."""
    shape, dtype = ensemble.inputs.shape, getattr(torch, ensemble.inputs.dtype or "float32")
    assert shape is not None
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(SAMPLES, *shape, generator=generator).to(dtype)
    return torch.randint(2, (SAMPLES, *shape), generator=generator).to(dtype)


def first_samples(loader: Any, count: int) -> tuple[Tensor, Tensor]:
    """x (n, ...) and y (n,) of the first samples of a loader, n at most `count`."""
    loader = single_loader(loader)
    batches: Iterable[Any] = islice(loader, -(-count // (loader.batch_size or 1)))
    xs, ys = zip(*((batch[0], batch[1]) for batch in batches), strict=True)
    return torch.cat(xs)[:count], torch.cat(ys)[:count]
