"""Utterances: their files, their parts, and what is refused."""

import pytest
import torch

from bdistil.data import vowels as vowels_module
from bdistil.data.vowels import Vowels, read_vowels
from bdistil.errors import UserError


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
        ({"batch_size": 0}, r"`batch_size` >= 1"),
        ({"validation": 60}, r"a multiple of 9 in 9 … 135, got 60"),
        ({"validation": 0}, r"got 0"),
    ],
)
def test_values_that_are_not_allowed(values, message):
    with pytest.raises(UserError, match=message):
        Vowels(**values)
