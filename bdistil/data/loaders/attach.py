"""Gives the index to the loaders of anybody's data module, for as long as a round is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from bdistil.data.loaders.indexing import sequential_loader, training_loader
from bdistil.data.loaders.views import ViewPlan

LOADERS = ("train_dataloader", "val_dataloader")


def single_loader(loader: Any) -> Any:
    """The loader of a list of one, as some data modules return."""
    return loader[0] if isinstance(loader, list | tuple) and len(loader) == 1 else loader


@contextmanager
def indexed_loaders(
    datamodule: pl.LightningDataModule,
    seed: int,
    train: ViewPlan | None = None,
    val: ViewPlan | None = None,
    names: Sequence[str] = LOADERS,
) -> Iterator[None]:
    """While this context is open, the loaders of a data module yield (x, y, index).

    Args:
        datamodule: of the user; its methods are put back at the end.
        seed: of the round's order of samples.
        train: fixed views of the training part, where it augments at random.
        val: the same of the validation part.
        names: of the loaders.
    """
    before = {name: vars(datamodule)[name] for name in names if name in vars(datamodule)}
    originals = {name: getattr(datamodule, name) for name in names}
    for name, original in originals.items():
        indexed = partial(_train, seed=seed, plan=train) if name == LOADERS[0] else partial(_val, plan=val)
        vars(datamodule)[name] = partial(indexed, original, datamodule)
    try:
        yield
    finally:
        for name in names:
            vars(datamodule).pop(name, None)
        vars(datamodule).update(before)


def _train(
    original: Callable[[], Any], datamodule: pl.LightningDataModule, seed: int, plan: ViewPlan | None
) -> DataLoader[Any]:
    trainer = datamodule.trainer
    assert trainer is not None
    progress: Any = trainer.fit_loop.epoch_progress
    return training_loader(
        single_loader(original()),
        seed=seed,
        epoch=progress.current.processed,  # current_epoch is one behind in a fit that goes on
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        plan=plan,
    )


def _val(original: Callable[[], Any], datamodule: pl.LightningDataModule, plan: ViewPlan | None) -> DataLoader[Any]:
    trainer = datamodule.trainer
    assert trainer is not None
    loader = single_loader(original())
    return sequential_loader(loader, rank=trainer.global_rank, world_size=trainer.world_size, plan=plan)
