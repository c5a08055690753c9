"""CIFAR-10 and CIFAR-100 from files in the format of Python 2, and what is refused of them."""

import io
import pickle
import pickletools

import numpy as np
import pytest
import torch
from helpers.paper_files import old_pickle, pattern, write_cifar10, write_cifar100

from bdistil.data.cifar import Cifar10, Cifar100, read_batch
from bdistil.data.loaders import is_random
from bdistil.data.readers import load_arrays
from bdistil.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    write_cifar10(root)
    write_cifar100(root)
    return root


def opened(kind, root, **options):
    module = kind(**{"root": str(root), "partial": True, "validation": kind.CLASSES, **options})
    module.setup("fit")
    return module


def test_the_fixture_is_what_python_2_wrote(root):
    written = (root / "cifar-10-batches-py" / "data_batch_1").read_bytes()
    operators = {operator.name for operator, _, _ in pickletools.genops(written)}
    assert {"SHORT_BINSTRING", "BINSTRING", "GLOBAL", "REDUCE"} <= operators
    assert not {"BINUNICODE", "BINBYTES"} & operators
    assert pickle.loads(written, encoding="latin1")["data"][1].tolist() == pattern(1).tolist()


def test_planes_and_axes_are_the_right_way_round(root):
    images, labels = read_batch(root / "cifar-10-batches-py" / "data_batch_1", Cifar10.SOURCE, "labels", 10)
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (40, 3, 32, 32), torch.int64)
    assert images[1, :, 2, 5].tolist() == [40, 16, 7]
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize(("kind", "sizes"), [(Cifar10, (190, 10, 40)), (Cifar100, (100, 100, 100))], ids=["10", "100"])
def test_parts(root, kind, sizes):
    module = opened(kind, root)
    assert tuple(len(module.parts[part]) for part in ("train", "val", "test")) == sizes
    assert module.parts["val"].labels.bincount().tolist() == [1] * kind.CLASSES
    x, y = next(iter(module.test_dataloader()))
    expected = (torch.from_numpy(pattern(200 if kind is Cifar10 else 0)).view(3, 32, 32) / 255).double()
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (kind.MEAN, kind.STD))
    assert torch.allclose(x[0].double(), (expected - mean) / std, atol=1e-5)
    assert type(x) is torch.Tensor
    declared = (expected - module.normalisation[0]) / module.normalisation[1]
    assert torch.allclose(x[0].double(), declared.double(), atol=1e-5)
    assert (module.mean, module.std) == ([*kind.MEAN], [*kind.STD])
    assert y.dtype == torch.int64
    assert opened(kind, root, split_seed=1).parts["val"].images.tolist() != module.parts["val"].images.tolist()


def test_only_the_training_part_is_augmented(root):
    plain, augmented = opened(Cifar10, root), opened(Cifar10, root, augment=True)
    assert not is_random(plain.parts["train"])
    assert is_random(augmented.parts["train"])
    assert not is_random(augmented.parts["val"])
    assert not is_random(augmented.parts["test"])


@pytest.mark.parametrize("most", [4, 2])
def test_augmentation_pads_crops_and_flips(root, most):
    """Green is 8 y: a shift of up to 4 rows, with black above or below. Red is 8 x, mirrored in half of the cases."""
    given = {} if most == 4 else {"padding": most}
    part = opened(Cifar10, root, augment=True, **given).parts["train"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (Cifar10.MEAN, Cifar10.STD))
    shifts, mirrored = set(), 0
    for _ in range(200):
        image = ((part[0][0] * std + mean) * 255).round()
        middle_row, middle_column = image[1, :, 16], image[0, 16]
        shifts.add(int(middle_row[16] - 128) // 8)
        mirrored += bool(middle_column[20] < middle_column[12])
        assert set(middle_row.diff().tolist()) <= {8.0, 0.0, -248.0, *(8.0 * k for k in range(5))}
    assert shifts == set(range(-most, most + 1))
    assert 60 < mirrored < 140


def test_padding_beyond_the_image_is_refused(root):
    with pytest.raises(UserError, match=r"Expected `padding` in 0 … 31, got 32"):
        opened(Cifar10, root, augment=True, padding=32)


def test_nothing_but_arrays_is_unpickled(tmp_path):
    path = tmp_path / "ran"
    evil = b"\x80\x02cposix\nsystem\nU" + bytes([len(f"touch {path}")]) + f"touch {path}".encode() + b"\x85R."
    with pytest.raises(UserError, match=r"posix\.system, which no file of arrays does"):
        load_arrays(io.BytesIO(evil))
    assert not path.exists()
    with pytest.raises(UserError, match=r"__builtin__\.eval"):
        load_arrays(io.BytesIO(b"\x80\x02c__builtin__\neval\nU\x011\x85R."))
    with pytest.raises(UserError, match="encoding 'rot13'"):
        load_arrays(io.BytesIO(b"\x80\x02c_codecs\nencode\nU\x07bdistilU\x05rot13\x86R."))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a complete pickle"),
        (old_pickle({"labels": [0], "data": pattern(0)[None]})[:-700], "not a complete pickle"),
        (b"<html>not found</html>", "not a complete pickle"),
        (old_pickle([1, 2]), "no `data` and `labels`"),
        (old_pickle({"labels": [0], "data": np.zeros((1, 768), np.uint8)}), r"uint8 \(1, 768\), expected .*3072"),
        (old_pickle({"labels": [0, 1], "data": pattern(0)[None]}), r"expected uint8 \(2, 3072\)"),
        (old_pickle({"labels": [0], "data": [0]}), "`data` is list"),
        (old_pickle({"labels": [10], "data": pattern(0)[None]}), r"integers in 0 … 9"),
        (b"\x80\x02cos\nsystem\nU\x02ls\x85R.", r"os\.system"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, why):
    write_cifar10(tmp_path, each=1)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"data_batch_3 of CIFAR-10 cannot be used: .*{why}.*Get it again from https"):
        opened(Cifar10, tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(
        UserError, match=r"not found in .*/cifar-10-batches-py and .* expected data_batch_1.* and 3 more"
    ) as e:
        opened(Cifar10, tmp_path / "none")
    assert f"curl -L https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz | tar xz -C {tmp_path}/none" in str(
        e.value
    )
    folder = write_cifar10(tmp_path, each=1)
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"not complete: .*cifar-10-batches-py lacks data_batch_4\. "):
        opened(Cifar10, tmp_path)
    (folder / "data_batch_4").write_bytes((folder / "data_batch_1").read_bytes())
    with pytest.raises(UserError, match=r"50,000 images in train, but 50 are in .* partial=true"):
        opened(Cifar10, tmp_path, partial=False)
    assert len(opened(Cifar10, folder).parts["train"]) == 40  # the folder itself as root


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"validation": 9}, {"num_workers": -1}, {"validation": 190}])
def test_values_that_cannot_be(root, values):
    with pytest.raises(UserError, match=rf"`{next(iter(values))}`"):
        opened(Cifar10, root, **values)


@pytest.mark.parametrize(("name", "label"), [("data_batch_5", "testing batch"), ("test_batch", "training batch")])
def test_a_renamed_file_of_the_other_part_is_refused(tmp_path, name, label):
    write_cifar10(tmp_path, each=1)
    file = tmp_path / "cifar-10-batches-py" / name
    file.write_bytes(old_pickle({"labels": [0], "data": pattern(0)[None], "batch_label": label}))
    with pytest.raises(UserError, match=rf"{name} of CIFAR-10 cannot be used: it calls itself '{label}'"):
        opened(Cifar10, tmp_path)
