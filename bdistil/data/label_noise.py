"""Symmetric and asymmetric label noise for the training part of any data module."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bdistil.data.loaders import single_loader, with_dataset
from bdistil.data.readers.images import ArrayImages
from bdistil.errors import UserError

Noise = Literal["symmetric", "asymmetric"]
FORWARDED = (
    "prepare_data", "val_dataloader", "test_dataloader", "predict_dataloader", "teardown",
    "state_dict", "load_state_dict", "on_exception",
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
)  # fmt: skip


def flip_labels(
    labels: Tensor,
    rate: float,
    *,
    classes: int,
    seed: int,
    kind: Noise = "symmetric",
    to: Mapping[int, int] | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Makes a share of the labels wrong.

    Args:
        labels: class numbers (N,); negative ones and `ignore_index` mark unlabelled samples and are kept.
        rate: share of wrong labels among those that can change, in 0 … 1; met exactly, up to rounding.
        classes: L.
        seed: seed of the choice.
        kind: `symmetric` replaces a label by any other class, `asymmetric` by the one in `to`.
        to: the class that replaces each class; by default the next one. Classes that are left out do not change.
        ignore_index: class number of unlabelled samples, if it is not negative.

    Returns:
        New labels (N,), and whether each is wrong, (N,) bool.

    Raises:
        UserError: a rate outside of 0 … 1, an unknown kind, fewer than two classes, or a label or class outside of
            0 … L-1.

    Example:
        >>> flip_labels(torch.tensor([0, 0, 1, 1]), 0.5, classes=2, seed=0)
        (tensor([0, 1, 1, 0]), tensor([False,  True, False,  True]))
    """
    _check(rate, kind)
    if classes < 2:
        raise UserError(f"Expected two or more `classes`, as a wrong label is one of another class, got {classes}.")
    if beyond := [label for pair in (to or {}).items() for label in pair if not 0 <= label < classes]:
        raise UserError(f"Expected the classes of `to` to be in 0 … {classes - 1}, got {beyond[0]}.")
    generator = torch.Generator().manual_seed(seed)
    table = torch.arange(classes)
    if kind == "asymmetric":
        wrong = to if to is not None else {label: (label + 1) % classes for label in range(classes)}
        table[list(wrong)] = torch.tensor(list(wrong.values()))
    shift = torch.randint(1, classes, (len(labels),), generator=generator)
    given = has_label(labels, ignore_index)
    if bool((labels[given] >= classes).any()):
        raise UserError(f"Expected labels in 0 … {classes - 1} for {classes} classes, got {int(labels[given].max())}.")
    known = labels.where(given, 0)
    goal = labels.where(~given, (known + shift) % classes if kind == "symmetric" else table[known])
    able = (goal != labels).nonzero().flatten()
    chosen = able[torch.randperm(len(able), generator=generator)[: round(rate * len(able))]]
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[chosen] = True
    return torch.where(flipped, goal, labels), flipped


def has_label(labels: Tensor, ignore_index: int | None = None) -> Tensor:
    """Whether each class number (N,) is a label rather than the mark of an unlabelled sample, (N,) bool."""
    given = labels >= 0
    return given if ignore_index is None else given & (labels != ignore_index)


def _check(rate: float, kind: str) -> None:
    if not 0 <= rate <= 1:
        raise UserError(f"Expected `rate` of wrong labels to be in 0 … 1, got {rate}.")
    if kind not in ("symmetric", "asymmetric"):
        raise UserError(f"Expected `kind` of label noise to be 'symmetric' or 'asymmetric', got {kind!r}.")


