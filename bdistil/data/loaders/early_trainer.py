"""A temporary Trainer for data modules that need one before the fit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment


@contextmanager
def with_trainer(datamodule: pl.LightningDataModule) -> Iterator[None]:
    """Context in which a data module has a Trainer: its own, or one of a single process on the CPU.

    Many read ``self.trainer`` in `setup` and their loaders, for example to divide a batch size by the number of
    processes. Lightning sets it during a fit, but the data are validated before.
    """
    if datamodule.trainer is not None:
        yield
        return
    datamodule.trainer = _single_process()
    try:
        yield
    finally:
        datamodule.trainer = None


def _single_process() -> pl.Trainer:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the Trainer lists the devices that it does not use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pl.Trainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, plugins=[LightningEnvironment()],
            )  # fmt: skip
    finally:
        logging.disable(before)
