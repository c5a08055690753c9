"""Whole boosting runs on toy data: what a script of five lines gets, and what holds in every round of it."""

import copy
import csv
import json
import math
import os
import re
import shutil
import signal
from itertools import pairwise
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler
from toys import (
    BATCH,
    CLASSES,
    FEATURES,
    TEST,
    TIMES,
    TRAIN,
    VAL,
    WIDTH,
    Hook,
    Toys,
    boost,
    by_hand,
    control,
    curve,
    digests,
    everything,
    fit,
    in_child,
    make_plain,
    make_student,
    make_teacher,
    make_trainer,
    samples,
    settings_for,
)
from wandb_offline import finished_runs

import bdistil.report
import bdistil.run_directory
from bdistil import BoostingSettings, ErrorLedger, ProgressiveEnsemble, RunError, Rung, UserError, round_state
from bdistil.boosting import Boosting
from bdistil.callbacks import ComputeCost, MetricCurves, RoundController, round_controller
from bdistil.cost import measure_cost
from bdistil.functional import margins
from bdistil.ledger import RoundEvidence
from bdistil.metrics import area_under_curve
from bdistil.run_directory import RunDirectory
from bdistil.tracking import Tracking, make_logger

ROUNDS, EPOCHS = 3, 2
BODY, HEAD, JOIN = FEATURES * WIDTH, WIDTH * CLASSES, WIDTH * CLASSES  # multiply-adds of the parts of a toy student
FIXED_COLUMNS = [
    "stage", "macs", "link_macs", "params", "train_macs", "val_accuracy", "val_loss", "test_accuracy", "latency_ms",
    "seconds", "accepted_class", "margin_share", "reason",
]  # fmt: skip


# What Lightning and torch say of its defaults: a logger in files, memory that is pinned for a GPU.
defaults = pytest.mark.filterwarnings("ignore:Starting from v1.9.0", "ignore:'pin_memory' argument is set as true")


class Killed(Exception):  # noqa: N818
    """Ends a run as a kill does: nothing of the library answers to it."""


def kill(*_, **__):
    raise Killed


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    """Pictures take as long as a whole run; one test has them drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_controller, "write_report", lambda run: run.report)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, with what was seen of it after each round."""
    run_dir, x = tmp_path_factory.mktemp("finished"), samples(VAL, 12)[0]
    seen = SimpleNamespace(run_dir=run_dir, x=x, weights=[], answers=[], curves=[])

    def look(trainer, module):
        seen.weights.append((run_dir / f"rounds/{module.number:03d}/student.safetensors").read_bytes())
        seen.answers.append(ProgressiveEnsemble.load(run_dir)(x))
        seen.curves.append(curve(run_dir))

    seen.controller = boost(run_dir, callbacks=lambda: [Hook(on_fit_end=look)])
    assert len(seen.answers) == ROUNDS
    return seen


def ledger(run_dir, part="train", version=ROUNDS, count=TRAIN):
    """g and S of all samples, as a run left them."""
    found = ErrorLedger(run_dir / "ledger" / part)
    found.open(count)
    found.use(version)
    return found.rows(torch.arange(count))


# ---- somebody's own script

SCRIPT = """
settings = BoostingSettings(rounds=6, eta=0.5, kappa=1.0)
controller = RoundController("runs/mine", teacher=teacher, student=make_student, settings=settings)
for round_module in controller.rounds(datamodule):
    trainer = L.Trainer(max_epochs=20, callbacks=[controller])
    trainer.fit(round_module, datamodule, ckpt_path=controller.ckpt_path)
ensemble = controller.ensemble
"""


class TheirData(Dataset):
    def __init__(self, count, seed):
        self.x, self.y = samples(count, seed)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


class TheirModule(L.LightningDataModule):
    def setup(self, stage):
        self.data = {"fit": TheirData(TRAIN, 11), "validate": TheirData(VAL, 12), "test": TheirData(TEST, 13)}

    def train_dataloader(self):
        return DataLoader(self.data["fit"], batch_size=64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data["validate"], batch_size=64)

    def test_dataloader(self):
        return DataLoader(self.data["test"], batch_size=64)


def from_datasets():
    return L.LightningDataModule.from_datasets(
        TheirData(TRAIN, 11), TheirData(VAL, 12), TheirData(TEST, 13), batch_size=64, num_workers=0
    )


def start(lightning=L, student=make_plain, datamodule=None):
    """Starts the script, in the working directory; gives its names."""
    names = {
        "L": lightning, "BoostingSettings": getattr(lightning, "settings", BoostingSettings),
        "RoundController": RoundController, "teacher": make_teacher(), "make_student": student,
        "datamodule": datamodule or TheirModule(),
    }  # fmt: skip
    exec(SCRIPT, names)
    return SimpleNamespace(**names)