class NoisyLabels(Dataset[Any]):
    """A dataset with some wrong labels; x does not change.

    Args:
        dataset: map-style, yields (x, y); read once, for its labels.
        rate: share of wrong labels.
        classes: L; by default the largest label plus one.
        seed: seed of the choice.
        ignore_index: class number of unlabelled samples, if it is not negative.
        noise: `kind` and `to`, as for `flip_labels`.

    Raises:
        UserError: no sample has a label, or the labels are not class numbers.

    Attributes:
        rate, seed: as given.
        labels: the new labels, (N,).
        flipped: whether each is wrong, (N,) bool.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        rate: float,
        *,
        classes: int | None = None,
        seed: int = 0,
        ignore_index: int | None = None,
        **noise: Any,
    ) -> None:
        self.dataset, self.rate, self.seed, clean = dataset, rate, seed, labels_of(dataset)
        labelled = clean[has_label(clean, ignore_index)]
        if not len(labelled):
            raise UserError(
                f"Expected samples with a label, of which some are made wrong, got none among {len(clean)} samples: "
                "every label is negative or `ignore_index`. Leave out the label noise, or give the labels."
            )
        classes = classes or int(labelled.max()) + 1
        noise |= {"classes": classes, "seed": seed, "ignore_index": ignore_index}
        self.labels, self.flipped = flip_labels(clean, rate, **noise)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.dataset[index][0], self.labels[index]


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """Labels (N,) of a dataset that yields (x, y), read from its items.

    Label attributes of arbitrary datasets are not used: they may belong to other samples, or change on access.

    Raises:
        UserError: an item is not a pair, or the labels are not class numbers.
    """
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        labels = dataset.tensors[1]
    elif isinstance(dataset, ArrayImages):  # without decoding the images
        labels = dataset.labels
    else:
        labels = torch.stack([_label(dataset[index]) for index in range(len(cast(Sized, dataset)))])
    if labels.is_floating_point() or labels.numel() != len(labels):
        raise UserError(
            "Expected class numbers as labels, of which some are made wrong, got "
            f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}. Give y.argmax(-1) of one-hot "
            "labels; those of a regression have no such noise."
        )
    return labels.reshape(-1)


def _label(item: Any) -> Tensor:
    if not isinstance(item, tuple | list) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise UserError(
            f"Expected items (x, y) of a dataset whose labels are made wrong, got a {type(item).__name__}{size}."
        )
    return torch.as_tensor(item[1])


def flipped_labels(dataset: Any) -> Tensor | None:
    """The attribute `flipped`, (N,) bool, of a dataset such as `NoisyLabels`; None for any other dataset."""
    flipped = getattr(dataset, "flipped", None)
    return flipped if isinstance(flipped, Tensor) and len(flipped) == len(dataset) else None


class LabelNoise(pl.LightningDataModule):
    """Wraps a data module and makes a share of its training labels wrong; validation and test part do not change.

    Hooks and public attributes are forwarded to the wrapped data module.

    Args:
        data: any data module.
        rate: share of wrong labels.
        kind: `symmetric` or `asymmetric`, see `flip_labels`.
        seed: seed of the choice.
        classes: L; by default the largest label plus one.
        to: the class that replaces each class, for asymmetric noise; by default the next one.
        ignore_index: class number of unlabelled samples, as in the settings of a run, if it is not negative.
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        rate: float = 0.4,
        kind: Noise = "symmetric",
        seed: int = 0,
        classes: int | None = None,
        to: dict[int, int] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        _check(rate, kind)
        self.prepare_data_per_node = data.prepare_data_per_node
        self.noisy: NoisyLabels | None = None
        self.noise: dict[str, Any] = {"rate": rate, "kind": kind, "seed": seed, "classes": classes, "to": to}
        self.noise["ignore_index"] = ignore_index
        self.data = data
        for method in FORWARDED:  # lets Lightning and the checks of a run see which of them `data` overrides
            if getattr(type(self), method) is getattr(pl.LightningDataModule, method):  # not overridden in a subclass
                vars(self)[method] = getattr(data, method)

    def __getattr__(self, name: str) -> Any:
        """Attributes that other code asks a data module for, such as `labels`, `normalisation`, `check_outputs`."""
        if name == "data" or name.startswith("_"):  # asked during construction or unpickling
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.data, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes of the wrapped data module are set there, such as `batch_size` by Lightning's Tuner."""
        inner = vars(self).get("data")
        own = name in vars(self) or hasattr(type(self), name)  # such as a loader that a run replaces
        forwarded = inner is not None and name in vars(inner) and not own
        if forwarded:
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def setup(self, stage: str | None = None) -> None:
        """Sets up the wrapped data module."""
        self.data.trainer = self.trainer  # Lightning sets it on the wrapper only
        self.data.setup(stage)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        """The training part with wrong labels, in the order of the data module."""
        loader = single_loader(self.data.train_dataloader())
        if self.noisy is None or self.noisy.dataset is not loader.dataset:
            before, self.noisy = self.noisy, NoisyLabels(loader.dataset, **self.noise)
            if before is None or not torch.equal(before.labels, self.noisy.labels):
                wrong, kind, seed = int(self.noisy.flipped.sum()), self.noise["kind"], self.noise["seed"]
                rank_zero_info(f"{wrong:,} of {len(self.noisy):,} training labels made wrong ({kind}, seed {seed}).")
        return with_dataset(loader, self.noisy)
