"""Data of a finished run: the commands after `fit` read the parts of the run, or refuse."""

import pytest
import torch
from helpers.run_data import Asking, Declared, Drawn, DrawnTest, Misdeclared, Sampled, Untested
from helpers.toys import CLASSES, boost, control, settings_for
from torch.utils.data import TensorDataset

from bdistil import UserError
from bdistil.evaluation.run_data import loader_of
from bdistil.export.run import ExportOptions, export_run


def run_of(folder, module):
    config = {"data": {"class_path": f"helpers.run_data.{module.__name__}"}, "boosting": settings_for(2).to_dict()}
    torch.manual_seed(0)
    return boost(folder, module(), settings=settings_for(2), config=config).run


def test_parts_that_are_drawn_anew_are_refused(tmp_path):
    run = run_of(tmp_path, Drawn)
    torch.manual_seed(0)
    assert len(loader_of(run, "test").dataset) == 64  # drawn as in the run
    torch.manual_seed(1)
    for part in ("val", "test"):
        with pytest.raises(UserError, match=r"of `val_dataloader\(\)` has another x .*than in the run.* seed it"):
            loader_of(run, part)
    with pytest.raises(UserError, match="seed it"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_test_part_that_is_drawn_anew_is_refused(tmp_path):
    run = run_of(tmp_path, DrawnTest)
    torch.manual_seed(0)
    assert len(loader_of(run, "test").dataset) == 64
    torch.manual_seed(1)
    assert len(loader_of(run, "val").dataset) == 64
    with pytest.raises(UserError, match=r"of `test_dataloader\(\)` has another x .*than in the run.* seed it"):
        loader_of(run, "test")


def test_a_start_with_another_test_part_is_refused_before_training(tmp_path):
    torch.manual_seed(0)
    first = control(tmp_path)
    first.boosting.check(DrawnTest())
    with pytest.raises(UserError, match=r"of `test_dataloader\(\)` has another x .*than in the run.* seed it"):
        first.boosting.check(DrawnTest())


def test_samples_of_a_validation_sampler_are_those_of_the_run(tmp_path):
    assert sum(len(y) for _, y in loader_of(run_of(tmp_path, Sampled), "val")) == 32


def test_an_export_sets_the_data_up_as_other_commands_do(tmp_path, monkeypatch):
    run, read = run_of(tmp_path, Asking), []
    take = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda data, n: (read.append((len(data), n)), take(data, n))[1])
    manifest = export_run(run, tmp_path / "out", ExportOptions(quantise="static"))
    assert manifest["labels"] is None
    y = Asking().labels
    calibrated = {int(y[number]) for count, number in read if count == len(y)}
    assert calibrated == set(range(CLASSES))


def test_data_without_a_test_part_name_the_other_part(tmp_path):
    run = run_of(tmp_path, Untested)
    assert len(loader_of(run, "val").dataset) == 64
    with pytest.raises(UserError, match=r"Untested has no `test_dataloader`\. Implement it, or give --part val"):
        loader_of(run, "test")


def test_data_that_cannot_be_imported_are_one_message(tmp_path):
    run = run_of(tmp_path, Drawn)
    run.config.write_text(run.config.read_text().replace("helpers.run_data", "elsewhere.run_data"))
    with pytest.raises(UserError, match=r"(?s)cannot be read here: .*elsewhere.*where the run was started"):
        loader_of(run, "val")


def test_a_normalisation_in_numbers_is_exported(tmp_path):
    manifest = export_run(run_of(tmp_path / "run", Declared), tmp_path / "out")
    assert manifest["normalisation"] == {"mean": 0.5, "deviation": 0.25, "inside": False}
    with pytest.raises(UserError, match=r"`normalisation` of the data module to be \(mean.*got 'imagenet'"):
        export_run(run_of(tmp_path / "other", Misdeclared), tmp_path / "none")
