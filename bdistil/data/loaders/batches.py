"""Converts batches of a user's loader to (x, y): from pairs, mappings with a key for the labels, or x alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bdistil.errors import UserError
from bdistil.metrics.quality import UNLABELLED

KEY = (
    "Name the key of the labels by BoostingSettings(labels='…') (model.boosting.labels), or give labels=None where "
    "there are none."
)


class PairCollate:
    """Wraps a collate function so that its batches are (x, y), with y as a tensor.

    Args:
        collate: collate function of the user's loader.
        labels: key of y in a batch that is a mapping; None where the batch is x alone, without labels.
        ignore_index: class number of a sample without a label; it becomes `UNLABELLED`.
        name: name of the user's method, for messages.
        optional: whether a run without labels is possible, for messages.

    Example:
        >>> collate = PairCollate(lambda rows: {"ids": torch.tensor([[1, 2]]), "labels": [3]})
        >>> collate([None])
        ({'ids': tensor([[1, 2]])}, tensor([3]))
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        labels: str | None = "labels",
        ignore_index: int = UNLABELLED,
        name: str = "train_dataloader",
        optional: bool = True,
    ) -> None:
        self.collate, self.labels, self.ignore_index = collate, labels, ignore_index
        self.name, self.optional = name, optional

    def __call__(self, items: list[Any]) -> tuple[Any, Tensor | None]:
        """(x, y) of some items."""
        return self.split(self.collate(items))

    def split(self, batch: Any) -> tuple[Any, Tensor | None]:
        """(x, y) of a batch; y is None where there are no labels.

        Raises:
            UserError: the batch has another form.
        """
        if self.labels is None:
            alone = isinstance(batch, tuple | list) and len(batch) == 1
            return batch[0] if alone else batch, None
        if isinstance(batch, Mapping):
            x, y = self._without_labels(batch)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            x, y = batch
        else:
            raise UserError(
                f"Expected batches of `{self.name}()` to be (x, y), got {_form(batch)}. The index is added for you. "
                "Give the loader a collate function that returns (x, y) or a mapping"
                + (", or BoostingSettings(labels=None) where a batch is x alone." if self.optional else ".")
            )
        return x, as_labels(y, self.ignore_index)

    def _without_labels(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        if self.labels not in batch:
            raise UserError(
                f"Expected the key {self.labels!r} in batches of `{self.name}()`, got {', '.join(map(repr, batch))}. "
                + (KEY if self.optional else "Name the key of the labels by `labels`.")
            )
        x = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        return x, x.pop(self.labels)


def _form(batch: Any) -> str:
    return f"{len(batch)} values" if isinstance(batch, tuple | list) else type(batch).__name__


def as_labels(labels: Any, ignore_index: int = UNLABELLED) -> Tensor:
    """Converts the labels of a batch, of any type, to a tensor; integers become int64.

    Lists and arrays are converted; a list of L tensors (B,), as torch's collate function builds from items with L
    numbers, becomes (B, L), and a column (B, 1) of integers becomes (B,). Numbers equal to `ignore_index` become
    `UNLABELLED`; real ones only if it is negative, as others may be probabilities.

    Raises:
        UserError: the labels are not numeric.

    Example:
        >>> as_labels(np.array([1, 255], np.uint8), ignore_index=255).tolist()
        [1, -100]
    """
    if isinstance(labels, list | tuple) and len(labels) and all(isinstance(part, Tensor) for part in labels):
        labels = torch.stack(list(labels), 0 if labels[0].ndim == 0 else 1)
    try:
        y: Tensor = labels if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Expected labels y that are numbers, got {type(labels).__name__} ({error}). Give each class a number, or "
            "BoostingSettings(labels=None) where there are none."
        ) from error
    if not y.is_floating_point():
        y = y.long().squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y.long()
    elif ignore_index >= 0:  # a probability
        return y
    return y if ignore_index == UNLABELLED else torch.where(y == ignore_index, UNLABELLED, y)


def paired(
    loader: Any, labels: str | None = "labels", *, ignore_index: int = UNLABELLED, name: str = "train_dataloader"
) -> Any:
    """A copy of a user's loader whose batches are (x, y), see `PairCollate`; anything but a DataLoader is unchanged."""
    if not isinstance(loader, DataLoader) or isinstance(loader.collate_fn, PairCollate):
        return loader
    loader = copy.copy(loader)
    loader.collate_fn = PairCollate(loader.collate_fn, labels, ignore_index, name)
    return loader


def pairs_of(
    loader: Iterable[Any], labels: str | None = "labels", ignore_index: int = UNLABELLED
) -> Iterator[tuple[Any, Tensor | None]]:
    """The batches of a loader, or of any other iterable, as (x, y), see `PairCollate`."""
    ready = isinstance(getattr(loader, "collate_fn", None), PairCollate)
    split = PairCollate(list, labels, ignore_index, "loader").split
    for batch in loader:
        yield batch if ready else split(batch)
