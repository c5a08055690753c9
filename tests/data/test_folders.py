"""Images of one's own in one folder for each class."""

import numpy as np
import pytest
import torch
from PIL import Image

from bdistil.data import ImageFolder
from bdistil.data.loaders import is_random
from bdistil.errors import UserError

CLASSES = ("ant", "bee", "cat")


def write(folder, counts, size=(8, 10), suffix="png"):
    """Images (H, W) whose red is 60 times the class, of classes by name; blue differs from image to image."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            number += 1
            image = np.zeros((*size, 3), np.uint8)
            image[..., 0], image[..., 2] = 60 * (1 + CLASSES.index(name) if name in CLASSES else 0), number
            Image.fromarray(image).save(folder / name / f"{number:03d}.{suffix}")
    return folder


def opened(root, **options):
    module = ImageFolder(str(root), mean=0.0, std=1.0, **options)
    module.setup("fit")
    return module


def reds(part):
    return [(round(float(x[0].mean()) * 255 / 60) - 1, y) for x, y in part]


def blues(module):
    return {part: {round(float(x[2].mean()) * 255) for x, _ in data} for part, data in module.parts.items()}


def test_a_folder_for_each_class_is_split_by_seed(tmp_path):
    write(tmp_path, {"bee": 20, "ant": 10, "cat": 2})
    module = opened(tmp_path)
    assert module.labels == list(CLASSES)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 22, "val": 5, "test": 5}
    for data in module.parts.values():
        assert all(label == y for label, y in reds(data))
    assert {y for _, y in module.parts["train"]} == {0, 1, 2}  # the rare class is trained on
    found = blues(module)
    assert set.union(*found.values()) == set(range(1, 33))
    assert sum(map(len, found.values())) == 32
    assert blues(opened(tmp_path)) == found != blues(opened(tmp_path, split_seed=1))
    x, y = next(iter(module.train_dataloader()))
    assert (x.shape, x.dtype, y.dtype) == ((22, 3, 8, 10), torch.float32, torch.int64)


def test_parts_that_are_there_are_taken_and_the_others_split_off(tmp_path):
    write(tmp_path / "train", {"ant": 20, "bee": 20})
    (tmp_path / "notes" / "old").mkdir(parents=True)  # no part
    write(tmp_path / "test", {"bee": 3})  # one class alone: its number is that of the training part
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "ant" / ".notes.txt").write_text("no image")
    module = opened(tmp_path, validation=0.1)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 36, "val": 4, "test": 3}
    assert [y for _, y in module.parts["test"]] == [1, 1, 1]
    write(tmp_path / "val", {"ant": 5})
    module = opened(tmp_path)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 40, "val": 5, "test": 3}


@pytest.mark.parametrize(
    ("size", "shape", "columns"), [(4, (4, 4), (3, 17)), ([4, 10], (4, 10), (0, 20)), (None, (8, 20), (0, 20))]
)
def test_images_are_scaled_and_cropped_in_the_middle(tmp_path, size, shape, columns):
    write(tmp_path, {"ant": 6, "bee": 6}, size=(8, 20))
    ramp = np.tile(np.arange(20, dtype=np.uint8) * 10, (8, 1))
    for path in (tmp_path / "ant").iterdir():
        Image.fromarray(ramp).save(path)
    module = opened(tmp_path, size=size, channels=1)
    x = next(x for x, y in module.parts["train"] if y == 0)
    assert x.shape == (1, *shape)
    edges = [float(x[0, 1, column]) * 25.5 for column in (0, -1)]
    assert edges[0] == pytest.approx(columns[0] + 3, abs=3.5)
    assert edges[1] == pytest.approx(columns[1] - 3, abs=3.5)


def test_values_are_normalised_as_declared(tmp_path):
    write(tmp_path, {"ant": 9, "bee": 9})
    module = ImageFolder(str(tmp_path))
    module.setup()
    mean, std = module.normalisation
    raw = opened(tmp_path).parts["train"][3][0]
    torch.testing.assert_close(module.parts["train"][3][0], (raw - mean) / std)
    assert [round(v, 3) for v in mean.flatten().tolist()] == [0.485, 0.456, 0.406]
    assert ImageFolder(str(tmp_path), channels=1).mean == [0.449]


def test_only_the_training_part_is_augmented(tmp_path):
    write(tmp_path, {"ant": 9, "bee": 9})
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    module = opened(tmp_path, augment=True)
    assert [is_random(module.parts[part]) for part in ("train", "val", "test")] == [True, False, False]
    assert module.parts["train"][0][0].shape == (3, 16, 16)


def sizes(root):
    write(root, {"ant": 5, "bee": 5})
    write(root, {"cat": 5}, size=(6, 6))


def unknown(root):
    write(root / "train", {"ant": 5, "bee": 5})
    write(root / "val", {"wasp": 5})


def empty(root):
    write(root, {"ant": 5, "bee": 5})
    (root / "cat").mkdir()


def other_names(root):
    for part in ("train", "valid"):
        write(root / part, {"ant": 5, "bee": 5})


def beside(root):
    write(root, {"ant": 5, "bee": 5})
    write(root / "test", {"ant": 2})


def bare(root):
    write(root / "train", {"ant": 9, "bee": 9})
    (root / "test").mkdir()
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(root / "test" / "1.png")


def torn(root):
    write(root, {"ant": 5, "bee": 5})
    (root / "bee" / "x.JPG").write_bytes(b"\xff\xd8\xff")


def real(root):
    write(root, {"ant": 5, "bee": 5})
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "bee" / "x.tiff")


MISTAKES = {
    "several sizes": (sizes, {}, r"images of one size in .*got 2 sizes, such as \(8, 10\) of .* and \(6, 6\) of"),
    "unknown class": (unknown, {}, r"classes of the training part in .*val, got also wasp"),
    "other names": (other_names, {}, r"to be named train, val, test, got also valid with folders of the same classes"),
    "part beside classes": (beside, {}, r"got test beside classes that it has folders of \(ant\)\. Move"),
    "part without classes": (bare, {}, r"folders of the classes in every part, got none in .*test\. Move it elsewhere"),
    "empty class": (empty, {}, r"images in every folder of .*, got none in cat\. Images end in \.jpg"),
    "torn image": (torn, {}, r"x\.JPG is no image that can be read"),
    "real numbers": (real, {}, r"x\.tiff has pixels that are real numbers"),
    "one class": (lambda root: write(root, {"ant": 5}), {}, r"two or more classes in .*, got ant"),
    "no folder": (lambda root: None, {}, r"two or more classes in .*, got no folder"),
    "too few": (lambda root: write(root, {"ant": 2, "bee": 2}), {}, r"got none in val: 4 training images in 2"),
    "shares": (lambda root: None, {"validation": 0.5, "test": 0.4}, r"together at most 0\.8, got 0\.5 and 0\.4"),
    "size": (lambda root: None, {"size": 0}, r"`size` > 0, or \[height, width\], got 3 and 0"),
    "mean": (lambda root: None, {"mean": [0.5, 0.5]}, r"one for each of 3 channels, got \[0\.5, 0\.5\]"),
    "std": (lambda root: None, {"std": 0.0}, r"`std` > 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_before_training(tmp_path, name):
    prepare, options, message = MISTAKES[name]
    prepare(tmp_path)
    with pytest.raises(UserError, match=message):
        ImageFolder(str(tmp_path), **options).setup()


def test_files_that_are_left_out_are_counted(tmp_path):
    write(tmp_path, {"ant": 9, "bee": 9})
    write(tmp_path, {"bee": 2}, suffix="gif")
    with pytest.warns(UserWarning, match=r"2 files in .* are left out, such as .*001\.gif: images end in \.jpg"):
        module = opened(tmp_path)
    assert sum(map(len, module.parts.values())) == 18


def test_linked_folders_are_read(tmp_path):
    write(tmp_path / "photos", {"ant": 9, "bee": 9})
    write(tmp_path / "elsewhere", {"bee": 4})
    (tmp_path / "photos" / "bee" / "more").symlink_to(tmp_path / "elsewhere" / "bee")
    (tmp_path / "photos" / "ant" / "loop").symlink_to(tmp_path / "photos" / "ant")
    (tmp_path / "photos" / "ant" / "gone.png").symlink_to(tmp_path / "none.png")
    write(tmp_path / "photos", {"ant/.checkpoints": 3})
    assert sum(map(len, opened(tmp_path / "photos").parts.values())) == 22


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"`root` of ImageFolder to be a folder, got '.*none', which is not there"):
        ImageFolder(str(tmp_path / "none")).setup()
    with pytest.raises(UserError, match=r"`data\.root` to be a path, got an empty one"):
        ImageFolder("")


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("Train", "Test", "Valid")], ids=str)
def test_folders_named_as_parts_are_no_classes(tmp_path, names):
    for name in names:
        write(tmp_path / name, {"ant": 4, "bee": 4})
    with pytest.raises(UserError, match=rf"got {', '.join(sorted(names))}, which look like parts"):
        opened(tmp_path)
    write(tmp_path, {"cat": 4})  # a class beside them
    assert len(opened(tmp_path).labels) == len(names) + 1
