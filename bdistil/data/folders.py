"""The user's own images, in one folder per class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from bdistil.data.base import PARTS, PartsModule
from bdistil.data.readers import GreyFiles, ImageFiles, encoded, image_size, normalised, pad_crop_flip, share_split
from bdistil.errors import UserError, listed
from bdistil.utils.paths import user_path

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0 … 1, as most teachers expect
GREY_MEAN, GREY_STD = 0.449, 0.226  # means over the channels

# Names of folders that hold a part of a data set, not a class.
PART_NAMES = re.compile(r"(train(ing)?|test(ing)?|val(id(ation)?)?|dev|eval)([ _-]?(set|data|images))?", re.IGNORECASE)

Files = dict[str, list[Path]]  # by class


class ImageFolder(PartsModule):
    """Images in one folder per class, in three parts, for recipes that need no Python code.

    The layout is `root/train/CLASS/*`, with `root/val` and `root/test` alike, or `root/CLASS/*`. A missing part is
    split off the training images by seed, stratified by class; every class keeps training images. Classes are numbered
    in the order of their names. Images are rotated by their EXIF orientation; 16-bit images keep their range. The
    headers of all images are read at the start; an unreadable image is named.

    Args:
        root: folder of the images.
        size: side of the images, which are scaled by their shorter side and centre-cropped; or [height, width], to
            which they are scaled. None if all images have the same size.
        channels: 3 for RGB, 1 for grey.
        validation: share of the training images for a missing validation part.
        test: share of the training images for a missing test part.
        augment: pad by an eighth, crop and flip the training images; needs `boosting.state: recompute`.
        mean: mean of the pixels in 0 … 1, per channel or one number; ImageNet's by default.
        std: standard deviation of the pixels, likewise.
        split_seed: seed of the split, independent of the seed of a run.
        options: as for `PartsModule`.

    Attributes:
        labels: names of the classes, after `setup`.

    Raises:
        UserError: a value outside of its range. In `setup`: no images, a class without images or unknown in training,
            an image that cannot be read, images of several sizes without `size`.
    """

    def __init__(
        self,
        root: str,
        *,
        size: int | list[int] | None = None,
        channels: Literal[1, 3] = 3,
        validation: float = 0.15,
        test: float = 0.15,
        augment: bool = False,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
        split_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_shares(validation, test)
        self.root, self.channels, self.augment = user_path(root, "data.root"), channels, augment
        self.shares, self.split_seed = {"val": validation, "test": test}, split_seed
        self.size = [size] if isinstance(size, int) else size
        self.mean = _per_channel(mean, MEAN if channels == 3 else [GREY_MEAN], channels)
        self.std = _per_channel(std, STD if channels == 3 else [GREY_STD], channels)
        if channels not in (1, 3) or (self.size and not (len(self.size) < 3 and min(self.size) > 0)):
            raise UserError(
                f"Expected `channels` 1 or 3 and `size` > 0, or [height, width], got {channels} and {size}."
            )
        if min(self.std) <= 0:
            raise UserError(f"Expected `std` > 0, got {self.std}.")
        # `bdistil export` writes them to its manifest.
        self.normalisation = tuple(torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        self.labels: list[str] = []

    def make_parts(self) -> dict[str, Any]:
        """Datasets of the images; only the training part is augmented."""
        found = find_parts(self.root)
        self.labels = list(found["train"])
        parts = {part: _numbered(files, self.labels, self.root / part) for part, files in found.items()}
        sides = self._sides([path for paths, _ in parts.values() for path in paths])
        parts = self._split(*parts.pop("train"), parts)
        kind = ImageFiles if self.channels == 3 else GreyFiles
        return {
            part: kind(encoded(paths), labels, self._transform(sides, augment=self.augment and part == "train"))
            for part, (paths, labels) in parts.items()
        }

    def _sides(self, paths: Sequence[Path]) -> list[int]:
        """Height and width of all x; reads the header of every image."""
        sizes: dict[tuple[int, int], Path] = {}
        for path in paths:
            sizes.setdefault(image_size(path), path)
        if self.size is None and len(sizes) > 1:
            (first, one), (second, other), *_ = sizes.items()
            raise UserError(
                f"Expected images of one size in {self.root}, got {len(sizes)} sizes, such as {first} of {one} and "
                f"{second} of {other} (height, width). Give `size` (--data.size 64) to have them scaled."
            )
        return list(self.size * 2)[:2] if self.size else list(next(iter(sizes)))

    def _transform(self, sides: list[int], *, augment: bool) -> Any:
        first: list[v2.Transform] = []
        if self.size is not None:
            first = [v2.Resize(self.size if len(self.size) == 2 else self.size[0], antialias=True)]
            first += [v2.CenterCrop(sides)] if len(self.size) == 1 else []
        return normalised([*first, *(pad_crop_flip(sides, min(sides) // 8) if augment else [])], self.mean, self.std)

    def _split(
        self, paths: list[Path], labels: Tensor, parts: Mapping[str, tuple[list[Path], Tensor]]
    ) -> dict[str, Any]:
        missing = {part: share for part, share in self.shares.items() if part not in parts}
        rows = dict(zip(("train", *missing), share_split(labels, [*missing.values()], self.split_seed), strict=True))
        split = {part: ([paths[row] for row in chosen], labels[chosen]) for part, chosen in rows.items()} | dict(parts)
        empty = [part for part in PARTS if not split[part][0]]
        if bare := [part for part in empty if part not in missing]:
            raise UserError(
                f"Expected the folders of the classes in every part, got none in {self.root / bare[0]}. Move it "
                "elsewhere to have a part of the training images split off instead."
            )
        if empty:
            raise UserError(
                f"Expected images in every part of {self.root}, got none in {', '.join(empty)}: {len(paths)} training "
                f"images in {len(self.labels)} classes are too few to split off the shares {missing}."
            )
        return {part: split[part] for part in PARTS}


def check_shares(validation: float, test: float) -> None:
    """Raises UserError unless both shares are positive and leave a fifth for training."""
    if min(validation, test) <= 0 or validation + test > 0.8:
        raise UserError(
            f"Expected `validation` and `test` to be shares > 0, together at most 0.8, got {validation} and {test}."
        )


def _per_channel(values: float | list[float] | None, default: Sequence[float], channels: int) -> list[float]:
    given = list(default) if values is None else [values] * channels if isinstance(values, float | int) else values
    if len(given) != channels:
        raise UserError(
            f"Expected `mean` and `std` to be one number, or one for each of {channels} channels, got {values}."
        )
    return given


def find_parts(root: Path) -> dict[str, Files]:
    """Image paths by part and class: of `root/train` and the parts beside it, or of `root` as `train` alone.

    Raises:
        UserError: there is no folder or no image, a class of the training part has none, or a part has another name.
    """
    if not root.is_dir():
        raise UserError(f"Expected `root` of ImageFolder to be a folder, got {str(root)!r}, which is not there.")
    divided = (root / "train").is_dir() and any(_folders(root / "train"))
    folders = {part: root / part for part in PARTS if (root / part).is_dir()} if divided else {"train": root}
    found = {part: _classes(folder) for part, folder in folders.items()}
    if not divided and found["train"] and all(PART_NAMES.fullmatch(name) for name in found["train"]):
        raise UserError(
            f"Expected one folder for each class in {root}, or the parts {', '.join(PARTS)}, got "
            f"{listed(found['train'])}, which look like parts and would be the classes. Rename them, and let each hold "
            "the folders of the classes."
        )
    beside = [folder for folder in _folders(root) if folder not in folders.values()] if divided else []
    if odd := [folder.name for folder in beside if {each.name for each in _folders(folder)} & set(found["train"])]:
        raise UserError(
            f"Expected the parts in {root} to be named {', '.join(PARTS)}, got also {listed(odd)} with folders of the "
            "same classes. Rename it, or move it elsewhere."
        )
    nested = [] if divided else [each for each in _folders(root) if PART_NAMES.fullmatch(each.name)]
    for each in nested:
        if inner := {folder.name for folder in _folders(each)} & set(found["train"]):
            raise UserError(
                f"Expected {root} to hold classes, or the parts {', '.join(PARTS)}, got {each.name} beside classes "
                f"that it has folders of ({listed(sorted(inner))}). Move the classes into {root / 'train'}."
            )
    if empty := [name for name, paths in found["train"].items() if not paths]:
        raise UserError(
            f"Expected images in every folder of {folders['train']}, got none in {listed(empty)}. Images end in "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    if len(found["train"]) < 2:
        raise UserError(
            f"Expected one folder for each of two or more classes in {folders['train']}, got "
            f"{listed(found['train']) or 'no folder'}."
        )
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(folder: Path) -> Files:
    """Images by class, at any depth, in the order of their names; hidden files are not read, others with a warning."""
    files = {each.name: sorted(_visible(each)) for each in _folders(folder)}
    if others := [path for paths in files.values() for path in paths if path.suffix.lower() not in IMG_EXTENSIONS]:
        rank_zero_warn(
            f"{len(others)} files in {folder} are left out, such as {others[0]}: images end in "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    return {name: [path for path in paths if path.suffix.lower() in IMG_EXTENSIONS] for name, paths in files.items()}


def _visible(folder: Path) -> Iterator[Path]:
    """Files at any depth, also in linked folders, that are not hidden; each folder once, as links may form circles."""
    seen: set[Path] = set()
    for inner, folders, names in os.walk(folder, followlinks=True):
        if (place := Path(inner).resolve()) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(inner, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _numbered(files: Files, classes: Sequence[str], folder: Path) -> tuple[list[Path], Tensor]:
    """Paths and class numbers (N,) of a part."""
    if unknown := sorted(set(files) - set(classes)):
        raise UserError(f"Expected classes of the training part in {folder}, got also {listed(unknown)}.")
    paths = [path for each in files.values() for path in each]
    numbers = [classes.index(name) for name, each in files.items() for _ in each]
    return paths, torch.tensor(numbers, dtype=torch.int64)
