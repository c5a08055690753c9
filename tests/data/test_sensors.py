"""DSA-19 and HAR-6 from small files in the true format, and what is refused of them."""

import numpy as np
import pytest
import torch
from helpers.paper_files import write_dsa, write_har

from bdistil.data.cifar import Cifar10
from bdistil.data.dsa19 import Dsa19, read_segment
from bdistil.data.har6 import TRAIN_SUBJECTS, Har6
from bdistil.data.imagenet import ImageNet, TinyImageNet
from bdistil.errors import UserError

# ---- DSA-19


@pytest.fixture(scope="module")
def dsa(tmp_path_factory):
    root = tmp_path_factory.mktemp("dsa")
    write_dsa(root)
    return root


def opened(kind, root, **options):
    module = kind(str(root), partial=True, **options)
    module.setup("fit")
    return module


def test_parts_are_split_by_subject(dsa):
    """The fixture's first channel says activity and subject, before it is standardised."""
    module = opened(Dsa19, dsa)
    for part, subjects in (("train", (1, 2, 3, 4)), ("val", (5, 6)), ("test", (7, 8))):
        x, y = module.parts[part].tensors
        raw, *_ = module.read()[part]
        assert x.shape == (2 * len(subjects), 125, 45)
        assert sorted(set(np.round(raw[:, 0, 0] % 10).astype(int))) == list(subjects)
        assert (raw[:, 0, 0] // 10).astype(int).tolist() == (y + 1).tolist()
        assert y.unique().tolist() == [0, 18]
    x = module.parts["train"].tensors[0]
    assert torch.allclose(x.mean((0, 1)), torch.zeros(45), atol=1e-4)
    assert torch.allclose(x.std((0, 1), correction=0), torch.ones(45), atol=1e-3)
    mean, spread = module.normalisation
    torch.testing.assert_close(
        x * spread + mean, torch.from_numpy(np.array(module.read()["train"][0])), rtol=0, atol=1e-3
    )
    other = opened(Dsa19, dsa, train=[8], validation=[1], test=[2, 3])
    assert [len(other.parts[part]) for part in ("train", "val", "test")] == [2, 2, 4]


def test_padding_stands_before_the_steps(dsa):
    plain, padded = (opened(Dsa19, dsa, pad_to=steps).parts["val"].tensors[0] for steps in (125, 129))
    assert padded.shape[1] == 129
    assert padded[:, :4].abs().sum() == 0
    assert torch.equal(padded[:, 4:], plain)
    assert not hasattr(opened(Dsa19, dsa, pad_to=129), "normalisation"), "the zeros are no raw values"


def test_numbers_in_other_shapes(tmp_path):
    """Line ends of Windows, no end of the last line, exponents, blanks."""
    values = np.arange(125 * 45).reshape(125, 45) / 7
    text = "\r\n".join(", ".join(f"{value:.4e}" for value in row) for row in values)
    (tmp_path / "s.txt").write_bytes(text.encode())
    assert np.allclose(read_segment(tmp_path / "s.txt"), values, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: lines[:124], "124 lines of 45 numbers, expected 125 lines of 45 numbers"),
        (lambda lines: [line.rpartition(",")[0] for line in lines], "it has 125 lines of 44 numbers"),
        (lambda lines: [*lines[:-1], "1,2,3"], "columns changed from 45 to 3"),
        (lambda lines: [], "no data"),
        (lambda lines: ["a,b", *lines[1:]], "could not convert string 'a'"),
        (lambda lines: [lines[0].replace(lines[0].partition(",")[0], "nan", 1), *lines[1:]], "NaN or infinity"),
    ],
)
def test_a_damaged_segment_is_named(tmp_path, change, why):
    folder = write_dsa(tmp_path)
    file = folder / "a01" / "p3" / "s01.txt"
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))
    with pytest.raises(
        UserError, match=rf"a01/p3/s01\.txt of Daily and Sports Activities cannot be used: .*{why}.*Get it again from h"
    ):
        opened(Dsa19, tmp_path)


