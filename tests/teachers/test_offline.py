"""Teacher logits that exist already, in place of a teacher."""

import numpy as np
import pytest
import torch
from helpers.toys import (
    CLASSES,
    TEST,
    TRAIN,
    VAL,
    Toys,
    boost,
    curve,
    digests,
    make_student,
    make_teacher,
    settings_for,
)
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from bdistil import OfflineTeacher, UserError
from bdistil.teachers.wrappers import FrozenTeacher

ONE = {"settings": settings_for(1), "trainer": {"epochs": 1}}
COUNTS = {"train": TRAIN, "val": VAL, "test": TEST}


@pytest.fixture(scope="module")
def logits():
    """The toy teacher's answers to all samples of each part."""
    with torch.no_grad():
        return {name: make_teacher().eval()(x) for name, (x, _) in Toys().parts.items()}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Students, and accuracies of a run with the teacher itself."""
    folder = tmp_path_factory.mktemp("usual")
    boost(folder, **ONE)
    return result(folder)


def result(folder):
    columns = ("val_accuracy", "val_loss", "test_accuracy")
    return digests(folder), [[row[name] for name in columns] for row in curve(folder)]


@pytest.fixture
def files(logits, tmp_path):
    save_file(logits, tmp_path / "all.safetensors")
    for name, rows in logits.items():
        np.save(tmp_path / f"{name}.npy", rows.numpy())
        save_file({"logits": rows}, tmp_path / f"{name}.safetensors")
    np.save(tmp_path / "whole.npy", torch.cat(list(logits.values())).numpy())
    return tmp_path


FORMS = {
    "tensors": lambda logits, files: OfflineTeacher(**logits),
    "mapping": lambda logits, files: logits,
    "arrays": lambda logits, files: {name: rows.numpy().astype(np.float64) for name, rows in logits.items()},
    "npy": lambda logits, files: {name: files / f"{name}.npy" for name in logits},
    "safetensors": lambda logits, files: {name: str(files / f"{name}.safetensors") for name in logits},
    "one safetensors": lambda logits, files: files / "all.safetensors",
    "one npy of all parts": lambda logits, files: files / "whole.npy",
    "one tensor of all parts": lambda logits, files: torch.cat(list(logits.values())),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_on_logits_is_that_of_the_teacher(tmp_path, logits, files, usual, form):
    controller = boost(tmp_path / "run", teacher=FORMS[form](logits, files), **ONE)
    assert result(tmp_path / "run") == usual
    assert controller.run.read("teacher")["macs"] == 0


def test_it_goes_on_and_another_table_is_refused(tmp_path, logits):
    whole = torch.cat(list(logits.values()))
    boost(tmp_path, teacher=whole, settings=settings_for(2), trainer={"epochs": 1})
    before = digests(tmp_path)
    boost(tmp_path, teacher=whole.clone(), settings=settings_for(2), trainer={"epochs": 1})
    assert digests(tmp_path) == before
    assert FrozenTeacher(OfflineTeacher(whole)).fingerprint != FrozenTeacher(OfflineTeacher(whole + 1)).fingerprint


def test_its_identity_does_not_depend_on_the_checks(logits):
    whole = torch.cat(list(logits.values()))
    first, checked = OfflineTeacher(whole), OfflineTeacher(whole)
    checked.check({name: len(rows) for name, rows in logits.items()})
    assert first.identity == checked.identity


def test_without_logits_of_the_test_part_the_teacher_has_no_test_figure(tmp_path, logits):
    boost(tmp_path, teacher={"train": logits["train"], "val": logits["val"]}, **ONE)
    teacher, student = curve(tmp_path)
    assert teacher["test_accuracy"] == ""
    assert float(student["test_accuracy"]) > 0
    boost(tmp_path / "both", teacher=torch.cat([logits["train"], logits["val"]]), **ONE)
    assert curve(tmp_path / "both")[0]["test_accuracy"] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "train": t["train"][:-1]}, "192 of 'train', 64 of 'val', 64 of 'test', got 191 of 'train'"),
        (lambda t: {**t, "val": t["val"][:9]}, "got 9 of 'val'"),
        (lambda t: {**t, "test": t["test"][:9]}, "got 9 of 'test'"),
        (lambda t: t["train"], r"all parts .* got 192 rows.* OfflineTeacher\(train, val, test\)"),
        (lambda t: {**t, "val": t["val"][:, :3]}, "same L outputs in all parts, got 4 of 'train', 3 of 'val'"),
        (lambda t: {name: rows[:, :3] for name, rows in t.items()}, "label y .* 0 … 2|teacher gives L=3"),
        (lambda t: {**t, "val": t["val"][0]}, r"shape \(N, L\) for the part 'val', got float32 of shape \(4,\)"),
        (lambda t: {**t, "val": "val.txt"}, r"\.npy or \.safetensors file, got val\.txt"),
        (lambda t: {**t, "val": "nowhere.npy"}, "nowhere.npy to hold teacher logits, but it cannot be read"),
        (lambda t: {**t, "val": "nowhere.safetensors"}, "nowhere.safetensors to hold teacher logits"),
        (lambda t: {"train": t["train"], "test": t["test"]}, "Expected `val` of an OfflineTeacher.*Give `val`"),
        (lambda t: list(t.values()), "`teacher` to be a torch.nn.Module, or its logits.* got list"),
        (lambda t: {"training": t["train"]}, "got dict"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, logits, change, message):
    with pytest.raises(UserError, match=message):
        boost(tmp_path, teacher=change(logits), **ONE)
    assert not digests(tmp_path)


def test_students_of_another_number_of_outputs(tmp_path, logits):
    with pytest.raises(UserError, match="teacher gives L=4 outputs, the student L=5"):
        boost(tmp_path, teacher=logits, student=lambda round: nn.Linear(8, 5), **{**ONE})


def test_a_file_without_a_table_of_the_part(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"a tensor named 'train' or 'logits' in .*two.safetensors, got 'a', 'b'"):
        OfflineTeacher(tmp_path / "two.safetensors")
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes()[:40])
    for name in ("torn.npy", "torn.safetensors"):
        with pytest.raises(UserError, match=rf"{name} to hold teacher logits, but it cannot be read"):
            OfflineTeacher(tmp_path / name)


@pytest.mark.parametrize("options", [{"state": "recompute"}, {"views": 2}])
def test_inputs_that_change_have_no_logits(tmp_path, logits, options):
    with pytest.raises(UserError, match="a table of logits, which belong to the samples as they are"):
        boost(tmp_path, Toys(noisy="views" in options), teacher=logits, settings=settings_for(1, **options))
    with pytest.raises(UserError, match="no answer to other inputs"):
        OfflineTeacher(logits["train"])(torch.zeros(1, 8))


@pytest.mark.parametrize("form", ["parts", "whole"])
def test_where_a_sampler_chooses_rows_are_those_of_the_dataset(tmp_path, logits, form):
    chosen = [41, 3, 17, 60, 8]

    class Sampled(Toys):
        def val_dataloader(self):
            return DataLoader(TensorDataset(*self.parts["val"]), 2, sampler=SubsetRandomSampler(chosen))

    table = logits if form == "parts" else OfflineTeacher(torch.cat(list(logits.values())))
    boost(tmp_path / "table", Sampled(), teacher=table, **ONE)
    boost(tmp_path / "module", Sampled(), **ONE)
    assert result(tmp_path / "table") == result(tmp_path / "module")
    with pytest.raises(UserError, match=r"64 of 'val', 64 of 'test', got 5 of 'val'.*sample i of the dataset"):
        boost(tmp_path / "few", Sampled(), teacher={**logits, "val": logits["val"][chosen]}, **ONE)


def test_half_precision_and_bfloat16(logits):
    for kind in (torch.float16, torch.bfloat16):
        rows = OfflineTeacher(logits["train"].to(kind)).rows("train", np.array([3, 1]))
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, logits["train"][[3, 1]].to(kind).float())


def test_a_student_that_links_learns_from_a_table(tmp_path, logits):
    controller = boost(tmp_path, teacher=logits, student=make_student, settings=settings_for(2), trainer={"epochs": 1})
    assert controller.run.rows()[-1]["link_macs"] > 0
    assert controller.run.rows()[0]["stage"] == "teacher"
    assert len(controller.ensemble) == 2
    assert controller.ensemble(Toys().parts["val"][0]).shape == (VAL, CLASSES)


def test_training_logits_in_another_order_are_warned_of(tmp_path, logits):
    shuffled = {**logits, "train": logits["train"][torch.randperm(TRAIN)]}
    with pytest.warns(UserWarning, match=r"score of 0\.\d+ on the training part .* are in another order"):
        boost(tmp_path, teacher=OfflineTeacher(**shuffled), **ONE)
