"""Arrays of one's own in a .npz file."""

import numpy as np
import pytest
import torch

from bdistil.data import Arrays
from bdistil.errors import UserError

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (60, 4))
Y = RANDOM.integers(0, 3, 60)


def opened(path, *, arrays=None, **options):
    np.savez(path, **(arrays or {"x": X, "y": Y}))
    module = Arrays(str(path), **options)
    module.setup("fit")
    return module


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.npz"


def sizes(module):
    return {part: len(data) for part, data in module.parts.items()}


def test_x_and_y_are_split_by_seed_with_the_same_share_of_every_class(path):
    y = np.array([0] * 40 + [1] * 18 + [2, 2])
    module = opened(path, arrays={"x": X, "y": y})
    assert sizes(module) == {"train": 42, "val": 9, "test": 9}
    every = torch.cat([data.tensors[0] for data in module.parts.values()])
    assert sorted(every[:, 0].tolist()) == sorted(X[:, 0].astype("f4").tolist())
    assert module.parts["train"].tensors[1].unique().tolist() == [0, 1, 2]
    assert module.parts["val"].tensors[1].bincount().tolist() == [6, 3]
    assert [data.tensors[0].dtype for data in module.parts.values()] == [torch.float32] * 3
    again, other = opened(path, arrays={"x": X, "y": y}), opened(path, arrays={"x": X, "y": y}, split_seed=1)
    assert torch.equal(again.parts["val"].tensors[0], module.parts["val"].tensors[0])
    assert not torch.equal(other.parts["val"].tensors[0], module.parts["val"].tensors[0])


def test_whole_numbers_of_a_regression_are_split_at_random(path):
    """Split by their value, all rare ones, the largest among them, would be training samples."""
    y = np.random.default_rng(0).gamma(2, 30, 1000).astype(int)
    variances = []
    for seed in range(30):
        module = opened(path, arrays={"x": np.zeros((1000, 2)), "y": y}, split_seed=seed)
        variances.append([float(data.tensors[1].double().var()) for data in module.parts.values()])
    np.testing.assert_allclose(np.mean(variances, 0), y.var(), rtol=0.1)
    assert sizes(module) == {"train": 700, "val": 150, "test": 150}
    assert module.parts["train"].tensors[1].dtype is torch.int64


def test_parts_that_are_there_are_taken_and_the_others_split_off(path):
    """As of keras: `x_train`, `y_train`, `x_test`, `y_test`."""
    arrays = {"x_train": X[:40], "y_train": Y[:40], "x_test": X[40:], "y_test": Y[40:]}
    module = opened(path, arrays=arrays, validation=0.25)
    assert sizes(module) == {"train": 31, "val": 9, "test": 20}
    np.testing.assert_allclose(module.parts["test"].tensors[0], X[40:].astype("f4"))
    np.testing.assert_array_equal(module.parts["test"].tensors[1], Y[40:])
    whole = opened(path, arrays={**arrays, "X_val": X[:7], "Y_val": Y[:7]})
    assert sizes(whole) == {"train": 40, "val": 7, "test": 20}


@pytest.mark.parametrize(
    ("shape", "axis"), [((60, 4), 1), ((60, 4, 5), 1), ((60, 5, 4), -1), ((60, 4, 3, 3), 1)], ids=str
)
def test_each_channel_is_standardised_by_the_training_part(path, shape, axis):
    x = RANDOM.normal(size=shape)
    x = x * np.arange(1, 5).reshape([4 if size == 4 else 1 for size in shape]) + 7
    module = opened(path, arrays={"x": x, "y": Y}, standardise=True, axis=axis)
    train = module.parts["train"].tensors[0].double().numpy()
    others = tuple(a for a in range(train.ndim) if a != axis % train.ndim)
    np.testing.assert_allclose(train.mean(others), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(others), 1, atol=1e-5)
    mean, spread = module.normalisation
    raw = torch.cat([data.tensors[0] for data in module.parts.values()]) * spread + mean
    np.testing.assert_allclose(sorted(raw.flatten().tolist()), np.sort(x.flatten()), rtol=1e-4, atol=1e-4)


def test_pixels_are_reshaped_and_standardised(path):
    images = RANDOM.integers(0, 256, (60, 6, 5)).astype(np.uint8)
    with pytest.raises(UserError, match=r"x of train in .* to be real numbers, got uint8 of shape \(60, 1, 6, 5\)"):
        opened(path, arrays={"x": images, "y": Y}, shape=[1, 6, 5])
    module = opened(path, arrays={"x": images, "y": Y}, shape=[1, 6, 5], standardise=True)
    assert module.parts["train"].tensors[0].shape[1:] == (1, 6, 5)
    assert module.normalisation[0].item() == pytest.approx(images.mean(), abs=3)
    colour = np.repeat(images[..., None], 3, -1)
    module = opened(path, arrays={"x": colour, "y": Y}, channels_last=True, standardise=True)
    assert module.parts["train"].tensors[0].shape[1:] == (3, 6, 5)


def test_tokens_stay_integers(path):
    tokens = RANDOM.integers(0, 65000, (60, 9)).astype(np.uint16)
    module = opened(path, arrays={"x": tokens, "y": Y})
    assert module.parts["train"].tensors[0].dtype is torch.int64
    assert int(module.parts["train"].tensors[0].max()) <= tokens.max()


