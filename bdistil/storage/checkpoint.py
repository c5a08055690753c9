"""Saves a fit at the end of an epoch: an ordinary checkpoint of Lightning, in half of the time.

`torch.save` spends a microsecond on each key and number of a checkpoint and tens of them on each tensor; Lightning
has it write to memory, copies that, and has a file system layer move it into place. For a student whose epochs take
milliseconds this is a good part of the training. Here the same objects are pickled in one go, in the older of the two
formats of `torch.save`, and the numbers follow straight from the memory of the tensors. `torch.load` reads it like
the newer one, `weights_only` or not, and so does `Trainer.fit(ckpt_path=...)`.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from functools import cache
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor

PROTOCOL = 2  # of pickle: that of torch, the only one that `weights_only` takes


def save_epoch(trainer: pl.Trainer, path: Path) -> None:
    """Saves a fit, on all ranks; process 0 writes. Whenever it is killed, the file is there whole or as it was before.

    Args:
        trainer: at the end of an epoch.
        path: of the checkpoint.
    """
    beside, strategy = path.with_name(f"{path.name}.tmp"), trainer.strategy
    given = strategy.checkpoint_io
    strategy.checkpoint_io = _prompt(given)
    try:
        trainer.save_checkpoint(beside, weights_only=False)
    finally:
        strategy.checkpoint_io = given
    if trainer.is_global_zero:
        os.replace(beside, path)


def _prompt(plugin: Any) -> Any:
    """What saves in the place of a plugin, and has the file there when it returns."""
    while isinstance(plugin, AsyncCheckpointIO):
        plugin = plugin.checkpoint_io
    return QuickIO() if type(plugin) is TorchCheckpointIO else plugin  # one of the user may have its own format


class QuickIO(TorchCheckpointIO):
    """Writes a checkpoint quickly, or as `torch.save` does where something in it is unusual."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a file, not atomically; its folder is made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            if not is_read():
                raise Unusual
            with open(path, "wb") as file:
                write(checkpoint, file)
        except Unusual:
            torch.save(checkpoint, path)


class Unusual(Exception):  # noqa: N818
    """A tensor is more than its numbers, or they do not lie in one piece."""


def write(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    """Writes what `torch.load` reads; tensors of any device come back on the CPU, with the strides that they have.

    Raises:
        Unusual: a tensor is not plain; nothing of use is in the file.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, PROTOCOL)
    pickler.dump(checkpoint)
    file.write(_head())
    file.write(pickled.getbuffer())
    pickle.dump([str(number) for number in range(len(pickler.numbers))], file, PROTOCOL)
    for numbers in pickler.numbers:
        file.write(struct.pack("<q", numbers.size))
        file.write(numbers.data)


@cache
def is_read() -> bool:
    """Does the torch of this process read what is written here? The format is old and stays, but it is not ours."""
    sample, file = [torch.arange(6.0).view(2, 3), torch.tensor(7, dtype=torch.int32)], io.BytesIO()
    try:
        write({"sample": sample}, file)
        file.seek(0)
        return all(map(torch.equal, torch.load(file, weights_only=True)["sample"], sample))
    except Exception:
        return False


@cache
def _head() -> bytes:
    """What a file of the older format begins with."""
    empty = io.BytesIO()
    torch.save(None, empty, _use_new_zipfile_serialization=False)
    return empty.getvalue().removesuffix(pickle.dumps(None, PROTOCOL) + pickle.dumps([], PROTOCOL))


@cache
def storages() -> dict[torch.dtype, Any]:
    """How the format names the numbers of a tensor. A torch that lacks one of the names does not pass `is_read`."""
    return {
        torch.float64: torch.DoubleStorage,
        torch.float32: torch.FloatStorage,
        torch.float16: torch.HalfStorage,
        torch.bfloat16: torch.BFloat16Storage,
        torch.int64: torch.LongStorage,
        torch.int32: torch.IntStorage,
        torch.int16: torch.ShortStorage,
        torch.int8: torch.CharStorage,
        torch.uint8: torch.ByteStorage,
        torch.bool: torch.BoolStorage,
    }


class _Aside:
    """Stands in the pickle for numbers that follow behind it."""

    __slots__ = ("record",)

    def __init__(self, record: tuple[Any, ...]) -> None:
        self.record = record


class _Pickler(pickle.Pickler):
    """Pickles a checkpoint, and keeps the numbers of its tensors apart, in their order."""

    def __init__(self, file: IO[bytes], protocol: int) -> None:
        super().__init__(file, protocol)
        self.numbers: list[np.ndarray[Any, Any]] = []

    def persistent_id(self, thing: Any) -> Any:
        """The record of numbers that were put aside."""
        return thing.record if type(thing) is _Aside else None

    def reducer_override(self, thing: Any) -> Any:
        """Makes of a tensor the call that builds it again; of all else what pickle makes of it.

        Raises:
            Unusual: the tensor is not plain.
        """
        if not isinstance(thing, Tensor):
            if isinstance(thing, torch.UntypedStorage | torch.TypedStorage):
                raise Unusual
            return NotImplemented
        if not _plain(thing):
            raise Unusual
        record = ("storage", storages()[thing.dtype], str(len(self.numbers)), "cpu", thing.numel(), None)
        self.numbers.append(_numbers(thing))
        return torch._utils._rebuild_tensor, (_Aside(record), 0, tuple(thing.shape), thing.stride())


def _plain(tensor: Tensor) -> bool:
    """Is a tensor nothing but numbers of an ordinary kind, of a device whose numbers NumPy can be given?"""
    ordinary = type(tensor) is Tensor and tensor.dtype in storages() and tensor.device.type in ("cpu", "cuda")
    dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_neg()
    return ordinary and dense and not tensor.requires_grad and not vars(tensor)


def _numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers of a tensor in the order in which they lie in memory.

    Raises:
        Unusual: they do not fill one piece of it.
    """
    if not tensor.is_contiguous():  # in another order, as of channels_last
        if tensor.storage_offset() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            raise Unusual
        tensor = tensor.as_strided((tensor.numel(),), (1,), 0)
    tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # which NumPy does not know
    return tensor.cpu().numpy()
