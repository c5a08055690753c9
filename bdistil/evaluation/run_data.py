"""Data of a finished run, from the data module that its configuration names."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from bdistil.data.loaders import single_loader
from bdistil.distillation.mekd.samples import open_generated
from bdistil.errors import UserError
from bdistil.storage.run_directory import RunDirectory

Split = Literal["test", "val"]


def datamodule_of(run: RunDirectory) -> LightningDataModule:
    """The data module named in config.yaml of a run. The file names classes that are imported: treat it as code.

    Raises:
        UserError: the run was not started by a recipe.
    """
    data = run.read_config().get("data") if run.config.exists() else None
    if not data:
        raise UserError(
            f"{run.config} names no data, as it was not written by `bdistil fit`. "
            "Load the ensemble with ProgressiveEnsemble.load(run_dir) and evaluate it on your own data."
        )
    parser = ArgumentParser()
    parser.add_argument("--data", type=LightningDataModule)
    module: LightningDataModule = parser.instantiate(parser.parse_object({"data": data})).data
    return open_generated(run.emulation, module) if run.emulation.exists() else module


def loader_of(run: RunDirectory, part: Split) -> Any:
    """The loader of a part of the data of a run, in the order of its samples.

    Raises:
        UserError: the run was not started by a recipe.
    """
    datamodule = datamodule_of(run)
    datamodule.prepare_data()
    datamodule.setup("test" if part == "test" else "fit")
    return single_loader(datamodule.test_dataloader() if part == "test" else datamodule.val_dataloader())