LABELS = {
    "uint8": (Y.astype(np.uint8), torch.int64, ()), "a column": (Y[:, None], torch.int64, ()),
    "bool": (Y > 1, torch.int64, ()), "float64": (X[:, 0], torch.float32, ()),
    "several": (X[:, :2], torch.float32, (2,)), "one-hot": (np.eye(3, dtype=int)[Y], torch.float32, (3,)),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_kind(path, name):
    y, kind, shape = LABELS[name]
    labels = opened(path, arrays={"x": X, "y": y}).parts["train"].tensors[1]
    assert (labels.dtype, labels.shape[1:]) == (kind, shape)


@pytest.mark.parametrize("kind", [str, bytes])
def test_names_of_classes_are_numbered_by_their_order(path, kind):
    names = np.array(["dog", "ant", "çat"])
    given = names if kind is str else np.char.encode(names, "utf-8")
    module = opened(path, arrays={"x": X, "y": given[Y]})
    assert module.labels == ["ant", "dog", "çat"]
    x, y = (torch.cat(tensors) for tensors in zip(*(data.tensors for data in module.parts.values()), strict=True))
    by_row = dict(zip(X[:, 0].astype("f4").tolist(), names[Y], strict=True))
    assert all(by_row[a] == module.labels[b] for a, b in zip(x[:, 0].tolist(), y.tolist(), strict=True))
    with pytest.raises(UserError, match="Expected classes of the training part as y of test, got also 'dog'"):
        opened(path, arrays={"x_train": X, "y_train": names[1 + Y % 2], "x_test": X, "y_test": names[Y]})


NAN = np.where(np.arange(240).reshape(60, 4) == 22, np.nan, X)
MISTAKES = {
    "NaN": ({"x": NAN, "y": Y}, {}, r"x of train in .*mine\.npz without NaN or infinity, got some in sample 5"),
    "lengths": (
        {"x": X, "y": Y[:50]},
        {},
        r"N samples x \(N, \.\.\.\) and y of train in .*, got \(60, 4\) and \(50,\)",
    ),
    "missing": ({"data": X, "y": Y}, {}, r"x and y, or x_train.*got \['data', 'y'\]"),
    "objects": ({"x": X, "y": np.array([None] * 60)}, {}, r"got y of Python objects.*Save y\.astype\(str\) for names"),
    "complex": ({"x": X * 1j, "y": Y}, {}, r"to be numbers, got complex128"),
    "shape": ({"x": X, "y": Y}, {"shape": [3]}, r"samples of `shape` \[3\], got \(4,\)"),
    "axis": ({"x": X, "y": Y}, {"axis": 0, "standardise": True}, r"`axis` to be one .*after the first of x \(\d+, 4\)"),
    "few": ({"x": X[:3], "y": Y[:3]}, {}, r"got none in val: 3 training samples"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(path, name):
    arrays, options, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        opened(path, arrays=arrays, **options)


def test_what_is_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"`file` of Arrays to be a \.npz file, got '.*none\.npz', which is not there"):
        Arrays(str(tmp_path / "none.npz")).setup()
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "text.npz").write_text("no")
    for name in ("x.npy", "text.npz"):
        with pytest.raises(UserError, match=r"a \.npz file of arrays of numbers, got"):
            Arrays(str(tmp_path / name)).setup()


@pytest.mark.parametrize(
    "names", [("x", "y", "x_test", "y_test"), ("x_train", "y_train", "x_valid", "y_valid")], ids=str
)
def test_a_part_of_another_name_is_refused(path, names):
    """Otherwise its figures would be those of samples split off the training part."""
    arrays = dict(zip(names, (X[:40], Y[:40], X[40:], Y[40:]), strict=True))
    with pytest.raises(UserError, match=rf"named x_train, x_val and x_test.* got also {names[2]} beside {names[0]}, "):
        opened(path, arrays=arrays)
    others = {"y_names": np.array(["a", "b", "c"]), "ids": np.array([None])}  # no parts
    opened(path, arrays={"x": X, "y": Y, **others})


def test_features_of_any_unit_are_standardised(path):
    """Lengths of a tenth of a micrometre in metres, times of one hour in seconds since 1970, and a constant."""
    x = np.stack([1e-7 * X[:, 0], 1.7e9 + np.linspace(0, 3600, 60), np.full(60, 0.1)], 1)
    train = opened(path, arrays={"x": x, "y": Y}, standardise=True).parts["train"].tensors[0]
    assert train.dtype is torch.float32
    np.testing.assert_allclose(train.std(0, correction=0), [1, 1, 0], atol=1e-5)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    assert [len(column.unique()) for column in train.unbind(1)] == [len(train), len(train), 1]


def test_workers_read_if_they_are_asked_for(path):
    module = opened(path, num_workers=1)
    assert [loader.num_workers for loader in (module.train_dataloader(), module.val_dataloader())] == [1, 1]


def test_names_that_differ_in_case_alone_are_refused(path):
    with pytest.raises(UserError, match=r"arrays of different names in .*, got x, X\. Rename one"):
        opened(path, arrays={"x": X, "y": Y, "X": X + 100})
