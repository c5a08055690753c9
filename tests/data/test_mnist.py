"""MNIST from idx files, and what is refused of them."""

import gzip
import struct

import pytest
import torch
from helpers.paper_files import write_mnist

from bdistil.data.mnist import DEVIATION, MEAN, LocalMnist, Mnist, read_idx
from bdistil.errors import UserError

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mnist")
    write_mnist(root)
    return root


def opened(kind, root, **options):
    module = kind(**{"root": str(root), "partial": True, **options})
    module.setup("fit")
    return module


def test_rows_and_columns_are_the_right_way_round(root):
    images = read_idx(root / "mnist" / IMAGES, 3)
    assert (images.dtype, images.shape) == (torch.uint8, (40, 28, 28))
    assert images[3, 2, 5].item() == 8 * 2 + 5 + 3


def test_parts(root):
    module = opened(Mnist, root, validation=10)
    assert {name: len(part) for name, part in module.parts.items()} == {"train": 30, "val": 10, "test": 20}
    assert module.parts["val"].tensors[1].bincount().tolist() == [1] * 10
    x, y = next(iter(module.test_dataloader()))
    assert (x.shape, x.dtype, y.tolist()) == ((20, 1, 28, 28), torch.float32, [*range(10)] * 2)
    assert x[4, 0, 1, 2].item() == pytest.approx(((8 + 2 + 4) / 255 - MEAN) / DEVIATION, abs=1e-6)
    assert len(opened(Mnist, root / "mnist", validation=10).parts["train"]) == 30  # the folder itself as root


def test_local_images_have_no_labels(root):
    module = opened(LocalMnist, root, share=0.5, held_out=0.2)
    assert {name: len(part) for name, part in module.parts.items()} == {"train": 16, "val": 4, "test": 20}
    assert {int(y) for name in ("train", "val") for y in module.parts[name].tensors[1]} == {-1}
    assert module.parts["test"].tensors[1].max() == 9
    images = torch.cat([module.parts[name].tensors[0] for name in ("train", "val")])
    assert len(images.unique(dim=0)) == 20  # no image twice, none of both parts
    other = opened(LocalMnist, root, share=0.5, held_out=0.2, split_seed=1)
    assert not torch.equal(other.parts["val"].tensors[0], module.parts["val"].tensors[0])


HEAD = struct.pack(">iiii", 0x00000803, 40, 28, 28)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        (IMAGES, b"<html>not found</html>", "not a complete gzip file"),
        (IMAGES, gzip.compress(HEAD + bytes(40 * 784))[:-60], "not a complete gzip file"),
        (IMAGES, gzip.compress(HEAD + bytes(40 * 784 - 1)), r"31,359 values, expected \[40, 28, 28\]"),
        (IMAGES, gzip.compress(HEAD[:9]), "no idx file of bytes with 3"),
        (IMAGES, gzip.compress(struct.pack(">ii", 0x00000801, 40) + bytes(40)), "no idx file of bytes with 3"),
        (IMAGES, gzip.compress(HEAD[:8] + struct.pack(">ii", 27, 28) + bytes(40 * 756)), r"images are \(27, 28\)"),
        (LABELS, gzip.compress(struct.pack(">ii", 0x00000801, 39) + bytes(39)), "expected 40 labels in 0 … 9"),
        (LABELS, gzip.compress(struct.pack(">ii", 0x00000801, 40) + bytes([10] * 40)), "expected 40 labels in 0 … 9"),
    ],
    ids=["page", "cut", "short", "header", "labels", "rows", "fewer", "ten"],
)
def test_a_damaged_file_is_named(tmp_path, file, content, why):
    (write_mnist(tmp_path) / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} of MNIST cannot be used: .*({why}).*Get it again from http"):
        opened(Mnist, tmp_path, validation=10)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"MNIST was not found in .*/mnist and .*\n  mkdir -p .*/mnist && .* curl -O"):
        opened(Mnist, tmp_path)
    folder = write_mnist(tmp_path)
    with pytest.raises(UserError, match=r"60,000 images in train, but 40 are in .* partial=true"):
        opened(Mnist, tmp_path, partial=False)
    (folder / LABELS).unlink()
    with pytest.raises(UserError, match=rf"not complete: .*mnist lacks {LABELS}\. "):
        opened(Mnist, tmp_path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Mnist, {"validation": 9}),
        (Mnist, {"batch_size": 0}),
        (LocalMnist, {"share": 0.0}),
        (LocalMnist, {"held_out": 1.0}),
        (LocalMnist, {"share": 0.05}),
    ],
)
def test_values_that_cannot_be(root, kind, values):
    with pytest.raises(UserError, match=rf"`{next(iter(values))}`"):
        opened(kind, root, **values)
