"""Smartwatch recordings: their file, what is refused, and their splits."""

import hashlib

import pytest
import torch

from bdistil.data import watch as watch_module
from bdistil.data.readers import moments
from bdistil.data.watch import Watch, read_watch, split_in_time
from bdistil.errors import UserError


@pytest.fixture(scope="module")
def watch():
    pytest.importorskip("seglearn", reason="the recordings are a file of the package seglearn")
    return read_watch()


@pytest.fixture
def read_once(watch, monkeypatch):
    monkeypatch.setattr(watch_module, "read_watch", lambda: watch)


def test_the_recordings(watch):
    series, labels, subjects = watch
    assert labels.bincount().tolist() == [20] * 7
    assert subjects.bincount().tolist() == [0] + [14] * 10
    assert (min(map(len, series)), max(map(len, series)), sum(map(len, series))) == (947, 2618, 244_102)
    assert all(x.isfinite().all() for x in series)


def test_windows_of_the_recordings(watch, read_once):
    module = Watch()
    module.setup()
    series = [x[::2] for x in watch[0]]
    mean, spread = moments(split_in_time(series, (0.55, 0.15, 0.3))["train"])
    torch.testing.assert_close(module.parts["train"].tensors[0][0] * spread + mean, series[0][:50])
    torch.testing.assert_close(module.normalisation, (mean, spread))
    sizes = {name: tuple(part.tensors[0].shape) for name, part in module.parts.items()}
    assert sizes == {"train": (2481, 50, 6), "val": (523, 50, 6), "test": (1255, 50, 6)}
    assert module.parts["test"].tensors[1].bincount().tolist() == [130, 209, 213, 195, 197, 152, 159]


def steps_of(part):
    """The bytes of every step of every window."""
    return {step.tobytes() for step in part.tensors[0].numpy().reshape(-1, 6)}


@pytest.mark.parametrize("options", [{}, {"train_hop": 0.5, "seconds": 1.5}, {"split": "subject"}], ids=str)
def test_no_two_parts_share_a_step(read_once, options):
    module = Watch(**options)
    module.setup()
    train, val, test = (steps_of(module.parts[name]) for name in ("train", "val", "test"))
    # A wrist at rest repeats itself to the last digit now and then, in any split: hence the few.
    assert max(len(train & val), len(train & test), len(val & test)) < 20
    assert min(map(len, (train, val, test))) > 10_000


def test_training_comes_before_validation_before_test():
    series = [torch.arange(100.0)[:, None], torch.arange(57.0)[:, None]]
    pieces = split_in_time(series, (0.55, 0.15, 0.3))
    assert [len(pieces[name][0]) for name in ("train", "val", "test")] == [55, 15, 30]
    for number, one in enumerate(series):
        assert torch.equal(torch.cat([pieces[name][number] for name in ("train", "val", "test")]), one)


def test_each_subject_is_in_one_part(watch, read_once):
    module = Watch(split="subject", validation_subjects=(2,), test_subjects=(10, 1))
    module.setup()
    series, labels, subjects = watch
    expected = torch.zeros(7, dtype=torch.int64)
    for x, y, subject in zip(series, labels, subjects, strict=True):
        expected[y] += len(range(0, len(x[::2]) - 50 + 1, 25)) if int(subject) in (1, 10) else 0
    assert module.parts["test"].tensors[1].bincount().tolist() == expected.tolist()
    assert module.subjects["train"] == {3, 4, 5, 6, 7, 8, 9}


def test_more_training_windows_leave_the_other_parts_alone(read_once):
    plain, dense = Watch(), Watch(train_hop=0.5)
    for module in (plain, dense):
        module.setup()
    assert len(dense.parts["train"]) > 2 * len(plain.parts["train"])
    assert torch.equal(plain.parts["test"].tensors[0], dense.parts["test"].tensors[0])


def test_a_file_of_another_version_is_refused(watch, monkeypatch):
    monkeypatch.setattr(watch_module, "SHA256", hashlib.sha256(b"").hexdigest())
    with pytest.raises(UserError, match=r"watch_dataset\.npy is not the file that this recipe was made for"):
        Watch().setup("fit")


def test_loaders(read_once):
    module = Watch(batch_size=16)
    module.setup("fit")
    x, y = next(iter(module.train_dataloader()))
    assert (x.dtype, y.dtype, len(x), len(y)) == (torch.float32, torch.int64, 16, 16)
    assert len(module.val_dataloader().dataset) == len(module.parts["val"])
    assert len(module.test_dataloader().dataset) == len(module.parts["test"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(batch_size=0), r"`batch_size` >= 1"),
        (dict(stride=0), r"`stride` >= 1"),
        (dict(seconds=0.01), r"one step or more \(0\.04 s\), got 2, 0\.01, 1 and 1"),
        (dict(train_hop=0.0), r"got 2, 2, 1 and 0"),
        (dict(split="random"), r"`split` to be 'time' or 'subject', got 'random'"),
        (dict(validation=0), r"at most 0\.9 of a recording, got 0, 0\.3"),
        (dict(validation=0.5, test=0.5), r"got 0\.5, 0\.5"),
        (dict(split="subject", test_subjects=(11,)), r"different subjects of 1, 2, .*, 10, one"),
        (dict(split="subject", test_subjects=(6,)), r"got `validation_subjects`: \[6, 7\], `test_subjects`: \[6\]"),
        (dict(split="subject", validation_subjects=()), r"`validation_subjects`: \[\]"),
    ],
)
def test_values_that_are_not_allowed(values, message):
    with pytest.raises(UserError, match=message):
        Watch(**values)