class Short:
    """In place of `lightning`: two rounds that are accepted, of one epoch, in silence; breaks off at a round."""

    def __init__(self, stop_at=None, settings=lambda **given: settings_for(**{**given, "rounds": 2})):
        self.fits, self.stop_at, self.settings = 0, stop_at, settings

    def Trainer(self, max_epochs, callbacks):
        assert max_epochs == 20
        if self.fits == self.stop_at:
            raise Killed
        self.fits += 1
        return make_trainer(*callbacks, epochs=1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "mine"


@defaults
def test_the_script_of_five_lines(here, monkeypatch):
    monkeypatch.setattr(round_controller, "write_report", bdistil.report.write_report)
    names = start()
    stages = len(names.ensemble)
    assert stages >= 2
    assert stages == 6 or names.controller.run.stopped
    x, y = samples(TEST, 13)
    assert names.ensemble(x).shape == (TEST, CLASSES)
    assert [row["stage"] for row in curve(here)] == ["teacher", *map(str, range(1, stages + 1))]
    for name in ("curve.png", "report.html", "config.yaml"):
        assert (here / name).stat().st_size
    accuracy = (names.ensemble(x).argmax(-1) == y).double().mean()
    assert float(curve(here)[-1]["test_accuracy"]) == pytest.approx(float(accuracy))

    before, never = everything(here), Short(stop_at=0, settings=BoostingSettings)
    again = start(never)
    assert never.fits == 0
    assert torch.equal(again.ensemble(x), names.ensemble(x))
    assert {k: v for k, v in everything(here).items() if not k.startswith(("report", "curve.png"))} == {
        k: v for k, v in before.items() if not k.startswith(("report", "curve.png"))
    }


@defaults
@pytest.mark.parametrize("student", [make_plain, make_student])
@pytest.mark.parametrize("data", [TheirModule, from_datasets])
def test_the_script_goes_on_where_it_stopped(here, student, data):
    whole = start(Short(), student, data())
    wanted = digests(here)
    assert len(whole.ensemble) == len(wanted) == 2
    shutil.rmtree(here)
    with pytest.raises(Killed):
        start(Short(stop_at=1), student, data())
    assert digests(here) == {"000": wanted["000"]}
    rest = Short()
    start(rest, student, data())
    assert digests(here) == wanted
    assert rest.fits == 1
    tail = Short(stop_at=0)
    start(tail, student, data())
    assert tail.fits == 0


@defaults
def test_the_loaders_of_the_user_are_put_back(tmp_path):
    data = from_datasets()
    own = dict(vars(data))
    controller = control(tmp_path, student=make_plain)
    with pytest.raises(Killed):
        fit(controller, data, callbacks=lambda: [Hook(on_train_start=kill)])
    del controller
    assert {name: vars(data)[name] for name in own if name.endswith("dataloader")} == {
        name: value for name, value in own.items() if name.endswith("dataloader")
    }
    assert len(next(iter(data.train_dataloader()))) == 2


# ---- a committed stage never changes


def test_stages_are_bit_identical_after_later_rounds(finished):
    ensemble = ProgressiveEnsemble.load(finished.run_dir)
    for number in range(ROUNDS):
        file = finished.run_dir / f"rounds/{number:03d}/student.safetensors"
        assert file.read_bytes() == finished.weights[number]
        assert torch.equal(ensemble(finished.x, stages=number + 1), finished.answers[number])
        means = [value for name, value in load_file(file).items() if name.endswith("running_mean")]
        assert len(means) == 1
        assert means[0].abs().min() > 0, "batch norm has seen nothing"


def test_the_ensemble_is_the_same_with_and_without_make_student(finished):
    from_files, made = ProgressiveEnsemble.load(finished.run_dir), finished.controller.ensemble
    for stages in range(1, ROUNDS + 1):
        assert torch.equal(from_files(finished.x, stages), made(finished.x, stages))


# ---- teacher and earlier students are out of reach


@pytest.mark.parametrize("state", ["cached", "recompute"])
def test_only_the_student_is_trained(tmp_path, state):
    asked, checked = [], []
    teacher = make_teacher().train()
    teacher.register_forward_hook(lambda module, *_: asked.append((module.training, torch.is_grad_enabled())))
    controller = control(tmp_path, settings=settings_for(state=state), teacher=teacher)

    def frozen(trainer, module):
        hidden = [controller.boosting.teacher, *module.earlier]
        assert len(hidden) == 1 + module.number
        for part in (child for each in hidden for child in each.modules()):
            assert not part.training
        for parameter in (p for each in hidden for p in each.parameters()):
            assert not parameter.requires_grad
            assert parameter.grad is None
        assert [id(p) for p in module.parameters()] == [id(p) for p in module.student.parameters()]
        assert all(p.grad is not None for p in module.student.parameters())
        assert module.student.training
        checked.append(module.number)

    def saved(trainer, module):
        if trainer.current_epoch == 0:
            return
        state = torch.load(controller.ckpt_path, weights_only=True)
        assert set(state["state_dict"]) == {f"student.{name}" for name in module.student.state_dict()}
        groups = state["optimizer_states"][0]["param_groups"]
        assert sum(len(group["params"]) for group in groups) == len(list(module.student.parameters()))
        assert (tmp_path / f"work/{module.number:03d}/last.ckpt").stat().st_size < 40_000
        checked.append("saved")

    fit(controller, callbacks=lambda: [Hook(on_after_backward=frozen, on_train_epoch_start=saved)])
    steps = TRAIN // BATCH * EPOCHS
    assert [checked.count(number) for number in (0, 1, 2, "saved")] == [steps, steps, steps, ROUNDS]
    assert len(asked) > (ROUNDS * steps if state == "recompute" else 0)
    assert set(asked) == {(False, False)}
    for number in range(ROUNDS):
        folder = tmp_path / f"rounds/{number:03d}"
        names = set(make_student(0).link(controller.ensemble.students[:number], Rung(1)).state_dict())
        assert set(load_file(folder / "student.safetensors")) == names
        assert set(json.loads((folder / "round.json").read_text())["blueprint"]["modules"]) <= {"body", "head", "join"}


def test_a_plain_student_takes_no_links_and_is_told_once(tmp_path, caplog):
    controller = boost(tmp_path, student=make_plain)
    assert [row["accepted_class"] for row in curve(tmp_path)] == ["", "F0", "F0", "F0"]
    assert [row["link_macs"] for row in curve(tmp_path)] == ["0"] * 4
    assert len(controller.ensemble) == ROUNDS
    assert sum("takes no links" in message and "F0" in message for message in caplog.messages) == 1


# ---- accept, widen, stop


def decide(tmp_path, number, *, before=1.0, after=1.0, share=0.0, **settings):
    """The decision on evidence that speaks for the other verdict in the part that does not count."""
    boosting = Boosting(
        tmp_path / "none", teacher=make_teacher(), student=make_student, settings=BoostingSettings(**settings)
    )
    training = RoundEvidence(share, -1.0, before, before * 1.5 if after < before else before / 2, 9.0)
    validation = RoundEvidence(1 - share, -1.0, before, after, 9.0)
    return boosting.decide(number, training, validation)


@pytest.mark.parametrize(
    ("evidence", "settings", "accepted", "reason"),
    [
        ({"after": 0.98}, {"min_progress": 0.01}, True, "fell by more than 0.01: 1.0000 -> 0.9800"),
        ({"after": 0.98}, {"min_progress": 0.03}, False, r"did not fall by more than 0.03: 1.0000 -> 0.9800"),
        ({"after": 1.0}, {"min_progress": 0.0}, False, "did not fall"),
        ({"after": 2.0}, {}, False, "did not fall by more than 0.002: 1.0000 -> 2.0000"),
        ({"before": 0.0, "after": 0.0}, {}, False, "did not fall"),
        ({"share": 0.5}, {"accept": "margin", "margin_share": 0.5}, True, "50% of the outputs .* at least 50%"),
        ({"share": 0.25}, {"accept": "margin", "margin_share": 0.5}, False, "25% of the outputs .* less than 50%"),
    ],
)
def test_the_decision(tmp_path, evidence, settings, accepted, reason):
    verdict, why = decide(tmp_path, 1, **evidence, **settings)
    assert verdict is accepted
    assert re.search(reason, why)
    first, why = decide(tmp_path, 0, **evidence, **settings)
    assert first is True
    assert why == "the first round is always accepted"
    assert decide(tmp_path, 1, **evidence, **settings)[0] is accepted
    assert not list(tmp_path.iterdir()), "a decision writes nothing"


def test_margins_are_those_of_the_game(finished):
    truth = by_hand(ProgressiveEnsemble.load(finished.run_dir), make_teacher(), samples(TRAIN, 11)[0])
    error = torch.zeros_like(truth.g)
    bound = 2 * float(truth.g.abs().max())
    for number, student in enumerate(truth.students):
        found = margins(error.double(), (student - truth.g).double(), 0.5)
        row = finished.controller.run.record(number)["curve"]
        assert row["margin_min"] == pytest.approx(float(found.min()), abs=1e-5)
        assert row["margin_share"] == float((found >= -1e-3 * bound).double().mean())
        assert number == 0 or "of the outputs meet their margin" in row["reason"]
        error = error + (student - truth.g)


def test_a_round_that_makes_no_progress_climbs_the_ladder_and_stops(tmp_path, caplog):
    tried = []

    def note(trainer, module):
        tried.append((module.number, module.student.links, trainer.current_epoch))

    options = {"settings": settings_for(accept="progress", min_progress=0.9)}
    controller = boost(tmp_path, callbacks=lambda: [Hook(on_train_start=note)], **options)
    # With one earlier student there is one to link to, however many a rung asks for; each try starts anew.
    assert tried == [(0, 0, 0), (1, 1, 0), (1, 1, 0)]
    assert [part.name for part in sorted((tmp_path / "rounds").iterdir())] == ["000"]
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["round"] == 1
    assert "rms error to the teacher did not fall by more than 0.9" in stopped["reason"]
    assert [text.split(":")[0] for text in stopped["tries"]] == ["F1", "F2-hidden"]
    assert all("did not fall by more than 0.9" in text for text in stopped["tries"])
    assert sum("rejected" in message for message in caplog.messages) == 2
    assert "A wider class is tried." in caplog.text
    assert "Boosting stops." in caplog.text

    ensemble = controller.ensemble
    assert len(ensemble) == 1
    assert [row["stage"] for row in curve(tmp_path)] == ["teacher", "1"]
    assert curve(tmp_path)[1]["test_accuracy"]
    g, error = ledger(tmp_path, version=1)
    truth = by_hand(ensemble, make_teacher(), samples(TRAIN, 11)[0])
    torch.testing.assert_close(error, truth.students[0] - g, atol=1e-6, rtol=0)

    before = everything(tmp_path)
    boost(tmp_path, callbacks=lambda: [Hook(on_train_start=kill)], **options)
    assert everything(tmp_path) == before


def reject_first_try(controller, number):
    """Rejects the first try of a round, whatever speaks for it."""
    original = controller.boosting.decide

    def decide(round_number, training, validation):
        if (round_number, controller.boosting.attempt) == (number, 0):
            return False, "not wanted"
        return original(round_number, training, validation)

    controller.boosting.decide = decide
    return controller


def test_a_wider_student_is_built_and_shown(tmp_path):
    ladder = [Rung(0), Rung(1), Rung(1, "residual", width=2)]
    controller = reject_first_try(control(tmp_path, settings=settings_for(2, ladder=ladder)), 1)
    fit(controller)
    wide = controller.ensemble.students[1]
    assert wide.body[0].out_features == 2 * WIDTH
    assert wide.join.kind == "residual"
    record = controller.run.record(1)
    assert record["tries"] == ["F1: not wanted"]
    assert record["rung"]["width"] == 2
    _, first, second = curve(tmp_path)
    assert second["accepted_class"] == "F1-residual x2"
    link = WIDTH * 2 * WIDTH
    assert int(second["link_macs"]) == link
    assert int(second["macs"]) - int(first["macs"]) == 2 * (BODY + HEAD) + link
    assert not (tmp_path / "work/001").exists()


# ---- state of the game


def test_the_ledger_is_the_sum_of_errors(finished):
    ensemble = ProgressiveEnsemble.load(finished.run_dir)
    for part, count, seed in (("train", TRAIN, 11), ("val", VAL, 12)):
        truth = by_hand(ensemble, make_teacher(), samples(count, seed)[0])
        g, error = ledger(finished.run_dir, part, count=count)
        torch.testing.assert_close(g, truth.g, atol=1e-6, rtol=0)
        torch.testing.assert_close(error, truth.error, atol=5e-6, rtol=0)
        assert error.abs().max() > 0.1
        if part == "train":
            assert float(g.square().mean().sqrt()) == pytest.approx(1.0, abs=1e-5)
        else:
            row = finished.controller.run.record(ROUNDS - 1)["curve"]
            assert row["rms_error"] == pytest.approx(float(truth.error.square().mean().sqrt()) / ROUNDS, abs=1e-6)
            assert row["sup_error"] == pytest.approx(float(truth.error.abs().max()) / ROUNDS, abs=1e-5)


def test_recomputed_state_trains_the_same_students(finished, tmp_path):
    """Not to the bit: cached rows were scored in blocks of 512, recomputed ones are in batches of 32."""
    boost(tmp_path, settings=settings_for(state="recompute"))
    for number in range(ROUNDS):
        cached, recomputed = (
            load_file(folder / f"rounds/{number:03d}/student.safetensors") for folder in (finished.run_dir, tmp_path)
        )
        assert cached.keys() == recomputed.keys()
        for name, value in cached.items():
            torch.testing.assert_close(recomputed[name], value, atol=1e-6, rtol=1e-5)


def test_random_augmentation_asks_for_recomputed_state(tmp_path):
    with pytest.raises(UserError, match=r"random augmentation.*BoostingSettings\(state='recompute'\)"):
        boost(tmp_path, Toys(noisy=True))
    assert not digests(tmp_path)
    # As the message says, in the same folder.
    assert len(boost(tmp_path, Toys(noisy=True), settings=settings_for(state="recompute")).ensemble) == ROUNDS


def test_recomputed_state_is_that_of_the_x_it_is_given(tmp_path):
    seen, teacher = [], make_teacher()

    def compare(trainer, module):
        if not module.number:
            return
        x = torch.randn(BATCH, FEATURES)
        g, error = module.state(x, torch.arange(BATCH).numpy())
        truth = by_hand(controller.ensemble, teacher, x)
        torch.testing.assert_close(g, truth.g, atol=1e-6, rtol=0)
        torch.testing.assert_close(error, truth.error, atol=5e-6, rtol=0)
        seen.append(len(truth.students))

    controller = control(tmp_path, settings=settings_for(state="recompute"), teacher=teacher)
    fit(controller, Toys(noisy=True), callbacks=lambda: [Hook(on_train_start=compare)])
    assert seen == [1, 2]


# ---- killed and started again


def script(run_dir, point=None):
    """A run of a process of its own that kills itself at a point."""
    controller = control(run_dir)

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def in_epoch(trainer, module):
        if point == "epoch" and (module.number, trainer.current_epoch, trainer.global_step % 6) == (1, 2, 3):
            die()

    if point == "commit":
        commit = controller.run.commit
        controller.run.commit = lambda number, *args: die() if number == 1 else commit(number, *args)
    fit(controller, callbacks=lambda: [Hook(on_train_batch_start=in_epoch)], epochs=3)


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = boost(tmp_path / "whole", trainer={"epochs": 3})
    wanted = digests(tmp_path / "whole")
    assert len(wanted) == ROUNDS
    for point in ("epoch", "commit"):
        run_dir, log = tmp_path / point, tmp_path / f"{point}.log"
        assert in_child(log, script, run_dir, point) == -signal.SIGKILL, log.read_text()
        assert list(digests(run_dir)) == ["000"]
        done = torch.load(run_dir / "work/001/last.ckpt", weights_only=True)["epoch"]
        assert done == {"epoch": 1, "commit": 2}[point]
        assert (run_dir / "ledger/train/error.002.f32").exists() is (point == "commit")
        assert in_child(log, script, run_dir) == 0, log.read_text()
        assert digests(run_dir) == wanted
        assert curve(run_dir, without=TIMES) == curve(tmp_path / "whole", without=TIMES)
        torch.testing.assert_close(ledger(run_dir), ledger(tmp_path / "whole"), atol=0, rtol=0)
    assert whole.run.record(1)["epochs"] == 3


class Weighted(Toys):
    """A sampler of the user, which is kept as it is."""

    def train_dataloader(self):
        sampler = WeightedRandomSampler(torch.linspace(0.5, 1.5, TRAIN), TRAIN)
        return DataLoader(TensorDataset(*self.parts["train"]), batch_size=BATCH, sampler=sampler)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (Toys, {}),
        (Weighted, {}),
        (lambda: Toys(noisy=True), {"state": "recompute"}),
        (lambda: Toys(noisy=True, workers=1), {"state": "recompute"}),
    ],
    ids=["shuffled", "weighted", "noisy", "noisy in a worker"],
)
def test_a_round_goes_on_from_its_last_saved_epoch(tmp_path, monkeypatch, data, settings):
    options = {"settings": settings_for(2, **settings), "trainer": {"epochs": 3}}
    boost(tmp_path / "whole", data(), **options)

    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 2):
            raise Killed

    epochs = []
    note = Hook(on_train_epoch_start=lambda trainer, module: epochs.append((module.number, trainer.current_epoch)))
    for share, rest in ((math.inf, [(1, 2)]), (1e-9, [(1, 1), (1, 2)])):  # each epoch is saved, or the first and last
        monkeypatch.setattr(round_state, "SAVE_SHARE", share)
        run_dir = tmp_path / str(share)
        with pytest.raises(Killed):
            boost(run_dir, data(), callbacks=lambda: [Hook(on_train_epoch_start=stop)], **options)
        epochs.clear()
        boost(run_dir, data(), callbacks=lambda: [note], **options)
        assert epochs == rest
        assert digests(run_dir) == digests(tmp_path / "whole")


