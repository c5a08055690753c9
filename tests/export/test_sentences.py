"""Export of students that read several tensors of lengths that vary: token ids and a mask."""

import json

import numpy as np
import pytest
import torch
from helpers.export_runs import Trimmed
from helpers.sentences import CLASSES, padded, run_of_sentences, sentences
from helpers.toys import Toys, boost, settings_for
from torch import nn

from bdistil import Budget, ProgressiveEnsemble, Rung, Student, UserError
from bdistil.errors import RunError
from bdistil.export import ExportOptions, export_run
from bdistil.export.job import Export
from bdistil.models.inputs import InputSpec
from bdistil.runner import Budget as RunnerBudget
from bdistil.runner import ExportedEnsemble, ExportError
from bdistil.runner.command import main
from bdistil.storage.blueprint import describe
from bdistil.storage.run_directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of_sentences(tmp_path_factory.mktemp("sentences"), rounds=3).run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_run(run, folder)
    return folder


def batch(count, longest, seed=9):
    """A batch as students read it, in torch and in NumPy."""
    x = padded(sentences(count, seed, longest=longest))
    x = {key: x[key] for key in ("ids", "mask")}
    return x, {key: value.numpy() for key, value in x.items()}


def test_the_manifest_names_the_inputs(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert [(entry["name"], entry["path"], entry["shape"], entry["dtype"]) for entry in manifest["inputs"]] == [
        ("x_ids", ["ids"], ["x_ids_1"], "int64"), ("x_mask", ["mask"], ["x_mask_1"], "int64")
    ]  # fmt: skip
    assert manifest["inputs"][0]["largest"] == {"x_ids_1": 7}
    assert manifest["exporter"] == "torchscript"  # the slower one is for students that it does not support
    assert max(manifest["parity"]["differences"]) < 1e-5


@pytest.mark.parametrize(("count", "longest"), [(1, 3), (4, 2), (5, 7), (70, 19)])
def test_the_runner_answers_any_length(run, exported, count, longest):
    ensemble, runner = ProgressiveEnsemble.load(run.root), ExportedEnsemble.load(exported)
    x, arrays = batch(count, longest)
    for stage, given in zip(ensemble.stages(x), runner.stages(arrays), strict=True):
        np.testing.assert_allclose(given.logits, stage.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(runner.predict(arrays).logits, ensemble(x).numpy(), atol=1e-4)
    confidence = float(torch.softmax(ensemble(x, stages=1), -1).amax(-1).median())
    given = runner.predict(arrays, RunnerBudget(confidence=confidence))
    expected = ensemble.predict(x, Budget(confidence=confidence))
    assert given.stages.tolist() == expected.stages.tolist()
    np.testing.assert_allclose(given.logits, expected.logits.numpy(), atol=1e-4)
    assert runner.predict(arrays, RunnerBudget(seconds=10.0)).stages.tolist() == [3] * count


@pytest.mark.parametrize("fuse", ["all", "exits"])
def test_fused_graphs(run, tmp_path, fuse):
    manifest = export_run(run, tmp_path / "out", ExportOptions(fuse=fuse))
    manifest["fused"]["faster"] = True
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    runner, ensemble = ExportedEnsemble.load(tmp_path / "out"), ProgressiveEnsemble.load(run.root)
    for count, longest in ((1, 4), (1, 9), (3, 5)):
        x, arrays = batch(count, longest)
        np.testing.assert_allclose(runner.predict(arrays).logits, ensemble(x).numpy(), atol=1e-4)
        budget = {"confidence": 0.4}
        given, expected = runner.predict(arrays, RunnerBudget(**budget)), ensemble.predict(x, Budget(**budget))
        np.testing.assert_allclose(given.logits, expected.logits.numpy(), atol=1e-4)


def test_int8_and_archives_of_torch(run, tmp_path):
    manifest = export_run(run, tmp_path / "int8", ExportOptions(quantise="dynamic"))
    assert len(manifest["quantised"]["int8"]["accuracy"]) == 3
    manifest = export_run(run, tmp_path / "torch", ExportOptions(format="torch"))
    assert max(manifest["parity"]["differences"]) < 1e-5
    program = torch.export.load(tmp_path / "torch" / manifest["stages"][0]["file"]).module()
    x, _ = batch(6, 11)
    total = ProgressiveEnsemble.load(run.root).stage_runner(x).step().total
    torch.testing.assert_close(program(x["ids"], x["mask"])[0], total, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_exported_is_named(run, tmp_path):
    from bdistil.export.formats import executorch_files

    with pytest.raises(UserError, match="of one shape for --format executorch"):
        executorch_files(Export(run, ExportOptions()), tmp_path, {})
    packed = boost(
        tmp_path / "run", Toys(), student=lambda round: nn.Linear(8, 4), settings=settings_for(1), trainer={"epochs": 1}
    ).run
    record = json.loads((packed.folder(0) / "round.json").read_text())
    (packed.folder(0) / "round.json").write_text(json.dumps({**record, "input_shape": None}))
    with pytest.raises(UserError, match="Expected students that read a tensor x, or several"):
        Export(packed, ExportOptions())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return self.layer(x[0])  # the second is not read


class Halves(Toys):
    """x is a tuple of two tensors."""

    def __init__(self):
        super().__init__()
        for name, (x, y) in self.parts.items():
            self.parts[name] = list(zip(zip(x[:, :4], x[:, 4:], strict=True), y, strict=True))

    def loader(self, name, **options):
        return torch.utils.data.DataLoader(self.parts[name], 32, **options)

    def train_dataloader(self):
        return self.loader("train", shuffle=True)

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


def test_a_tuple_of_which_one_is_not_read(tmp_path):
    controller = boost(
        tmp_path / "run", Halves(), teacher=nn.Sequential(Pair(), nn.Linear(6, 4)),
        student=lambda round: Student(Pair(), nn.Linear(6, 4)), settings=settings_for(2), trainer={"epochs": 1},
    )  # fmt: skip
    export_run(controller.run, tmp_path / "out")
    runner = ExportedEnsemble.load(tmp_path / "out")
    x = (torch.randn(3, 4), torch.randn(3, 4))
    given = runner.predict(tuple(part.numpy() for part in x))
    np.testing.assert_allclose(given.logits, controller.ensemble(x).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["ids"], r"x to hold x\['ids'\], x\['mask'\], got ndarray without 'ids'"),
        (lambda x: {"ids": x["ids"]}, r"got dict without 'mask'"),
        (lambda x: {**x, "mask": x["mask"][:1]}, "as many samples, got 3 of x_ids, 1 of x_mask"),
        (lambda x: {**x, "mask": x["mask"].astype(np.int32)}, r"`x\['mask'\]` of dtype int64, got int32"),
        (
            lambda x: {**x, "ids": x["ids"][..., None]},
            r"array of shape \(B, any\), got \(3, 5, 1\)",
        ),
        (lambda x: {**x, "ids": x["ids"].tolist()}, "got list"),
    ],
)
def test_inputs_that_differ_are_named(exported, change, message):
    runner, x = ExportedEnsemble.load(exported), {"ids": np.ones((3, 5), np.int64), "mask": np.ones((3, 5), np.int64)}
    runner.predict(x)
    with pytest.raises(ExportError, match=message):
        runner.predict(change(x))


def test_the_command_reads_several_arrays(exported, tmp_path, capsys):
    _, arrays = batch(4, 6)
    np.savez(tmp_path / "x.npz", **arrays)
    assert main([str(exported), "--input", str(tmp_path / "x.npz")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_lengths_without_data_become_no_constant(tmp_path):
    run = RunDirectory(tmp_path / "run")
    plan, tensors = describe(Student(Trimmed(), nn.Linear(8, CLASSES)))
    spec = InputSpec.of_batch({"x": torch.zeros(2, 7, 3), "lengths": torch.tensor([7, 3])})
    record = {"scale": 1.0, "curve": {"macs": 9}, "rung": vars(Rung(0)), "blueprint": plan, **spec.to_record()}
    run.commit(0, tensors, record)
    with pytest.raises(RunError, match="torchscript: Converting a tensor to a Python"):
        export_run(run, tmp_path / "out")


def test_the_command_reads_a_tuple_as_numpy_saves_it(tmp_path, capsys):
    controller = boost(
        tmp_path / "run", Halves(), teacher=nn.Sequential(Pair(), nn.Linear(6, 4)),
        student=lambda round: Student(Pair(), nn.Linear(6, 4)), settings=settings_for(2), trainer={"epochs": 1},
    )  # fmt: skip
    export_run(controller.run, tmp_path / "out")
    x = (torch.randn(3, 4), torch.randn(3, 4))
    np.savez(tmp_path / "x.npz", *(part.numpy() for part in x))
    assert main([str(tmp_path / "out"), "--input", str(tmp_path / "x.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [int(line.split("\t")[0]) for line in lines] == controller.ensemble(x).argmax(1).tolist()
