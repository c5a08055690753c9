"""Utterances and smartwatch recordings: their files, read as they are and as they should not be, and their splits."""

import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch

from bdistil.data import vowels as vowels_module
from bdistil.data import watch as watch_module
from bdistil.data.readers.series import left_padded, moments, windows
from bdistil.data.vowels import Vowels, read_ts, read_vowels
from bdistil.data.watch import Watch, read_watch, split_in_time
from bdistil.errors import UserError

# ---- arithmetic


def test_moments_are_those_of_all_steps():
    series = [torch.randn(5, 2) * 3 + 1, torch.randn(9, 2)]
    mean, spread = moments(series)
    steps = np.concatenate([s.numpy() for s in series])
    np.testing.assert_allclose(mean, steps.mean(0), rtol=1e-5)
    np.testing.assert_allclose(spread, steps.std(0), rtol=1e-5)


def test_a_channel_that_does_not_move_is_divided_by_one():
    assert moments([torch.full((4, 1), 7.0)])[1].tolist() == [1.0]


def test_zeros_come_first():
    short, long = torch.tensor([[1.0, 2.0]]), torch.ones(3, 2)
    padded = left_padded([short, long], 3)
    assert padded[0].tolist() == [[0, 0], [0, 0], [1, 2]]
    assert torch.equal(padded[1], long)


@pytest.mark.parametrize(("steps", "length", "hop"), [(20, 5, 3), (20, 20, 7), (21, 4, 4), (6, 7, 2)])
def test_windows_are_slices(steps, length, hop):
    values = torch.arange(steps * 2.0).view(steps, 2)
    found = windows(values, length, hop)
    expected = [values[low : low + length] for low in range(0, steps - length + 1, hop)]
    assert found.shape == (len(expected), length, 2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- .ts files

HEADER = """# what it is
@problemName Hums
@univariate false
@dimensions 2
@classLabel true 1 2 7
@data
"""
CASES = "1.5,2,3:4,5,6:7\n-1e-1:0:1\n"


@pytest.fixture
def ts(tmp_path):
    def write(text, ends="\n"):
        path = tmp_path / "Hums_TRAIN.ts"
        path.write_bytes(text.replace("\n", ends).encode())
        return path

    return write


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_a_ts_file(ts, ends, last):
    series, classes = read_ts(ts(HEADER + CASES.strip() + last, ends))
    assert [s.tolist() for s in series] == [[[1.5, 4], [2, 5], [3, 6]], [[pytest.approx(-0.1), 0]]]
    assert classes.tolist() == [2, 0]
    assert series[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "1,2:3,4:9\n", r"one of the classes 1, 2, 7 at the end in case 1 of .*Hums_TRAIN\.ts, got '9'"),
        (HEADER + CASES + "1,2:3,4\n", r"one of the classes .* in case 3 of .*, got '3,4'"),
        (HEADER + CASES + "1,2:7\n", r"2 channels in case 3 of .*, got 1"),
        (HEADER + CASES + "1,2:3:7\n", r"the same number of values in case 3"),
        (HEADER + CASES + "1,:3,4:7\n", r"the same number of values in case 3 .*could not convert"),
        (HEADER, r"Expected @classLabel with the classes, then @data and cases, in .*Hums_TRAIN\.ts"),
        (HEADER[:40], r"Expected @classLabel"),
        (HEADER.replace("true 1 2 7", "false") + CASES, r"Expected @classLabel"),
        ("", r"Expected @classLabel"),
    ],
)
def test_a_ts_file_that_is_damaged(ts, text, message):
    with pytest.raises(UserError, match=message):
        read_ts(ts(text))


# ---- the watch file


def npy(content, protocol=2):
    """A .npy of version 1 with one pickled object, as NumPy writes it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    box = np.empty((), object)
    box[()] = content
    pickle.dump(box, file, protocol)
    return file.getvalue()


def recordings(number=2, channels=6):
    """Of 40, 41, … steps, float64, as in the real file."""
    generator = np.random.default_rng(0)
    series = [generator.normal(size=(40 + i, channels)) for i in range(number)]
    return {"X": series, "y": np.arange(number), "subject": np.arange(number) + 1, "X_labels": ["ax"] * channels}


@pytest.fixture
def watch_file(tmp_path):
    def write(content):
        (tmp_path / "watch.npy").write_bytes(content)
        return tmp_path / "watch.npy"

    return write


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_reader_of_the_watch_file(watch_file, protocol):
    made = recordings()
    series, labels, subjects = read_watch(watch_file(npy(made, protocol)))
    for one, other in zip(series, made["X"], strict=True):
        np.testing.assert_array_equal(one.numpy(), other.astype(np.float32))
    assert (labels.tolist(), subjects.tolist()) == ([0, 1], [1, 2])
    assert labels.dtype == torch.int64


class Bomb:
    """What a pickle of another's making can do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_names_a_function_is_refused_unread(watch_file, tmp_path):
    trap = str(tmp_path / "trap")
    path = watch_file(npy({**recordings(), "extra": Bomb(trap)}))
    with pytest.raises(UserError, match=r"watch\.npy was not read: it names (posix|nt)\.mkdir"):
        read_watch(path)
    assert not os.path.exists(trap)


