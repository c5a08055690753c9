"""Validation of batches: hooks of a data module, samples that depend on their batch, and the data of a fit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bdistil.boosting.part import Part
from bdistil.boosting.settings import RECOMPUTE
from bdistil.data.loaders import Index
from bdistil.data.loaders.checks import same_x
from bdistil.data.loaders.fingerprints import leaves, spread
from bdistil.errors import UserError
from bdistil.metrics.cost import as_written
from bdistil.utils.modules import eval_mode, module_device
from bdistil.utils.trees import take_rows

TRIES = 8  # calls of each hook, as it may change batches at random
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
READ, COMPARED = 16, 4  # samples whose sizes are read, and how many of the smallest and of the largest are compared
# Largest change of a logit, relative to the largest logit, that counts as rounding.
ROUNDING = 1e-3
# Number of training samples on which the teacher is evaluated again when a run is resumed, and the largest rms
# difference, in units of the ledger, that counts as rounding: a run may resume on another device, or in bfloat16.
ASKED, UNCHANGED = 8, 0.02


def check_hooks(owner: pl.LightningDataModule | pl.LightningModule, loader: Any, *, indexed: bool = True) -> None:
    """Calls the batch hooks of a data module or a module on a batch (x, y, index), as in training.

    `loader` yields (x, y). Without `indexed`, the batch is passed as this loader yields it.

    Raises:
        UserError: a hook changes the batch, or fails.
    """
    hooks = [hook for hook in HOOKS if is_overridden(hook, owner)]
    if not hooks or not isinstance(loader, DataLoader) or not isinstance(loader.dataset, Sized) or not loader.dataset:
        return
    last = len(loader.dataset) - 1
    batch = loader.collate_fn([loader.dataset[0], loader.dataset[last]])
    batch = (*batch, torch.tensor([0, last])) if indexed else batch
    trainer: Any = owner.trainer
    state = None if trainer is None else trainer.training
    if trainer is not None:
        trainer.training = True  # hooks ask for it
    try:
        _call_hooks(owner, hooks, batch, indexed)
    finally:
        if trainer is not None:
            trainer.training = state


def _call_hooks(owner: Any, hooks: list[str], batch: Any, indexed: bool) -> None:
    for hook in hooks * TRIES:
        device = [torch.device("cpu")] if hook == "transfer_batch_to_device" else []
        try:
            found = getattr(owner, hook)(copy.deepcopy(batch), *device, 0)
        except Exception as error:
            raise UserError(
                f"`{type(owner).__name__}.{hook}` fails on a batch{' (x, y, index)' if indexed else ''}, as those of "
                f"a fit are: {type(error).__name__}: {error}. Leave the hook out, or let it return such a batch as it "
                "is."
            ) from error
        if not isinstance(found, Mapping if isinstance(batch, Mapping) else list | tuple) or not same_x(batch, found):
            raise UserError(
                f"`{type(owner).__name__}.{hook}` changes batches after they are read, so what is cached or measured "
                "would be of another x. Do it in the dataset or the collate function."
            )


def indexed(batch: Any) -> tuple[Any, Any, Index]:
    """Returns a batch (x, y, index) unchanged. Raises UserError if the index is missing."""
    if not isinstance(batch, tuple | list) or len(batch) != 3:
        raise UserError(
            "Expected a batch (x, y, index) of the data module that `controller.rounds(datamodule)` was given, got one "
            "of other loaders. Inside the loop, give fit and validate of the Trainer that data module."
        )
    x, y, index = batch
    return x, y, index


def check_fit(trainer: pl.Trainer, datamodule: pl.LightningDataModule | None) -> None:
    """Raises UserError if a Trainer fits other data than those of the run."""
    if getattr(trainer, "datamodule", None) is not datamodule:
        raise UserError(
            "Expected the data module that `controller.rounds(datamodule)` was given, got another one or loaders. "
            "Fit with trainer.fit(round_module, datamodule): batches need the number of each sample."
        )


class _Twice(NamedTuple):
    """x of one sample, as a batch of one and as a row of a larger batch."""

    alone: Any
    together: Any


def check_independence(parts: Iterable[Part], nets: Mapping[str, nn.Module]) -> None:
    """Checks that the logits of a sample do not depend on its batch, so that they can be cached.

    Raises:
        UserError: the collate function mixes samples at random, or pads them and the padding changes the logits of a
            network.
    """
    for part in parts:
        batches = _batches_of(part.loader, part.items)
        if (rows := [row for row in batches if not same_x(row.alone, row.together)]) == []:
            continue
        again = _batches_of(part.loader, part.items)
        if not all(same_x(a.together, b.together) for a, b in zip(batches, again, strict=True)):
            raise UserError(
                f"The collate function of `{part.method}()` gives two different x for the same samples at two readings "
                "(MixUp, CutMix or another augmentation), so cached teacher logits would not belong to the x of a "
                f"batch. Give {RECOMPUTE} to evaluate the teacher on every batch."
            )
        for name, net in nets.items():
            if _sees_the_batch(net, rows):
                raise UserError(
                    f"x of a sample of `{part.method}()` depends on the batch that it is in (padding to the longest, "
                    f"or statistics of the batch), and the {name} answers differently, so cached logits would not "
                    "belong to it. Pad to a common length, let the network use a mask or lengths, or give "
                    f"{RECOMPUTE}."
                )


def _batches_of(loader: DataLoader[Any], items: Any) -> list[_Twice]:
    """Some of the smallest and the largest samples, alone and in one batch; none if a batch cannot be split."""
    read = [items[number] for number in spread(len(items), READ)]
    alone = [loader.collate_fn([item])[0] for item in read]
    order = sorted(range(len(read)), key=lambda number: sum(leaf.numel() for leaf in leaves(alone[number])))
    chosen = sorted({*order[:COMPARED], *order[-COMPARED:]})
    together, _ = loader.collate_fn([read[number] for number in chosen])
    with suppress(UserError):  # a batch that cannot be split into samples
        return [_Twice(alone[number], take_rows(together, slice(row, row + 1))) for row, number in enumerate(chosen)]
    return []


@torch.no_grad()
def check_teacher(teacher: nn.Module, part: Part) -> None:
    """Compares the teacher's logits of some samples with the ledger, as equal weights do not imply equal logits.

    A non-deterministic teacher is not compared.

    Raises:
        UserError: they differ by more than rounding.
    """
    device = module_device(teacher)
    numbers = spread(part.samples, ASKED)

    def ask() -> Tensor:
        items = ([part.items[number]] * min(2, part.batch_size) for number in numbers)  # many networks need two samples
        batches = (move_data_to_device(part.loader.collate_fn(pair)[0], device) for pair in items)
        return part.ledger.units.inward(torch.cat([teacher(x)[:1].float().cpu() for x in batches]))

    with as_written(teacher):
        now = ask()
        off = float((now - part.ledger.teacher_logits(np.asarray(numbers))).square().mean().sqrt())
        if off <= UNCHANGED or float((ask() - now).square().mean().sqrt()) > UNCHANGED:
            return
    raise UserError(
        f"Expected the teacher that the run in {part.ledger.folder.parent} was started with, got one of the same "
        f"weights whose answers differ by {off:.0%} of their rms: an attribute, a function or the preprocessing has "
        "changed. Give that teacher, or choose another `run_dir`."
    )


@torch.no_grad()
def _sees_the_batch(net: nn.Module, rows: Sequence[_Twice]) -> bool:
    """Whether the logits of samples differ between both forms; leaves the random state unchanged."""
    device = module_device(net)
    with as_written(net), eval_mode(net):
        for row in rows:
            first, second = (net(move_data_to_device(x, device)) for x in row)
            if isinstance(first, Tensor) and not close(first, second):
                return True
    return False


def close(first: Tensor, second: Tensor) -> bool:
    """Whether logits are equal up to rounding."""
    if first.shape != second.shape or not first.numel():
        return first.shape == second.shape
    one, other = first.float(), second.float()
    largest = float(one.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(one, other, rtol=0.0, atol=ROUNDING * largest, equal_nan=True)
