"""Data of a finished run, from the data module that its configuration names."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from bdistil.boosting.ledger.samples import check_stored
from bdistil.data.loaders import only_given, paired, single_loader, with_trainer
from bdistil.distillation.mekd.samples import open_generated
from bdistil.errors import UserError
from bdistil.metrics.quality import UNLABELLED
from bdistil.storage.run_directory import RunDirectory

Split = Literal["test", "val"]


def datamodule_of(run: RunDirectory) -> LightningDataModule:
    """Builds the data module named in config.yaml of a run, whose classes are imported: treat the file as code.

    Raises:
        UserError: the run was not started by a recipe.
    """
    data = run.read_config().get("data") if run.config.exists() else None
    if not data:
        raise UserError(
            f"{run.config} names no data, as it was not written by `bdistil fit`. "
            "Load the ensemble with ProgressiveEnsemble.load(run_dir) and evaluate it on your own data."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=LightningDataModule)
    try:
        module: LightningDataModule = parser.instantiate(parser.parse_object({"data": data})).data
    except ArgumentError as error:
        start = (run.read("environment") or [{}])[-1]
        raise UserError(
            f"The data that {run.config} names cannot be read here: {error}\nStart the command where the run was "
            f"started, {start.get('folder', 'its folder')}, with the same PYTHONPATH; or correct `data` in that file."
        ) from error
    return open_generated(run.emulation, module) if run.emulation.exists() else module


@contextmanager
def run_data(run: RunDirectory, datamodule: LightningDataModule | None = None) -> Iterator[LightningDataModule]:
    """Context with the data module of a run, set up for a fit and attached to a Trainer; checks its samples.

    Args:
        run: the run.
        datamodule: the data module that the run was trained on, if available; by default a new one.

    Raises:
        UserError: the run was not started by a recipe, or the validation part has other samples than in the run.
    """
    datamodule = datamodule_of(run) if datamodule is None else datamodule
    with with_trainer(datamodule):
        datamodule.prepare_data()
        datamodule.setup("fit")
        loader: Any = only_given(single_loader(datamodule.val_dataloader()), "val_dataloader")
        check_stored(run.ledger / "val", "val_dataloader", loader.dataset)
        yield datamodule


def loader_of(run: RunDirectory, part: Split, datamodule: LightningDataModule | None = None) -> Any:
    """The loader of a part of the data of a run, in the order of its samples; its batches are (x, y).

    Args:
        run: the run.
        part: part of the data.
        datamodule: as in `run_data`.

    Raises:
        UserError: as `run_data`.
    """
    name = f"{part}_dataloader"
    with run_data(run, datamodule) as data:
        if part == "test":
            data.setup("test")
        if not is_overridden(name, data, LightningDataModule):
            raise UserError(f"{type(data).__name__} has no `{name}`. Implement it, or give --part val.")
        loader = single_loader(getattr(data, name)())
        if part == "test":
            check_stored(run.ledger / "test", name, loader.dataset)
    return pairs_loader(run, loader, name)


def pairs_loader(run: RunDirectory, loader: Any, name: str) -> Any:
    """Converts a loader, returned by method `name` of a run's data module, to batches (x, y) as in the run."""
    config: Any = run.read_config() if run.config.exists() else {}
    settings = config.get("boosting") or config.get("model", {}).get("boosting") or {}
    labels, ignore_index = settings.get("labels", "labels"), settings.get("ignore_index", UNLABELLED)
    return paired(single_loader(loader), labels, ignore_index=ignore_index, name=name)
