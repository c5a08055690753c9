"""Options of a recipe that make it faster, and the training of a missing teacher: same run, same files."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.paper_files import write_cifar10
from helpers.toys import FEATURES, boost, make_teacher, make_trainer, settings_for
from safetensors.torch import load_file
from torch import nn

from bdistil import ProgressiveEnsemble
from bdistil.boosting import round as rounds
from bdistil.cli.app import main
from bdistil.cli.distiller import Distiller
from bdistil.errors import UserError
from bdistil.metrics.cost import as_written, measure_cost
from bdistil.models import ConvStudent
from bdistil.models.cifar import CifarResNet
from bdistil.storage.run_directory import RunDirectory
from bdistil.teachers.training import TeacherSpec, TeacherTraining

SMALL = ["--config", "cifar10-resnet56", "--data.partial", "true", "--data.num_workers", "0", "--data.validation", "10",
         "--data.batch_size", "16", "--model.teacher.network.depth", "8",
         "--model.teacher.network.channels", "[4,4,8,8]",
         "--model.student.channels", "[2,2,4,4]", "--model.teacher.epochs", "2", "--model.teacher.warmup", "1",
         "--model.boosting.rounds", "2", "--model.boosting.accept", "margin",
         "--model.boosting.margin_share", "0", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
         "--tracking.mode", "disabled"]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("options")
    write_cifar10(root, each=1)
    return root


@pytest.fixture(scope="module")
def fast(root):
    """A run in bf16 and channels last, on augmented images; and the types that its losses were made of."""
    types = set()
    plain = rounds.round_loss

    def watched(deviation, error, log_z, **game):
        loss = plain(deviation, error, log_z, **game)
        types.update((loss.dtype, deviation.dtype, error.dtype, torch.is_autocast_enabled("cpu")))
        return loss

    options = ["--trainer.precision", "bf16-mixed", "--model.channels_last", "true", "--trainer.log_every_n_steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "round_loss", watched)
        where = ["--data.root", str(root), "--run_dir", str(root / "fast")]
        assert main(["fit", *SMALL, *options, *where]) == 0
    return RunDirectory(root / "fast"), types


def test_loss_and_ledger_stay_float32(fast):
    run, types = fast
    assert types == {torch.float32, True}
    for part, samples in (("train", 40), ("val", 10)):
        names = [*(run.ledger / part).glob("teacher*"), *(run.ledger / part).glob("error*")]
        assert len(names) >= 2
        assert {file.stat().st_size for file in names} == {4 * 10 * samples}


def test_committed_files_are_those_of_a_plain_run(fast, root):
    run, _ = fast
    options = ["--trainer.precision", "32-true", "--model.channels_last", "false"]
    where = ["--data.root", str(root), "--run_dir", str(root / "plain")]
    assert main(["fit", *SMALL, *options, *where]) == 0
    plain = RunDirectory(root / "plain")
    for number in range(2):
        mine, theirs = (r.weights(number) for r in (run, plain))
        assert {k: (v.dtype, v.shape) for k, v in mine.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}
        assert not any("_orig_mod" in name for name in mine)
        records = [r.record(number) for r in (run, plain)]
        assert records[0]["blueprint"] == records[1]["blueprint"] is not None
        assert [r["curve"]["macs"] for r in records] == [records[1]["curve"]["macs"]] * 2
        assert [r["uncounted"] for r in records] == [{}, {}]
    assert load_file(run.teacher).keys() == load_file(plain.teacher).keys()
    assert run.read("teacher")["macs"] == plain.read("teacher")["macs"] > 5e5
    assert len(ProgressiveEnsemble.load(run.root)) == 2
    x = torch.randn(4, 3, 32, 32)
    assert ProgressiveEnsemble.load(run.root)(x).isfinite().all()


def test_the_model_is_compiled_and_channels_last(root):
    network = CifarResNet(8, [4, 4, 8, 8])
    options = {"channels_last": True, "compile": "aot_eager"}
    model = Distiller(TeacherSpec(network), lambda: CifarResNet(8, [2, 2, 4, 4]), **options)
    student = model.make_student(0)
    for module in (network, student):
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in module.parameters() if p.ndim == 4)
        assert module.body.stages[0](torch.randn(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
    names = list(student.state_dict())
    model.speed_up(student)
    assert student._compiled_call_impl is not None
    assert list(student.state_dict()) == names
    with as_written(student):
        assert student._compiled_call_impl is None
    assert student._compiled_call_impl is not None
    cost = measure_cost(student, (torch.randn(1, 3, 32, 32),))
    assert cost.macs == measure_cost(model.make_student(0), (torch.randn(1, 3, 32, 32),)).macs
    assert student._compiled_call_impl is not None
    unchanged = Distiller(TeacherSpec(network), lambda: student)
    unchanged.speed_up(plain := nn.Linear(2, 2))
    assert plain._compiled_call_impl is None


def test_the_width_of_a_rung_is_a_factor_on_that_of_the_recipe():
    model = Distiller(TeacherSpec(nn.Identity()), partial(ConvStudent, channels=[8, 16], width=0.5))
    sizes = [[p.shape for p in model.make_student(0, width).parameters()] for width in (1.0, 2.0)]
    assert sizes == [[p.shape for p in ConvStudent(channels).parameters()] for channels in ((4, 8), (8, 16))]


@pytest.mark.slow
def test_a_compiled_run_is_a_plain_run(fast, root, monkeypatch):
    """More compiled forms of one class than torch allows would fall back in silence; here that is an error."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    where = ["--data.root", str(root), "--run_dir", str(root / "compiled"), "--model.boosting.rounds", "4"]
    progress = ["--model.boosting.accept", "margin", "--model.boosting.margin_share", "0"]
    assert main(["fit", *SMALL, "--model.compile", "aot_eager", *progress, *where]) == 0
    compiled = RunDirectory(root / "compiled")
    assert compiled.committed() == 4
    for mine, theirs in (
        (compiled.weights(0), fast[0].weights(0)),
        (load_file(compiled.teacher), load_file(fast[0].teacher)),
    ):
        assert mine.keys() == theirs.keys()
    assert compiled.record(0)["blueprint"] == fast[0].record(0)["blueprint"]
    assert compiled.record(0)["curve"]["macs"] == fast[0].record(0)["curve"]["macs"]
    assert ProgressiveEnsemble.load(compiled.root)(torch.randn(4, 3, 32, 32)).isfinite().all()


