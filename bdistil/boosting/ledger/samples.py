"""Checks that samples are still those for which the ledger holds state: at each start, in each fit and in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from bdistil.boosting.ledger.fingerprints import SampleSketches
from bdistil.boosting.settings import RECOMPUTE
from bdistil.data.loaders import Index
from bdistil.data.loaders.fingerprints import (
    Digests,
    Items,
    changed,
    digests,
    leaves,
    read_digests,
    row_sketches,
    same_sketch,
    spread,
    stable_digests,
)
from bdistil.errors import UserError
from bdistil.storage.files import write_atomically
from bdistil.utils import distributed

FILE = "samples.json"  # digests of some samples, in the ledger folder of a part
# Number of samples compared at the start of a fit.
FEW = 4
# Batches of a fit that are compared: the first `FIRST`, then every `EVERY`-th, a prime: others in each epoch.
FIRST, EVERY = 8, 31
# Number of shapes of padded samples for which sketches are compared with those of the samples alone.
SHAPES = 4

ADVICE_SEED = (
    "State is kept by sample number, so the sample behind a number must be the same in every fit, start and process. "
    "Where `setup()` or a `*_dataloader()` splits or selects at random, seed it: "
    "random_split(dataset, lengths, generator=torch.Generator().manual_seed(0)). Where the data were edited, choose "
    "another `run_dir`. A curriculum keeps the dataset, and chooses samples by a sampler."
)
ADVICE_SPLIT = (
    "Its parts would be mixed: samples that the students were trained on would be among those of the figures. Where "
    "the data module splits at random, seed it: "
    "random_split(dataset, lengths, generator=torch.Generator().manual_seed(0))."
)
ADVICE_VIEWS = (
    f"Give {RECOMPUTE} to evaluate the teacher on every batch, or BoostingSettings(views=K) (model.boosting.views) to "
    "cache its logits on K fixed views of each sample."
)
ADVICE_BATCH = (
    "A hook such as `transfer_batch_to_device`, a callback, or a collate function that mixes or pads the samples of a "
    "batch changes them after they are read, so that cached logits of the teacher do not belong to them. Change "
    f"samples in the dataset, one by one, or give {RECOMPUTE}."
)


def check_stored(folder: Path, name: str, items: Items) -> None:
    """Compares some samples of a run with those of a dataset, see `check_known`.

    Args:
        folder: ledger folder of a part; nothing is checked if it holds no digests.
        name: name of the user's method that returned the loader.
        items: its dataset.

    Raises:
        UserError: a sample differs.
    """
    check_known(_stored_digests(folder), name, items, "in the run", ADVICE_SPLIT)


def store_samples(folder: Path, items: Items) -> None:
    """Stores the digests of some samples of a part for `check_stored`, unless already stored."""
    _store_digests(folder, lambda: stable_digests(items, spread(len(items))))


def _stored_digests(folder: Path) -> dict[int, Digests]:
    """The digests in a ledger folder; none if there is no file of them."""
    file = folder / FILE
    return read_known(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _store_digests(folder: Path, found: Callable[[], Mapping[int, Digests]]) -> None:
    """Stores digests, unless the folder already holds some."""
    if not (file := folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found()))


def read_known(stored: Mapping[str, Any]) -> dict[int, Digests]:
    """Converts stored JSON to digests by sample number."""
    return {int(number): _from_json(found) for number, found in stored.items()}


def check_known(known: Mapping[int, Digests], name: str, items: Items, where: str, way: str) -> None:
    """Compares samples of a dataset with known digests, ignoring elements that are random in either.

    Args:
        known: digests of samples spread over the dataset, including the last one.
        name: name of the user's method that returned the loader.
        items: its dataset.
        where: origin of the known samples, for the message.
        way: how to fix it, for the message.

    Raises:
        UserError: a sample or the number of samples differs.
    """
    if known and max(known) + 1 != len(items):
        raise UserError(f"`{name}()` gives a dataset of {len(items)} samples, not {max(known) + 1} as {where}. {way}")
    now = stable_digests(items, list(known))
    for number, found in known.items():
        if names := changed(found, now[number]):
            raise UserError(f"Sample {number} of `{name}()` has another {_and(names)} than {where}. {way}")


Shapes = tuple[tuple[int, ...], ...]  # of the tensors of a row


class SampleGuard:
    """Checks that the samples of a part are still those for which the ledger holds state.

    Some samples are compared whenever a loader is created. Without augmentation, sketches of all samples are stored
    with the teacher's logits, and rows of the batches of a fit are compared with them.

    Args:
        name: name of the user's method that returned the loader.
        loader: loader of the part; its batches are (x, y).
        items: its dataset, or a view of it.
        folder: ledger folder of the part.
        augmented: whether the items are fixed views of randomly augmented samples.
        recomputed: whether the teacher is evaluated on every batch, so that x may be random.
    """

    def __init__(
        self, name: str, loader: DataLoader[Any], items: Items, folder: Path, *, augmented: bool, recomputed: bool
    ) -> None:
        self.name, self.loader, self.items, self.folder = name, loader, items, folder
        self.digests = stable_digests(items, spread(len(items)))
        self.fixed, self.recomputed = not augmented and not recomputed, recomputed
        self._shapes: set[Shapes] = set()  # of samples, in batches whose sketches were compared
        self.sketches = SampleSketches(folder, len(items)) if self.fixed and self._sketches_hold() else None
        self._compared: Any = None  # the dataset compared most recently
        self.restart()

    def _sketches_hold(self) -> bool:
        """Whether sketches of samples do not depend on the batch, also if samples are padded with zeros."""
        items = [self.items[number] for number in spread(len(self.items), FIRST)]
        x, y = self.loader.collate_fn(items)
        together = _sketches(x, y, len(items))
        return all(bool(same_sketch(self._alone(item), row).all()) for item, row in zip(items, together, strict=True))

    def _alone(self, item: Any) -> Tensor:
        x, y = self.loader.collate_fn([item])
        return _sketches(x, y, 1)[0]

    # ---- some samples

    def compare_stored(self) -> None:
        """Compares some samples with those of earlier starts.

        Raises:
            UserError: a sample differs.
        """
        self._compare(_stored_digests(self.folder), self.digests)

    def store(self) -> None:
        """Stores the digests of some samples for later starts."""
        if distributed.rank() == 0:
            _store_digests(self.folder, lambda: self.digests)

    def compare_processes(self) -> None:
        """Compares some samples between processes; must be called by all of them.

        Raises:
            UserError: the samples differ; raised in all processes.
        """
        first = distributed.from_first(self.digests)
        same = first.keys() == self.digests.keys()
        same = same and not any(changed(found, self.digests[number]) for number, found in first.items())
        if not distributed.all_true(same):
            raise UserError(
                f"The processes read different samples behind the same numbers of `{self.name}()`. {ADVICE_SEED}"
            )

    def replace_loader(self, loader: DataLoader[Any], items: Items) -> None:
        """Replaces loader and dataset by the data module's current ones, and compares some samples.

        Raises:
            UserError: a sample or the number of samples differs.
        """
        if len(items) != len(self.items):
            raise UserError(
                f"`{self.name}()` gives a dataset of {len(items)} samples, but the run was started with "
                f"{len(self.items)}. {ADVICE_SEED}"
            )
        known, self._compared = self._compared, loader.dataset
        self.loader, self.items = loader, items
        if known is not loader.dataset:
            numbers = list(self.digests)
            few = [numbers[place] for place in spread(len(numbers), FEW)]
            self._compare(self.digests, read_digests(items, few))

    def _compare(self, before: Mapping[int, Digests], now: Mapping[int, Digests]) -> None:
        both = {number: changed(before[number], found) for number, found in now.items() if number in before}
        differ = {number: names for number, names in both.items() if names}
        if differ:  # reports the elements of all samples, as two samples may share some elements by chance
            self._refuse_item(next(iter(differ)), list(dict.fromkeys(chain.from_iterable(differ.values()))))

    def _refuse_item(self, number: int, names: Sequence[str]) -> None:
        """Raises UserError for a changed item; a random item is only an error if no randomness is allowed."""
        if random := changed(digests(self.items[number]), digests(self.items[number])):
            if not self.fixed:
                self._forget(random)
                return
            raise UserError(
                f"Two readings of sample {number} of `{self.name}()` give two {_and(random)}. {ADVICE_VIEWS}"
            )
        if self.recomputed and not {"y", getattr(self.loader.collate_fn, "labels", None)} & set(names):
            self._forget(names)
            rank_zero_warn(
                f"Sample {number} of `{self.name}()` has another {_and(names)} than before, and the same label. Its "
                "running error is that of the sample before; if this is another sample, seed what has chosen it: "
                "generator=torch.Generator().manual_seed(0)."
            )
            return
        raise UserError(
            f"Sample {number} of `{self.name}()` is not the one that this run keeps state for: its {_and(names)} "
            f"{'has' if len(names) == 1 else 'have'} changed. {ADVICE_SEED}"
        )

    def _forget(self, names: Sequence[str]) -> None:
        """Excludes random elements from later comparisons."""
        for found in self.digests.values():
            found.update(dict.fromkeys(set(names) & set(found)))

    # ---- batches

    def restart(self) -> None:
        """Starts a new fit: its dataset and its first batches will be compared again."""
        self._compared = None
        self._seen = 0  # batches

    def record(self, x: Any, y: Any, index: Index) -> None:
        """Stores the sketches of samples on which the teacher is evaluated, unless padding changes them."""
        if self.sketches is None:
            return
        sketches, shapes = _sketches(x, y, len(index)), _shapes(x)
        if shapes not in self._shapes and len(self._shapes) < SHAPES:
            self._shapes.add(shapes)
            self._check_padding(index, sketches.cpu(), shapes)
        if self.sketches is not None:
            self.sketches.write(int(index[0]), sketches)

    def _check_padding(self, index: Index, sketches: Tensor, shapes: Shapes) -> None:
        """Drops all sketches if a longer sample of a batch pads others such that theirs differ from those alone."""
        for number, sketch in zip(index.tolist(), sketches, strict=True):
            item = self.items[number]
            alone = _shapes(self.loader.collate_fn([item])[0])
            if alone != shapes and not bool(same_sketch(self._alone(item), sketch).all()):
                self._drop_sketches(number, alone, shapes)
                return

    def _drop_sketches(self, number: int, alone: Shapes, shapes: Shapes) -> None:
        """Compares no sketches from now on, as padding changes them; warns once."""
        self.sketches = None
        rank_zero_warn(
            f"Sample {number} of `{self.name}()` has tensors of {list(alone)} alone, and of {list(shapes)} in a batch. "
            "Cached logits belong to it only if teacher and students do not see the padding; if they do, give "
            f"{RECOMPUTE}."
        )

    def compare_batch(self, x: Any, y: Any, index: Index) -> None:
        """Compares some batches with the samples on which the teacher was evaluated.

        Raises:
            UserError: a row differs.
        """
        number, self._seen = self._seen, self._seen + 1
        if self.sketches is None or (number >= FIRST and number % EVERY):
            return
        differ = ~same_sketch(self.sketches.rows(index), _sketches(x, y, len(index)).cpu())
        if bool(differ.any()):
            first = int(differ.any(1).nonzero()[0])
            names = [name for name, wrong in zip(("x", "y"), differ[first].tolist(), strict=True) if wrong]
            self._refuse_row(int(index[first]), names, _shapes(x))

    def _refuse_row(self, number: int, names: Sequence[str], shapes: Shapes) -> None:
        """Raises UserError for a row of a batch that differs from its sample; warns if it is only padded."""
        assert self.sketches is not None
        stored, item = self.sketches.rows(torch.tensor([number]).numpy())[0], self.items[number]
        if not bool(same_sketch(self._alone(item), stored).all()):
            self._refuse_item(number, names)
        alone = _shapes(self.loader.collate_fn([item])[0])
        if names == ["x"] and alone != shapes:
            self._drop_sketches(number, alone, shapes)
            return
        raise UserError(
            f"The {_and(names)} of sample {number} in a batch of `{self.name}()` has changed. {ADVICE_BATCH}"
        )


def _sketches(x: Any, y: Any, count: int) -> Tensor:
    """Sketches of x and y of the rows of a batch (B, 2)."""
    first, second = row_sketches(x, count), row_sketches(y, count)
    return torch.stack((first, second.to(first.device)), 1)


def _shapes(x: Any) -> Shapes:
    return tuple(tuple(leaf.shape[1:]) for leaf in leaves(x))


def _from_json(digests: Mapping[str, Any]) -> Digests:
    return {name: None if found is None else (str(found[0]), float(found[1])) for name, found in digests.items()}


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