@pytest.mark.parametrize("early", [False, True], ids=["all epochs", "stopped early"])
def test_a_round_that_had_ended_is_committed_without_training(tmp_path, early):
    def stop_early(trainer, module):
        trainer.should_stop = early

    def fail(trainer, module):
        if module.number == 1:
            raise Killed

    boost(tmp_path / "whole", callbacks=lambda: [Hook(on_train_epoch_end=stop_early)])
    with pytest.raises(Killed):
        boost(tmp_path / "torn", callbacks=lambda: [Hook(on_train_epoch_end=stop_early, on_train_end=fail)])
    assert list(digests(tmp_path / "torn")) == ["000"]
    steps = []
    note = {"on_train_batch_start": lambda trainer, module: steps.append(module.number)}
    boost(tmp_path / "torn", callbacks=lambda: [Hook(on_train_epoch_end=stop_early, **note)])
    assert set(steps) == {2}
    assert digests(tmp_path / "torn") == digests(tmp_path / "whole")
    assert curve(tmp_path / "torn", without=TIMES) == curve(tmp_path / "whole", without=TIMES)
    assert RunDirectory(tmp_path / "torn").record(1)["epochs"] == (1 if early else 2)


@pytest.fixture
def killed_once(monkeypatch):
    """Makes a function raise before or after its work, at one of its calls."""

    def arm(owner, name, *, when=lambda *_: True, after=False):
        original, armed = getattr(owner, name), [True]

        def once(*args, **kwargs):
            if armed and when(*args):
                armed.clear()
                if after:
                    original(*args, **kwargs)
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, once)

    return arm