def test_compiled_students_answer_as_plain_ones():
    model = Distiller(TeacherSpec(nn.Identity()), lambda: CifarResNet(8, [2, 2, 4, 4]), compile="aot_eager")
    student, x = model.make_student(0).eval(), torch.randn(2, 3, 16, 16)
    before = student(x)
    calls = []
    student.body.stages[0].register_forward_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    model.speed_up(student)
    assert torch.allclose(student(x), before, atol=1e-5)
    assert any(calls)


def test_a_backend_that_is_none():
    with pytest.raises(UserError, match=r"`model\.compile` to be one of .*inductor.*, got 'inducter'"):
        Distiller(TeacherSpec(nn.Identity()), nn.Identity, compile="inducter")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_of_another_type_are_refused(tmp_path, precision):
    with pytest.raises(UserError, match=rf"'32-true', '16-mixed' or 'bf16-mixed', got '{precision}'"):
        boost(tmp_path / "run", trainer={"precision": precision})
    assert not (tmp_path / "run" / "rounds" / "000").exists()


def test_mixed_precision_comes_near_float32(tmp_path):
    """The rms error of two rounds differs by less than a tenth, and is not the same: half precision was in use."""
    first, second = (
        float(boost(tmp_path / kind, settings=settings_for(2), trainer={"precision": kind}).run.rows()[2]["rms_error"])
        for kind in ("32-true", "bf16-mixed")
    )
    assert first != second
    assert second == pytest.approx(first, rel=0.1)


# ---- a missing teacher


def optimizer_of(spec):
    module = TeacherTraining(spec)
    module.trainer = make_trainer(epochs=spec.epochs)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    return optimizer, scheduler


def test_warm_up_and_cosine_by_the_formula():
    optimizer, scheduler = optimizer_of(TeacherSpec(nn.Linear(2, 2), epochs=10, lr=0.4, warmup=4))
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    climb = [0.4 * (epoch + 1) / 5 for epoch in range(4)]
    cosine = [0.2 * (1 + np.cos(np.pi * epoch / 6)) for epoch in range(6)]
    assert rates == pytest.approx([*climb, *cosine])


def test_kinds_of_optimizer():
    sgd, _ = optimizer_of(TeacherSpec(nn.Linear(2, 2), optimizer="sgd", lr=0.1, weight_decay=5e-4))
    assert type(sgd) is torch.optim.SGD
    assert {sgd.defaults[key] for key in ("momentum", "nesterov", "weight_decay", "lr")} == {0.9, True, 5e-4, 0.1}
    assert type(optimizer_of(TeacherSpec(nn.Linear(2, 2)))[0]) is torch.optim.AdamW


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_are_fused_where_no_scaler_is_in_the_way(precision, fused, kind):
    """A Trainer on the CPU takes no 16-mixed, hence what stands for one here."""
    module = TeacherTraining(TeacherSpec(nn.Linear(2, 2), optimizer=kind))
    trainer = SimpleNamespace(precision=precision, max_epochs=15, gradient_clip_val=None)
    module.trainer = trainer
    assert module.configure_optimizers()[0][0].defaults["fused"] is fused


def test_a_teachers_losses_are_float32_in_mixed_precision():
    """Labels such as 1000.5 are none of 16 bits."""
    network, x, y = nn.Linear(2, 1), torch.randn(8, 2), 1000.5 + torch.arange(8.0)
    training = TeacherTraining(TeacherSpec(network), "regression")
    with torch.autocast("cpu", torch.bfloat16):
        answers = network(x).float()
        loss = training.training_step((x, y, None), 0)
    assert torch.equal(loss, (answers[:, 0] - y).square().mean())


def test_label_smoothing_is_in_the_loss():
    network, x, y = make_teacher().eval(), torch.randn(8, FEATURES), torch.arange(8) % 3
    loss = TeacherTraining(TeacherSpec(network, label_smoothing=0.2)).training_step((x, y, None), 0)
    logs = network(x).log_softmax(1)
    expected = -(0.8 * logs[torch.arange(8), y] + 0.2 * logs.mean(1)).mean()
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("values", [{"warmup": 15}, {"warmup": -1}, {"label_smoothing": 1}])
def test_schedules_that_cannot_be(values):
    with pytest.raises(UserError, match=r"`warmup` in 0 … epochs - 1 and `label_smoothing`"):
        TeacherSpec(nn.Linear(2, 2), **values)
