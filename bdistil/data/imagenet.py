"""ImageNet-1k and Tiny-ImageNet-200 from the folders of their archives."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms import v2

from bdistil.data.base import ImageModule, Images
from bdistil.data.readers import ImageFiles, Source, encoded, pad_crop_flip
from bdistil.errors import UserError, listed


def read_folders(folder: Path, source: Source) -> tuple[Images, list[str]]:
    """Paths and labels of images in one folder for each class, at any depth, and the classes.

    Classes are numbered in the order of their names. Files without an image extension are ignored.

    Raises:
        UserError: there is no folder, or a class has no image.
    """
    try:
        classes, numbers = find_classes(str(folder))
        samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise UserError(f"{source.name} is not complete: {error} {source.cure(folder.parent.parent)}") from error
    paths, labels = zip(*samples, strict=True)
    return _files(paths, labels), classes


def _files(paths: Iterable[str], labels: Iterable[int]) -> Images:
    return encoded(paths), torch.tensor([*labels])


class ImageFolders(ImageModule):
    """Base class of ImageNet and Tiny-ImageNet.

    The official validation part, whose labels are public, is the test part here and read once, at the end of a run.

    Args:
        root: folder of the archive, or its parent.
        validation: number of validation images, stratified by class.
        size: side of the images after scaling.
        num_workers: processes that read, decode and augment.
        options: as for `ImageModule`.

    Raises:
        UserError: a value outside of its range.
    """

    IMAGES: ClassVar[tuple[int, int]]  # numbers in the training part and in the test part
    NEEDED: ClassVar[list[str]] = ["train", "val"]
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    DATASET = ImageFiles

    def __init__(
        self, root: str = "data", *, validation: int = 10_000, size: int = 64, num_workers: int = 4, **options: Any
    ) -> None:
        super().__init__(root, validation=validation, num_workers=num_workers, **options)
        if size < 1:
            raise UserError(f"Expected `size` >= 1, got {size}.")
        self.size = size

    def read_test(self, folder: Path, classes: list[str]) -> Images:
        """Paths and labels of the official validation part."""
        raise NotImplementedError

    def read(self) -> tuple[Images, Images]:
        """Encoded paths (N,) and labels (N,) of the two official parts."""
        folder = self.SOURCE.locate(self.root, self.NEEDED)
        trained, classes = read_folders(folder / "train", self.SOURCE)
        tested = self.read_test(folder, classes)
        counts = (("classes", len(classes), self.CLASSES), ("images in train", len(trained[1]), self.IMAGES[0]),
                  ("images in val", len(tested[1]), self.IMAGES[1]))  # fmt: skip
        for what, found, published in counts:
            self.SOURCE.check_count(what, found, published, folder, self.partial)
        return trained, tested


class ImageNet(ImageFolders):
    """ImageNet-1k: `train/n01440764/*.JPEG` and `val/n01440764/*.JPEG`, 1,000 folders each.

    Images are scaled to a shorter side of 256 / 224 times `size` and centre-cropped; with `augment` a random crop
    of random shape is scaled to `size`, and half of the images are mirrored. Arguments as for `ImageFolders`.
    """

    SOURCE = Source(
        "ImageNet-1k",
        "https://image-net.org/download-images.php (after registration)",
        "unpack ILSVRC2012_img_train.tar and the archive of each class in it to {root}/imagenet/train/CLASS, and the "
        "images of ILSVRC2012_img_val.tar to {root}/imagenet/val/CLASS, as ILSVRC2012_devkit_t12 says which is which",
        "imagenet",
    )
    CLASSES = 1000
    IMAGES = (1_281_167, 50_000)

    def __init__(
        self, root: str = "data", *, batch_size: int = 256, size: int = 224, num_workers: int = 8, **options: Any
    ) -> None:
        super().__init__(root, batch_size=batch_size, size=size, num_workers=num_workers, **options)

    def transforms(self, augment: bool) -> list[v2.Transform]:
        """A random or centre crop, scaled."""
        if augment:
            return [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        return [v2.Resize(round(self.size * 256 / 224), antialias=True), v2.CenterCrop(self.size)]

    def read_test(self, folder: Path, classes: list[str]) -> Images:
        """Images in one folder for each class of the training part.

        Raises:
            UserError: the classes differ.
        """
        files, found = read_folders(folder / "val", self.SOURCE)
        if found != classes:
            odd = sorted(set(classes) ^ set(found))
            raise UserError(
                f"Expected the same classes in {folder / 'train'} and {folder / 'val'}, but only one of them has "
                f"{listed(odd)}. The images of val have to be sorted into one folder for each class."
            )
        return files


class TinyImageNet(ImageFolders):
    """Tiny-ImageNet-200, 64x64: `train/n01443537/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt`.

    Images are scaled to `size` if it is not 64; with `augment` they are padded by an eighth, cropped and flipped.
    Arguments as for `ImageFolders`.
    """

    SOURCE = Source(
        "Tiny-ImageNet-200",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "mkdir -p {root} && cd {root} && curl -LO http://cs231n.stanford.edu/tiny-imagenet-200.zip && "
        "unzip -q tiny-imagenet-200.zip",
        "tiny-imagenet-200",
    )
    CLASSES = 200
    IMAGES = (100_000, 10_000)
    NEEDED: ClassVar[list[str]] = ["train", "val/images", "val/val_annotations.txt"]

    def transforms(self, augment: bool) -> list[v2.Transform]:
        """Scaling; with `augment` padding by an eighth, crop, flip."""
        resize = v2.Resize((self.size, self.size), antialias=True)
        return [resize, *pad_crop_flip(self.size, self.size // 8)] if augment else [resize]

    def read_test(self, folder: Path, classes: list[str]) -> Images:
        """Images in one folder, with a table of their classes.

        Raises:
            UserError: the table is damaged, or names missing images or classes.
        """
        table = folder / "val" / "val_annotations.txt"
        numbers = {name: number for number, name in enumerate(classes)}
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        if wrong := [row for row in rows if len(row) < 2 or row[1] not in numbers]:
            raise self.SOURCE.damaged(table, f"{wrong[0]} is not an image and a class of train")
        there = {path.name for path in (folder / "val" / "images").iterdir()}
        if lacking := [row[0] for row in rows if row[0] not in there]:
            raise self.SOURCE.incomplete(folder / "val" / "images", lacking, folder.parent)
        paths = (str(folder / "val" / "images" / row[0]) for row in rows)
        return _files(paths, (numbers[row[1]] for row in rows))
