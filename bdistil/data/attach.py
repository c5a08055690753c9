"""Gives the index to the loaders of anybody's data module, for as long as a round is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from bdistil.data.indexing import sequential_loader, training_loader


def only(loader: Any) -> Any:
    """The loader of a list of one, as some data modules return."""
    return loader[0] if isinstance(loader, list | tuple) and len(loader) == 1 else loader


@contextmanager
def indexed_loaders(datamodule: pl.LightningDataModule, seed: int) -> Iterator[None]:
    """While this context is open, training and validation loaders yield (x, y, index).

    Args:
        datamodule: of the user; its methods are put back at the end.
        seed: of the round's order of samples.
    """
    names = ("train_dataloader", "val_dataloader")
    before = {name: vars(datamodule)[name] for name in names if name in vars(datamodule)}
    train, val = (getattr(datamodule, name) for name in names)
    vars(datamodule).update(
        train_dataloader=partial(_train, train, datamodule, seed), val_dataloader=partial(_val, val, datamodule)
    )
    try:
        yield
    finally:
        for name in names:
            vars(datamodule).pop(name, None)
        vars(datamodule).update(before)


def _train(original: Callable[[], Any], datamodule: pl.LightningDataModule, seed: int) -> DataLoader[Any]:
    trainer = datamodule.trainer
    assert trainer is not None
    progress: Any = trainer.fit_loop.epoch_progress
    return training_loader(
        only(original()),
        seed=seed,
        epoch=progress.current.processed,  # current_epoch is one behind in a fit that goes on
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )


def _val(original: Callable[[], Any], datamodule: pl.LightningDataModule) -> DataLoader[Any]:
    trainer = datamodule.trainer
    assert trainer is not None
    return sequential_loader(only(original()), rank=trainer.global_rank, world_size=trainer.world_size)