@pytest.mark.parametrize(
    ("point", "after"),
    [("commit", True), ("write_curve", False), ("keep_teacher", False), ("keep_test", False), ("keep_test", True)],
)
def test_a_kill_between_two_files_costs_nothing(finished, tmp_path, killed_once, point, after):
    # At the commit of the last round, as no later one mends what it leaves.
    last = {"commit": lambda run, number, *_: number == ROUNDS - 1, "write_curve": lambda run, rows: len(rows) > ROUNDS}
    killed_once(RunDirectory, point, when=last.get(point, lambda *_: True), after=after)
    with pytest.raises(Killed):
        boost(tmp_path)
    boost(tmp_path)
    assert digests(tmp_path) == digests(finished.run_dir)
    assert curve(tmp_path, without=TIMES) == curve(finished.run_dir, without=TIMES)


class Untested(L.LightningDataModule):
    """Has no test part."""

    train_dataloader, val_dataloader = Toys.train_dataloader, Toys.val_dataloader

    def __init__(self):
        super().__init__()
        vars(self).update({name: vars(Toys())[name] for name in ("parts", "noisy", "workers")})


def test_a_kill_before_the_last_row_of_the_curve_costs_nothing_without_a_test_part(tmp_path, killed_once):
    killed_once(RunDirectory, "write_curve", when=lambda run, rows: len(rows) > ROUNDS)
    with pytest.raises(Killed):
        boost(tmp_path, Untested())
    boost(tmp_path, Untested())
    assert [row["stage"] for row in curve(tmp_path)] == ["teacher", "1", "2", "3"]


