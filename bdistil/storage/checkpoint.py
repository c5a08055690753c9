"""Atomic checkpoints of a fit at the end of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from bdistil.storage.files import publish


def save_epoch(trainer: pl.Trainer, path: Path) -> None:
    """Saves a checkpoint of the Trainer; if the process is killed, the file is complete or as it was before.

    Called on all ranks; rank 0 writes. An `AsyncCheckpointIO` is replaced by the plugin that it wraps for this
    call: the file has to be complete before it is renamed.

    Args:
        trainer: at the end of an epoch.
        path: of the checkpoint.
    """
    beside, strategy = path.with_name(f"{path.name}.tmp"), trainer.strategy
    plugin: Any = strategy.checkpoint_io
    synchronous = plugin
    while isinstance(synchronous, AsyncCheckpointIO):
        synchronous = synchronous.checkpoint_io
    strategy.checkpoint_io = synchronous
    try:
        trainer.save_checkpoint(beside, weights_only=False)
    finally:
        strategy.checkpoint_io = plugin
    if trainer.is_global_zero:
        publish(beside, path)
