"""Validation of all samples before training: every label, and the structure and shape of x."""

from __future__ import annotations

import cmath
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from bdistil.data.loaders import LOADERS, as_labels, rows_loader
from bdistil.data.loaders.fingerprints import spread
from bdistil.errors import UserError
from bdistil.metrics.quality import UNLABELLED, Task
from bdistil.models.inputs import InputSpec
from bdistil.utils.trees import leaves_of

PROBES = 16  # samples on which the labels declared by a dataset are compared with those that it returns
USUAL_BATCH = 64  # samples read at once if the user's loader has no fixed batch size


def check_samples(loader: DataLoader[Any], name: str, task: Task, outputs: int) -> InputSpec:
    """Checks every label of a part; returns structure and shape of its x.

    For tensors in memory and datasets that declare their labels in `targets` or `labels`, the labels are read without
    the samples. With any other dataset, or with a user-defined collate function, all samples are read.

    Args:
        loader: loader of the part; its batches are (x, y), see `bdistil.data.loaders.paired`.
        name: name of the user's method that returned it.
        task: task of the run.
        outputs: L.

    Raises:
        UserError: a label is invalid; names the first such sample.
    """
    known = declared_labels(loader)
    if known is not None:
        check_labels(known, np.arange(len(known)), f"`{name}()`", task, outputs)
        _check_some([known], name, task)
    collate: Any = loader.collate_fn
    if known is not None or (collate.labels is None and _of_one_shape(loader)):
        return InputSpec.of_batch(collate([loader.dataset[0]])[0])
    labels, specs = [], _alone(loader)
    for x, y, index in all_batches(loader):
        specs.append(InputSpec.of_batch(x))
        if len(specs) > 1:
            specs = [reduce(InputSpec.joined, specs)]
        if y is not None:
            _check_count(y, index, name)
            check_labels(y, index, f"`{name}()`", task, outputs)
            labels.append(y)
    if labels:
        _check_some(labels, name, task)
    return specs[0]


def _alone(loader: DataLoader[Any]) -> list[InputSpec]:
    """Structure and shape of some samples in batches of one, as padding in larger batches may hide varying lengths."""
    if isinstance(loader.dataset, IterableDataset):
        return []
    rows = spread(len(loader.dataset), PROBES)  # type: ignore[arg-type]
    return [reduce(InputSpec.joined, (InputSpec.of_batch(loader.collate_fn([loader.dataset[r]])[0]) for r in rows))]


def _check_some(labels: Sequence[Tensor], name: str, task: Task) -> None:
    if name != LOADERS[0] and task != "regression" and all(bool((y == UNLABELLED).all()) for y in labels):
        raise UserError(
            f"Expected labels in `{name}()`, on which accuracy is measured, but no sample has one. Give "
            "BoostingSettings(labels=None) to measure the agreement with the teacher."
        )
    if name != LOADERS[0] and task == "multilabel" and not any(bool((y == 1).any()) for y in labels):
        raise UserError(f"Expected a label that holds in `{name}()`, on which average precision is measured, got none.")


def all_batches(loader: DataLoader[Any]) -> Iterator[tuple[Any, Tensor | None, np.ndarray[Any, Any]]]:
    """(x, y, index) of all samples of a part, in the order of its dataset."""
    if isinstance(loader.dataset, IterableDataset):  # a test part, which needs no sample numbers
        read = 0
        for x, y in loader:
            count = 0 if y is None else len(y)
            yield x, y, np.arange(read, read + count)
            read += count
        return
    samples: int = len(loader.dataset)  # type: ignore[arg-type]
    size = loader.batch_size or USUAL_BATCH
    yield from rows_loader(loader, [range(low, min(low + size, samples)) for low in range(0, samples, size)])


def check_finite(x: Any, index: np.ndarray[Any, Any], name: str) -> None:
    """Raises UserError if x of a batch contains NaN or infinity, which an ensemble rejects; names the sample."""
    for leaf in leaves_of(x):
        # A sum is the cheapest operation that propagates NaN and infinity; a sum of finite numbers may overflow.
        inexact = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        if not inexact or cmath.isfinite(leaf.sum().item()):
            continue
        wrong = (~leaf.isfinite()).nonzero()
        if len(wrong):
            sample = f"sample {int(index[int(wrong[0][0])])}" if leaf.ndim and len(leaf) == len(index) else "a sample"
            raise UserError(
                f"Expected x of `{name}()` without NaN or infinity, got some in {sample}. Fix it in the dataset, or "
                "leave it out."
            )


def read_labels(loader: DataLoader[Any]) -> Tensor:
    """Labels (N, ...) of a labelled part, in the order of its dataset."""
    known = declared_labels(loader)
    return torch.cat([y for _, y, _ in all_batches(loader) if y is not None]) if known is None else known


