"""Utterances: their file format, what is refused, and their parts."""

import pytest
import torch

from bdistil.data import vowels as vowels_module
from bdistil.data.vowels import Vowels, read_ts, read_vowels
from bdistil.errors import UserError

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


def test_files_of_another_version_are_refused(utterances, monkeypatch):
    monkeypatch.setitem(vowels_module.SHA256, "TRAIN", "0" * 64)
    with pytest.raises(UserError, match=r"JapaneseVowels_TRAIN\.ts is not the file that this recipe was made for"):
        Vowels().setup("fit")


def test_loaders(utterances):
    module = Vowels(batch_size=16)
    module.setup("fit")
    x, y = next(iter(module.train_dataloader()))
    assert (x.dtype, y.dtype, len(x), len(y)) == (torch.float32, torch.int64, 16, 16)
    assert len(module.val_dataloader().dataset) == len(module.parts["val"])
    assert len(module.test_dataloader().dataset) == len(module.parts["test"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, r"a multiple of 9 in 9 … 135, got 0 and 54"),
        ({"validation": 60}, r"got 32 and 60"),
        ({"validation": 0}, r"got 32 and 0"),
    ],
)
def test_values_that_are_not_allowed(values, message):
    with pytest.raises(UserError, match=message):
        Vowels(**values)