def test_missing_segments(dsa, tmp_path):
    with pytest.raises(UserError, match=r"(?s)Activities was not found in .*: expected a01, a02.*curl -Lo dsa\.zip"):
        Dsa19(str(tmp_path)).setup()
    with pytest.raises(UserError, match=r"not complete: .*dsa/data lacks a02, a03, a04 and 14 more"):
        Dsa19(str(dsa)).setup()
    folder = write_dsa(tmp_path)
    for number in range(2, 19):
        (folder / f"a{number:02}").mkdir()
    with pytest.raises(UserError, match=r"has 9,120 segments, but 16 are in .*partial=true"):
        Dsa19(str(tmp_path)).setup()


@pytest.mark.parametrize(
    "values",
    [{"train": [1, 5]}, {"test": []}, {"validation": [9]}, {"test": [7, 7]}, {"pad_to": 124}, {"batch_size": 0}],
    ids=str,
)
def test_values_that_cannot_be(values):
    with pytest.raises(UserError, match=rf"`{next(iter(values))}`"):
        Dsa19(**values)


# ---- HAR-6


@pytest.fixture(scope="module")
def har(tmp_path_factory):
    root = tmp_path_factory.mktemp("har")
    write_har(root)
    return root


def test_windows_and_subjects(har):
    """The fixture's values say signal, window and step: 1000 s + window + step / 1000."""
    module = opened(Har6, har)
    raw = module.read()
    assert [len(module.parts[part]) for part in ("train", "val", "test")] == [36, 6, 4]
    assert raw["test"][0].shape == (4, 128, 9)
    assert np.allclose(raw["test"][0][2, 5], [1000 * signal + 2 + 0.005 for signal in range(9)], atol=1e-3)
    windows = raw["val"][0][:, 0, 0].astype(int)
    assert sorted({TRAIN_SUBJECTS[window % 21] for window in windows}) == [7, 22, 28]
    assert raw["val"][1] == [window % 6 for window in windows]
    assert len(opened(Har6, har, validation=[1]).parts["val"]) == 2


def test_incomplete_har(har, tmp_path):
    with pytest.raises(
        UserError, match=r"(?s)Smartphones was not found in .*train/y_train\.txt.*unzip -q 'UCI HAR Dataset"
    ):
        opened(Har6, tmp_path)
    with pytest.raises(UserError, match=r"7,352 windows in train, but 42 are in"):
        Har6(str(har)).setup()
    folder = write_har(tmp_path)
    signals = folder / "train" / "Inertial Signals"
    whole = (signals / "body_acc_y_train.txt").read_text()
    for content, why in ((whole[:-20], "columns"), (whole.replace(" 1", " x", 1), "could not convert"),
                         ("1 2\n" * 42, "42 lines of 2 numbers, expected any number of lines of 128")):  # fmt: skip
        (signals / "body_acc_y_train.txt").write_text(content)
        with pytest.raises(UserError, match=rf"(?s)body_acc_y_train\.txt of Human .* cannot be used: .*{why}"):
            opened(Har6, tmp_path)
    (signals / "body_acc_y_train.txt").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(
        UserError, match=r"body_acc_y_train\.txt gives features \(41, 128\), those before it \(42, 128\)"
    ):
        opened(Har6, tmp_path)
    (signals / "body_acc_y_train.txt").write_text(whole)
    (folder / "train" / "y_train.txt").write_text("7\n" * 42)
    with pytest.raises(UserError, match=r"a label in 1 … 6"):
        opened(Har6, tmp_path)
    (signals / "body_acc_y_train.txt").unlink()
    with pytest.raises(UserError, match=r"not complete: .* lacks train/Inertial Signals/body_acc_y_train\.txt"):
        opened(Har6, tmp_path)
    with pytest.raises(UserError, match=r"subjects of 1, 3, 5, .*got `validation`: \[2\]"):
        Har6(validation=[2])


@pytest.mark.parametrize("module", [Dsa19, Har6, Cifar10, TinyImageNet, ImageNet])
def test_options_are_given_by_name(module):
    """A number after the root could be taken for a batch size as well as for a validation part."""
    with pytest.raises(TypeError, match="positional argument"):
        module("data", 64)
