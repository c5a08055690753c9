"""Wrong labels on purpose: symmetric and asymmetric noise, on the training part of anyone's data module alone."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bdistil.data.loaders import single_loader, with_dataset
from bdistil.errors import UserError

Noise = Literal["symmetric", "asymmetric"]


def flip_labels(
    labels: Tensor,
    rate: float,
    *,
    classes: int,
    seed: int,
    kind: Noise = "symmetric",
    to: Mapping[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Makes a share of the labels wrong.

    Args:
        labels: class numbers (N,).
        rate: share that becomes wrong, in 0 … 1; exactly that share, rounded, of the labels that can change.
        classes: L.
        seed: of the draw.
        kind: `symmetric` takes any other class; `asymmetric` the one that is mistaken for it.
        to: the class that each is mistaken for; the next one by default. Classes that are left out stay as they are.

    Returns:
        New labels (N,), and which are wrong, (N,) bool.

    Raises:
        UserError: a rate that is not in 0 … 1, an unknown kind, or a class that is not in 0 … L-1.
    """
    _check(rate, kind, to, classes)
    generator = torch.Generator().manual_seed(seed)
    table = torch.arange(classes)
    if kind == "asymmetric":
        wrong = to if to is not None else {label: (label + 1) % classes for label in range(classes)}
        table[list(wrong)] = torch.tensor(list(wrong.values()))
    shift = torch.randint(1, classes, (len(labels),), generator=generator)
    goal = (labels + shift) % classes if kind == "symmetric" else table[labels]
    able = (goal != labels).nonzero().flatten()
    chosen = able[torch.randperm(len(able), generator=generator)[: round(rate * len(able))]]
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[chosen] = True
    return torch.where(flipped, goal, labels), flipped


def _check(rate: float, kind: str, to: Mapping[int, int] | None, classes: int) -> None:
    if not 0 <= rate <= 1:
        raise UserError(f"Expected `rate` of wrong labels to be in 0 … 1, got {rate}.")
    if kind not in ("symmetric", "asymmetric"):
        raise UserError(f"Expected `kind` of label noise to be 'symmetric' or 'asymmetric', got {kind!r}.")
    beyond = [label for pair in (to or {}).items() for label in pair if not 0 <= label < classes]
    if beyond:
        raise UserError(f"Expected the classes of `to` to be in 0 … {classes - 1}, got {beyond[0]}.")


class NoisyLabels(Dataset[Any]):
    """A dataset with some labels made wrong; x is as it was.

    Args:
        dataset: map-style, yields (x, y); read once, for its labels.
        rate: share of wrong labels.
        classes: L; the largest label and one by default.
        seed: of the draw, kept as an attribute.
        kind: of the noise.
        to: the class that each is mistaken for by asymmetric noise.

    Attributes:
        labels: as they are now, (N,).
        flipped: which of them are wrong, (N,) bool.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        rate: float,
        *,
        classes: int | None = None,
        seed: int = 0,
        kind: Noise = "symmetric",
        to: Mapping[int, int] | None = None,
    ) -> None:
        self.dataset, self.rate, self.seed, self.kind = dataset, rate, seed, kind
        clean = labels_of(dataset)
        self.labels, self.flipped = flip_labels(
            clean, rate, classes=classes or int(clean.max()) + 1, seed=seed, kind=kind, to=to
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.dataset[index][0], self.labels[index]


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """Labels (N,) of a dataset that yields (x, y)."""
    known = dataset.tensors[1] if isinstance(dataset, TensorDataset) else getattr(dataset, "labels", None)
    if isinstance(known, Tensor):
        return known
    return torch.tensor([int(dataset[index][1]) for index in range(len(cast(Sized, dataset)))])


def flipped_labels(dataset: Any) -> Tensor | None:
    """Which labels `NoisyLabels` made wrong, (N,) bool; None of a dataset that does not say."""
    flipped = getattr(dataset, "flipped", None)
    return flipped if isinstance(flipped, Tensor) and len(flipped) == len(dataset) else None


class LabelNoise(pl.LightningDataModule):
    """Anyone's data module with wrong labels in its training part; validation and test stay clean.

    Args:
        data: the data module.
        rate: share of wrong labels.
        kind: `symmetric` or `asymmetric`.
        seed: of the draw; in config.yaml of a run, as all of these.
        classes: L; the largest label and one by default.
        to: the class that each is mistaken for by asymmetric noise; the next one by default.
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        rate: float = 0.4,
        kind: Noise = "symmetric",
        seed: int = 0,
        classes: int | None = None,
        to: dict[int, int] | None = None,
    ) -> None:
        super().__init__()
        _check(rate, kind, None, 0)
        self.data, self.rate, self.kind, self.seed, self.classes, self.to = data, rate, kind, seed, classes, to
        self.noisy: NoisyLabels | None = None

    def prepare_data(self) -> None:
        """As of the data module."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """As of the data module."""
        self.data.setup(stage)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        """The training part with wrong labels, read as before."""
        loader = single_loader(self.data.train_dataloader())
        if self.noisy is None:
            self.noisy = NoisyLabels(
                loader.dataset, self.rate, classes=self.classes, seed=self.seed, kind=self.kind, to=self.to
            )
            wrong = int(self.noisy.flipped.sum())
            rank_zero_info(
                f"{wrong:,} of {len(self.noisy):,} training labels made wrong ({self.kind}, seed {self.seed})."
            )
        return with_dataset(loader, self.noisy)

    def val_dataloader(self) -> Any:
        """The clean validation part."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """The clean test part."""
        return self.data.test_dataloader()