def declared_labels(loader: DataLoader[Any]) -> Tensor | None:
    """Labels (N, ...) of a part in the order of its dataset, if they are known without reading the samples.

    None if they are not, or if the user's collate function may change them or batch samples of different shapes.
    """
    collate: Any = loader.collate_fn
    try:
        found = _declared(loader.dataset)
        if found is None or not _of_one_shape(loader) or len(found) != len(loader.dataset):  # type: ignore[arg-type]
            return None
        found = as_labels(found, collate.ignore_index)
    except UserError:  # names of classes or files, which the dataset converts when a sample is read
        return None
    if type(loader.dataset) is TensorDataset:
        return found
    rows = spread(len(found), PROBES)
    _, given = collate([loader.dataset[row] for row in rows])
    same = given is not None and given.shape == found[rows].shape and bool((given == found[rows]).all())
    return found if same else None


def _of_one_shape(loader: DataLoader[Any]) -> bool:
    """Whether samples are stacked by torch's default collate function, which requires equal shapes."""
    collate: Any = loader.collate_fn
    stacked = collate.collate is default_collate and loader.batch_size != 1
    return stacked and not isinstance(loader.dataset, IterableDataset)


def _declared(dataset: Any) -> Any:
    if type(dataset) is TensorDataset:
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    if type(dataset) is Subset:
        inner = _declared(dataset.dataset)
        return None if inner is None else as_labels(inner)[torch.as_tensor(list(dataset.indices))]
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, Tensor | np.ndarray | list):
            return found
    return None


def _check_count(y: Tensor, index: np.ndarray[Any, Any], name: str) -> None:
    if y.ndim == 0 or len(y) != len(index):
        raise UserError(
            f"Expected one label y for each sample of a batch of `{name}()`, got shape {tuple(y.shape)} for "
            f"{len(index)} samples."
        )


def check_labels(y: Tensor, index: np.ndarray[Any, Any], where: str, task: Task, outputs: int) -> None:
    """Checks the labels y (B, ...) of the samples `index` (B,).

    Args:
        y: labels as returned by `bdistil.data.loaders.as_labels`.
        index: sample numbers, for the message.
        where: origin of the samples, for the message.
        task: task of the run.
        outputs: L.

    Raises:
        UserError: a label is invalid; names the first such sample.
    """
    if task == "regression":
        wrong, allowed = _wrong_real(y, outputs)
    elif task == "multilabel":
        wrong, allowed = _wrong_multilabel(y, outputs)
    elif y.ndim == 1 and not y.is_floating_point():
        wrong = (y >= outputs) | ((y < 0) & (y != UNLABELLED))
        allowed = f"a class number in 0 … {outputs - 1}, as the teacher has {outputs} outputs"
    else:
        wrong, allowed = _wrong_soft(y, outputs)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise UserError(
            f"Expected the label y of a sample to be {allowed}, got {_text(y[first])} for sample {int(index[first])} "
            f"of {where}. {_remedy(y, task, outputs)}"
        )


def _wrong_real(y: Tensor, outputs: int) -> tuple[Tensor, str]:
    allowed = f"{outputs} finite numbers, one per output of the teacher"
    if y.numel() != len(y) * outputs:
        return torch.ones(len(y), dtype=torch.bool), allowed
    return ~y.reshape(len(y), outputs).double().isfinite().all(1), allowed


def _wrong_multilabel(y: Tensor, outputs: int) -> tuple[Tensor, str]:
    allowed = f"{outputs} numbers that are 0 or 1, one per output of the teacher"
    if y.numel() != len(y) * outputs:
        return torch.ones(len(y), dtype=torch.bool), allowed
    rows = y.reshape(len(y), outputs)
    return ~((rows == 0) | (rows == 1) | (rows == UNLABELLED)).all(1), allowed


def _wrong_soft(y: Tensor, outputs: int) -> tuple[Tensor, str]:
    allowed = f"a class number, or soft labels: {outputs} numbers >= 0 that sum to 1"
    if y.ndim != 2 or y.shape[1] != outputs:
        return torch.ones(len(y), dtype=torch.bool), allowed
    rows = y.double()
    return ~((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-2)), allowed


def _text(label: Tensor) -> str:
    kind = str(label.dtype).removeprefix("torch.")
    if label.numel() > 1:
        return f"{kind} numbers of shape {tuple(label.shape)} and sum {label.sum().item():g}"
    return f"{label.item()} ({kind})" if label.is_floating_point() else str(label.item())


def _remedy(y: Tensor, task: Task, outputs: int) -> str:
    """Advice for the error message on how to fix invalid labels."""
    if task == "regression":
        return "Give y of shape (N,) for one output, (N, L) for several; leave out samples without a label."
    if task == "multilabel":
        return "Class numbers (N,) are for task='classification'."
    if y.ndim == 1 and not y.is_floating_point():
        if int(y.max()) == outputs and int(y.min()) >= 0:
            return (
                f"If the classes are numbered from 1, give y - 1; if {outputs} is one more class, the teacher lacks it."
            )
        return (
            "If it marks samples without a label, give BoostingSettings(ignore_index=…) (model.boosting.ignore_index) "
            "with that number; otherwise number the classes as the teacher does."
        )
    if y.ndim == 1:
        return (
            "Give class numbers as integers, y.long(), or BoostingSettings(task='regression') (model.boosting.task: "
            "regression) for real outputs."
        )
    return (
        "Several labels that hold together are BoostingSettings(task='multilabel'), real outputs task='regression' "
        "(model.boosting.task)."
    )