@pytest.mark.parametrize(
    ("owner", "name", "when", "after"),
    [
        (bdistil.run_directory, "write_atomically", lambda path, text: path.name == "rejected.json", True),
        (RunDirectory, "reject", lambda *_: True, True),
        (RunDirectory, "stop", lambda *_: True, False),
    ],
    ids=["in a rejection", "after a rejection", "before the stop"],
)
def test_a_kill_around_a_rejection_costs_nothing(tmp_path, killed_once, owner, name, when, after):
    options = {"settings": settings_for(2, accept="progress", min_progress=0.9)}
    killed_once(owner, name, when=when, after=after)
    with pytest.raises(Killed):
        boost(tmp_path, **options)
    assert len(boost(tmp_path, **options).ensemble) == 1
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert [text.split(":")[0] for text in stopped["tries"]] == ["F1", "F2-hidden"]


# ---- another run in the same folder


def test_another_run_is_refused(tmp_path):
    boost(tmp_path, settings=settings_for(1))
    before = everything(tmp_path)

    def refused(match, datamodule=None, **options):
        with pytest.raises(UserError, match=match):
            boost(tmp_path, datamodule, **{"settings": settings_for(1), **options})
        assert everything(tmp_path) == before

    refused(r"another configuration(.|\n)*boosting\.eta: 0\.5 there, 0\.25 now", settings=settings_for(1, eta=0.25))
    refused(r"boosting\.rounds: 1 there, 4 now", settings=settings_for(4))
    refused(r"boosting\.ladder: ", settings=settings_for(1, ladder=[Rung(0), Rung(1)]))
    refused(r"seed: 0 there, 3 now", seed=3)
    refused(r"teacher's weights differ", teacher=make_teacher(seed=2))
    refused(r"training dataset has 160 samples.*started with\s+192", Toys(train=160))
    refused(r"validation dataset has 32 samples.*started with\s+64", Toys(val=32))
    boost(tmp_path, settings=settings_for(1))