def test_a_pickle_gets_no_other_codec(watch_file):
    class Text:
        def __reduce__(self):
            import _codecs

            return _codecs.encode, ("bdistil", "rot13")

    with pytest.raises(UserError, match="encoding 'rot13'"):
        read_watch(watch_file(npy({**recordings(), "extra": Text()})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(recordings())[:-50], r"watch\.npy was not read: it is no whole pickle"),
        (npy(recordings())[:150], r"it is no whole pickle"),
        (b"", r"to be a \.npy file of version 1"),
        (npy([1, 2]), r"to hold X, y and subject"),
        (npy({"X": [], "y": []}), r"to hold X, y and subject, subject missing"),
        (npy(recordings(channels=5)), r"recordings \(steps, 6\) .* one of shape \(40, 5\)"),
        (npy({**recordings(), "y": np.arange(3)}), r"got 2, 3 and 2 of them"),
    ],
    ids=["end cut off", "start only", "empty", "list", "no subject", "five channels", "too many labels"],
)
def test_a_watch_file_that_is_damaged(watch_file, content, message):
    with pytest.raises(UserError, match=message):
        read_watch(watch_file(content))


# ---- the real files, where they are installed


@pytest.fixture(scope="module")
def utterances():
    pytest.importorskip("sktime", reason="the utterances are a file of the package sktime")
    return read_vowels("TRAIN"), read_vowels("TEST")


def test_the_utterances(utterances):
    (train, y_train), (test, y_test) = utterances
    assert y_train.bincount().tolist() == [30] * 9
    assert y_test.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    lengths = [len(s) for s in (*train, *test)]
    assert (min(lengths), max(lengths)) == (7, 29)
    assert {s.shape[1] for s in (*train, *test)} == {12}
    assert train[0][0, :2].tolist() == [pytest.approx(1.860936), pytest.approx(-0.207383)]


def test_the_parts_of_the_utterances(utterances):
    module = Vowels()
    module.setup("fit")
    parts = {name: part.tensors for name, part in module.parts.items()}
    assert parts["train"][1].bincount().tolist() == [24] * 9
    assert parts["val"][1].bincount().tolist() == [6] * 9
    assert parts["test"][0].shape == (370, 29, 12)
    rows = {name: {one.numpy().tobytes() for one in x} for name, (x, _) in parts.items()}
    assert sum(map(len, rows.values())) == len(set.union(*rows.values())) == 640
    # Standardised by the frames of the training part, whose padding is zero and stays so.
    frames = torch.cat([one[one.abs().sum(1) > 0] for one in parts["train"][0]])
    torch.testing.assert_close(frames.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.std(0), torch.ones(12), atol=1e-3, rtol=0)
    first = {len(s) for s in utterances[0][0]}
    assert {int((one.abs().sum(1) > 0).sum()) for one in parts["train"][0]} <= first
    assert bool((parts["train"][0][:, -1].abs().sum(1) > 0).all())


def test_another_split_seed_gives_another_validation_part(utterances):
    modules = [Vowels(split_seed=0), Vowels(split_seed=1)]
    for module in modules:
        module.setup()
    assert not torch.equal(*(module.parts["val"].tensors[0] for module in modules))
    assert [len(module.parts["train"]) for module in modules] == [216, 216]


@pytest.fixture(scope="module")
def watch():
    pytest.importorskip("seglearn", reason="the recordings are a file of the package seglearn")
    return read_watch(watch_module.packaged_file("seglearn", watch_module.FILE, watch_module.SHA256))


@pytest.fixture
def read_once(watch, monkeypatch):
    monkeypatch.setattr(watch_module, "read_watch", lambda path: watch)


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


@pytest.mark.parametrize(
    ("make", "name"), [(Vowels, "JapaneseVowels_TRAIN.ts"), (Watch, "watch_dataset.npy")], ids=["vowels", "watch"]
)
def test_files_of_another_version_are_refused(utterances, watch, monkeypatch, make, name):
    monkeypatch.setitem(vowels_module.SHA256, "TRAIN", "0" * 64)
    monkeypatch.setattr(watch_module, "SHA256", hashlib.sha256(b"").hexdigest())
    with pytest.raises(UserError, match=rf"{name} is not the file that this recipe was made for"):
        make().setup("fit")


@pytest.mark.parametrize("make", [Vowels, Watch])
def test_loaders(utterances, read_once, make):
    module = make(batch_size=16)
    module.setup("fit")
    x, y = next(iter(module.train_dataloader()))
    assert (x.dtype, y.dtype, len(x), len(y)) == (torch.float32, torch.int64, 16, 16)
    assert len(module.val_dataloader().dataset) == len(module.parts["val"])
    assert len(module.test_dataloader().dataset) == len(module.parts["test"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vowels(batch_size=0), r"a multiple of 9 in 9 … 135, got 0 and 54"),
        (lambda: Vowels(validation=60), r"got 32 and 60"),
        (lambda: Vowels(validation=0), r"got 32 and 0"),
        (lambda: Watch(batch_size=0), r"`batch_size` and `stride` >= 1"),
        (lambda: Watch(stride=0), r"`batch_size` and `stride` >= 1"),
        (lambda: Watch(seconds=0.01), r"one step or more \(0\.04 s\), got 128, 2, 0\.01, 1 and 1"),
        (lambda: Watch(train_hop=0.0), r"got 128, 2, 2, 1 and 0"),
        (lambda: Watch(split="random"), r"`split` to be 'time' or 'subject', got 'random'"),
        (lambda: Watch(validation=0), r"at most 0\.9 of a recording, got 0, 0\.3"),
        (lambda: Watch(validation=0.5, test=0.5), r"got 0\.5, 0\.5"),
        (lambda: Watch(split="subject", test_subjects=(11,)), r"different ones of 1 … 10"),
        (lambda: Watch(split="subject", test_subjects=(6,)), r"got \[6, 7\] and \[6\]"),
        (lambda: Watch(split="subject", validation_subjects=()), r"got \[\] and \[8, 9, 10\]"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
