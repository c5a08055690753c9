"""ImageNet and Tiny-ImageNet from small folders in their own layouts."""

import shutil

import numpy as np
import pytest
import torch
from helpers.paper_files import png, write_imagenet, write_tiny_imagenet

from bdistil.data.imagenet import ImageNet, TinyImageNet
from bdistil.data.loaders import is_random
from bdistil.errors import RunError, UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_imagenet(root)
    write_tiny_imagenet(root)
    return root


def opened(kind, root, **options):
    module = kind(**{"root": str(root), "partial": True, "validation": 2, "num_workers": 0, "size": 16, **options})
    module.setup("fit")
    return module


@pytest.mark.parametrize("kind", [ImageNet, TinyImageNet])
def test_parts_and_labels(root, kind):
    """Red of the fixture's images is 100 times the label and blue is 200, but for one that is grey."""
    module = opened(kind, root)
    assert [len(module.parts[part]) for part in ("train", "val", "test")] == [8, 2, 4]
    for part in ("train", "val", "test"):
        for x, y in module.parts[part]:
            assert (x.shape, x.dtype, type(x)) == ((3, 16, 16), torch.float32, torch.Tensor)
            red, blue = (float(x[c].mean() * kind.STD[c] + kind.MEAN[c]) * 255 for c in (0, 2))
            assert (round(red), round(blue)) in ((100 * y, 200), (77, 77))
    x, y = next(iter(module.train_dataloader()))
    assert (x.shape, y.dtype) == ((8, 3, 16, 16), torch.int64)


@pytest.mark.parametrize("kind", [ImageNet, TinyImageNet])
def test_only_the_training_part_is_augmented(tmp_path, kind):
    (write_imagenet if kind is ImageNet else write_tiny_imagenet)(tmp_path, noise=True)
    module = opened(kind, tmp_path, augment=True)
    assert is_random(module.parts["train"])
    assert not is_random(module.parts["val"])
    assert not is_random(module.parts["test"])
    assert not is_random(opened(kind, tmp_path).parts["train"])


def test_imagenet_crops_the_middle(root, tmp_path):
    """An image of 8 x 6 with a white cross in its middle: the shorter side becomes 18, of which 16 remain."""
    folder = write_imagenet(tmp_path)
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 38:42] = 255
    (folder / "val" / "n01440764" / "0.png").write_bytes(png(image))
    x = opened(ImageNet, tmp_path).parts["test"][0][0][0]
    columns = x.mean(0)
    assert columns.argmax() in (7, 8)
    assert torch.allclose(columns, columns.flip(0), atol=0.05)


def test_missing_folders(root, tmp_path):
    with pytest.raises(
        UserError, match=r"ImageNet-1k was not found in .*/imagenet and .*: expected train, val.*image-net"
    ):
        opened(ImageNet, tmp_path)
    with pytest.raises(UserError, match=r"(?s)Tiny-ImageNet-200 was not found.*curl -LO .*unzip"):
        opened(TinyImageNet, tmp_path)
    with pytest.raises(UserError, match=r"1,000 classes, but 2 are in"):
        opened(ImageNet, root, partial=False)
    with pytest.raises(UserError, match=r"200 classes, but 2 are in"):
        opened(TinyImageNet, root, partial=False)


def test_incomplete_imagenet(tmp_path):
    folder = write_imagenet(tmp_path)
    shutil.rmtree(folder / "train" / "n01443537")
    (folder / "train" / "n01443537").mkdir()
    with pytest.raises(UserError, match=r"ImageNet-1k is not complete: .*no valid file for the classes n01443537"):
        opened(ImageNet, tmp_path)
    folder = write_imagenet(tmp_path)
    (folder / "val" / "n01443537").rename(folder / "val" / "n99999999")
    with pytest.raises(
        UserError, match=r"same classes in .* n01443537, n99999999.* sorted into one folder for each class"
    ):
        opened(ImageNet, tmp_path)


def test_incomplete_tiny_imagenet(tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"(?s)not complete: .*val/images lacks val_1\.JPEG\. .*unzip"):
        opened(TinyImageNet, tmp_path)
    table = folder / "val" / "val_annotations.txt"
    table.write_text(table.read_text().replace("n01440764", "n0144"))
    with pytest.raises(UserError, match=r"val_annotations\.txt of Tiny-ImageNet-200 cannot be used: .*n0144"):
        opened(TinyImageNet, tmp_path)
    table.unlink()
    with pytest.raises(UserError, match=r"not complete: .* lacks val/val_annotations\.txt"):
        opened(TinyImageNet, tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    folder = write_imagenet(tmp_path)
    file = folder / "val" / "n01440764" / "0.png"
    for content in (b"not an image", file.read_bytes()[:-30]):
        file.write_bytes(content)
        with pytest.raises(RunError, match=r"n01440764/0\.png is not a complete image"):
            opened(ImageNet, tmp_path).parts["test"][0]


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"validation": 1}, {"num_workers": -1}, {"validation": 6}])
def test_values_that_cannot_be(root, values):
    with pytest.raises(UserError, match=rf"`{next(iter(values))}`"):
        opened(ImageNet, root, **values)