# ---- the curve


def test_the_curve(finished):
    with open(finished.run_dir / "curve.csv", newline="") as file:
        assert next(csv.reader(file))[: len(FIXED_COLUMNS)] == FIXED_COLUMNS
    teacher, *rows = curve(finished.run_dir)
    ensemble = finished.controller.ensemble

    macs = FEATURES * 24 + 24 * CLASSES
    assert teacher["stage"] == "teacher"
    assert [int(teacher[name]) for name in ("macs", "link_macs", "train_macs")] == [macs, 0, macs * (TRAIN + VAL)]
    assert int(teacher["params"]) == sum(p.numel() for p in make_teacher().parameters())
    assert [row["stage"] for row in rows] == ["1", "2", "3"]
    assert [row["accepted_class"] for row in rows] == ["F0", "F1", "F1"]

    own = [BODY + HEAD, BODY + HEAD + JOIN, BODY + HEAD + JOIN]
    total = [sum(own[: stage + 1]) for stage in range(ROUNDS)]
    assert [int(row["macs"]) for row in rows] == total == ensemble.macs
    assert measure_cost(ensemble, (finished.x[:1],)).macs == total[-1]
    assert [int(row["link_macs"]) for row in rows] == [0, JOIN, JOIN]
    params = [sum(p.numel() for p in student.parameters()) for student in ensemble.students]
    assert [int(row["params"]) for row in rows] == [sum(params[: stage + 1]) for stage in range(ROUNDS)]
    # Three forward passes a step; what is linked to comes from a cache.
    assert [int(row["train_macs"]) for row in rows] == [3 * each * TRAIN * EPOCHS for each in own]

    for part, count, seed, name in (("val", VAL, 12, "val_accuracy"), ("test", TEST, 13, "test_accuracy")):
        x, y = samples(count, seed)
        right = [float((ensemble(x, stage).argmax(-1) == y).double().mean()) for stage in (1, 2, 3)]
        assert [float(row[name]) for row in rows] == pytest.approx(right, abs=1e-5), part
        answers = make_teacher().eval()(x).argmax(-1)
        assert float(teacher[name]) == pytest.approx(float((answers == y).double().mean()), abs=1e-5)
    x, y = samples(VAL, 12)
    g = make_teacher().eval()(x)
    loss = [nn.functional.cross_entropy(ensemble(x, stage), y).item() for stage in (1, 2, 3)]
    assert [float(row["val_loss"]) for row in rows] == pytest.approx(loss, rel=1e-4)
    assert float(teacher["val_loss"]) == pytest.approx(nn.functional.cross_entropy(g, y).item(), rel=1e-4)

    accuracy = [float(row["val_accuracy"]) for row in rows]
    assert float(rows[-1]["area"]) == pytest.approx(area_under_curve(total, accuracy), abs=1e-5)
    assert float(rows[-1]["violations"]) == sum(b < a for a, b in pairwise(accuracy))
    assert all(float(row["seconds"]) > 0 and float(row["latency_ms"]) > 0 for row in rows)


def test_the_test_part_is_read_at_the_end(finished):
    for number, early in enumerate(finished.curves):
        assert [row["stage"] for row in early] == ["teacher", *"123"[: number + 1]]
        assert not any(row["test_accuracy"] for row in early)
    assert all(row["test_accuracy"] for row in curve(finished.run_dir))


def test_recomputed_state_costs_what_it_runs(tmp_path):
    boost(tmp_path, settings=settings_for(2, state="recompute"))
    teacher, _, second = curve(tmp_path)
    # A step runs the student three times, the first student for S, its body for the link, and the teacher.
    a_sample = 3 * (BODY + HEAD + JOIN) + (BODY + HEAD) + BODY + int(teacher["macs"])
    assert int(second["train_macs"]) == a_sample * TRAIN * EPOCHS


class Foreign(L.LightningModule):
    """Somebody's classifier, which knows nothing of bdistil."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def logged(folder):
    """Rows of the metrics that a CSVLogger wrote."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_cost_and_curve_on_a_foreign_module(tmp_path):
    curves, points = MetricCurves(metric="accuracy", tolerance=0.0), []
    logger = CSVLogger(tmp_path, name="", version="")
    for width in (4, 16):
        torch.manual_seed(width)
        trainer = make_trainer(ComputeCost(), curves, logger=logger, enable_checkpointing=False)
        trainer.fit(Foreign(width), Toys())
        points.append((width * (FEATURES + CLASSES), float(trainer.callback_metrics["accuracy"])))
    assert curves.points == points
    rows = [row for row in logged(tmp_path) if row["curve/area"]]
    areas = [points[0][1], area_under_curve(*zip(*points, strict=True))]
    assert [float(row["curve/area"]) for row in rows] == pytest.approx(areas)
    falls = float(points[1][1] < points[0][1])
    assert [float(row["curve/violations"]) for row in rows] == [0.0, falls]
    other = MetricCurves(metric="accuracy")
    other.load_state_dict(copy.deepcopy(curves.state_dict()))
    assert other.points == points
    assert other.add(10_000, 0.0)["violations"] == falls + 1


def test_a_metric_that_was_not_logged_is_named(tmp_path):
    trainer = make_trainer(ComputeCost(), MetricCurves(), epochs=1, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"no metric 'val_accuracy'; logged were .*'accuracy'"):
        trainer.fit(Foreign(4), Toys())


# ---- beside other callbacks and loggers


def test_callbacks_of_the_user_are_fresh_in_each_round(tmp_path):
    made = []

    def theirs():
        made.append((EarlyStopping("val_rms", patience=0, min_delta=1e6), LearningRateMonitor(),
                     ModelCheckpoint(tmp_path / f"own/{len(made)}", monitor="val_rms", save_last=True)))  # fmt: skip
        return made[-1]

    logger = CSVLogger(tmp_path / "log", name="", version="")
    controller = boost(tmp_path / "run", callbacks=theirs, trainer={"epochs": 5, "logger": logger})
    assert len(made) == ROUNDS
    assert [controller.run.record(number)["epochs"] for number in range(ROUNDS)] == [2] * ROUNDS
    for number, (stopping, _, checkpoint) in enumerate(made):
        assert (stopping.stopped_epoch, stopping.wait_count) == (1, 1)
        assert checkpoint.best_model_path.startswith(str(tmp_path / f"own/{number}"))
        assert (tmp_path / f"own/{number}/last.ckpt").exists()
        state = torch.load(checkpoint.last_model_path, weights_only=True)
        assert all(name.startswith("student.") for name in state["state_dict"])
    rates = [float(row["lr-AdamW"]) for row in logged(tmp_path / "log") if row["lr-AdamW"]]
    assert rates == rates[:2] * ROUNDS  # the schedule starts anew
    assert rates[0] == 0.01 > rates[1]


def test_the_step_of_a_shared_logger_is_monotone(tmp_path):
    logger = CSVLogger(tmp_path / "log", name="", version="")
    boost(tmp_path / "run", trainer={"logger": logger, "log_every_n_steps": 1})
    rows = logged(tmp_path / "log")
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    a_round = TRAIN // BATCH * EPOCHS
    assert [int(row["step"]) for row in rows if row["round"]] == [a_round * number for number in (1, 2, 3)]
    last_of_epoch = [int(row["step"]) for row in rows if row["val_accuracy"]]
    assert last_of_epoch == [a_round // 2 * epoch - 1 for epoch in range(1, 7)]


def test_the_step_goes_on_after_a_restart(tmp_path):
    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 1):
            raise Killed

    def note():
        return CSVLogger(tmp_path / "log", name="", version=None)

    with pytest.raises(Killed):
        boost(tmp_path / "run", callbacks=lambda: [Hook(on_train_epoch_start=stop)], trainer={"logger": note()})
    boost(tmp_path / "run", trainer={"logger": note()})
    rows = logged(tmp_path / "log/version_1")
    assert [(float(row["round"]), int(row["step"])) for row in rows if row["round"]] == [(1, 12), (2, 24), (3, 36)]
    assert [int(row["step"]) for row in rows if row["val_accuracy"]] == [23, 29, 35]


@pytest.fixture
def wandb_alone(tmp_path, monkeypatch):
    """No settings of W&B but those of the test."""
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def test_all_rounds_are_one_run_of_wandb(wandb_alone, tmp_path):
    run_dir, config = tmp_path / "run", {"model": {"boosting": {"rounds": ROUNDS}}, "seed": 0}
    about = {"project": "mine", "group": "toys", "name": "toys-0", "tags": ["toy", "mlp"]}
    logger = make_logger(Tracking(mode="offline", **about), run_dir, config)
    boost(run_dir, trainer={"logger": logger}, config=config).tracker.close()
    (seen,) = finished_runs(tmp_path)
    assert seen.exit_code == 0
    assert {key: seen.config[key] for key in config} == config
    assert (seen.run["run_group"], seen.run["tags"], seen.run["name"]) == ("toys", ["toy", "mlp"], "toys-0")

    rows, teacher = [row for row in seen.history if "round" in row], curve(run_dir)[0]
    assert [row["round"] for row in rows] == [1, 2, 3]
    written = [row for row in curve(run_dir) if row["stage"] != "teacher"]
    assert [row["round/macs"] for row in rows] == [float(row["macs"]) for row in written]
    accuracy = [row["round/val_accuracy"] for row in rows]
    assert accuracy == pytest.approx([float(row["val_accuracy"]) for row in written], abs=1e-5)
    steps = [row["trainer/global_step"] for row in seen.history if "trainer/global_step" in row]
    assert steps == sorted(steps)

    students = [artifact for artifact in seen.artifacts if artifact["type"] == "student"]
    assert [artifact["aliases"] for artifact in students] == [{f"round-{n}", "latest"} for n in (1, 2, 3)]
    for number, artifact in enumerate(students):
        assert set(artifact["files"]) == {"round.json", "student.safetensors"}
        assert artifact["metadata"]["macs"] == int(written[number]["macs"])

    (shown,) = [row for row in seen.history if "curve/path" in row]
    table = json.loads(next(tmp_path.rglob("files/" + shown["curve/path"])).read_text())
    assert [row[0] for row in table["data"]] == ["teacher", "1", "2", "3"]
    assert table["data"][0][table["columns"].index("macs")] == float(teacher["macs"])
    assert all(row[table["columns"].index("test_accuracy")] is not None for row in table["data"])
    assert seen.config["_wandb/visualize/accuracy_vs_macs"]["panel_config"]["fieldSettings"]["x"] == "macs"


# ---- what a controller refuses


def test_a_checkpoint_of_another_round_is_refused(tmp_path):
    def keep(trainer, module):
        shutil.copy(controller.ckpt_path, tmp_path / "old.ckpt")

    controller, data = control(tmp_path / "run", student=make_plain), Toys()  # its weights would fit
    rounds = controller.rounds(data)
    make_trainer(Hook(on_train_end=keep), controller).fit(next(rounds), data)
    with pytest.raises(RunError, match=r"checkpoint of \(round, try\) \(0, 0\) was offered to \(1, 0\)"):
        make_trainer(controller).fit(next(rounds), data, ckpt_path=tmp_path / "old.ckpt")
    assert list(digests(tmp_path / "run")) == ["000"]
