"""Whole boosting runs on toy data: what holds in every round of one."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.toys import (
    BATCH,
    BODY,
    EPOCHS,
    HEAD,
    ROUNDS,
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
    kill,
    ledger,
    make_plain,
    make_student,
    make_teacher,
    make_trainer,
    samples,
    settings_for,
)
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file
from torch import nn

from bdistil import ProgressiveEnsemble, RunError, Rung, UserError
from bdistil.boosting import commit
from bdistil.boosting import part as scoring
from bdistil.boosting.commit import decide
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.run import Boosting
from bdistil.functional.boosting import margins

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


def test_what_is_logged_of_a_prefix_is_what_the_curve_says_of_it(tmp_path):
    """Two passes over the same samples, one batch by batch in the fit, one block by block at its end."""
    logged = []

    def look(trainer, module):
        logged.append([float(trainer.callback_metrics[name]) for name in ("val_accuracy", "val_loss", "val_rms")])

    boost(tmp_path, callbacks=lambda: [Hook(on_fit_end=look)])
    for values, row in zip(logged, curve(tmp_path)[1:], strict=True):
        assert values == pytest.approx([float(row[c]) for c in ("val_accuracy", "val_loss", "rms_error")], rel=1e-4)


# ---- the optimizer of a round


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("cosine", [0.4, 0.4 * (2 + 2**0.5) / 4, 0.2, 0.4 * (2 - 2**0.5) / 4]), ("constant", [0.4] * 4)],
)
def test_the_rates_of_a_round(schedule, rates):
    optimizer, schedulers = optimizer_of(settings_for(lr=0.4, weight_decay=0.03, schedule=schedule), epochs=4)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0.03
    found = []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler["scheduler"].step()
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)])
def test_steps_are_fused_where_no_scaler_is_in_the_way(precision, fused):
    assert optimizer_of(settings_for(), precision=precision)[0].defaults["fused"] is fused


def optimizer_of(settings, epochs=4, precision="32-true"):
    """What a round is trained with. A Trainer on the CPU takes no 16-mixed, hence what stands for one here."""
    part = SimpleNamespace(ledger=None)
    module = BoostingRound(
        make_student(0), number=0, settings=settings, earlier=[], train=part, val=part, run_dir=Path()
    )
    trainer = SimpleNamespace(max_epochs=epochs, max_steps=-1, precision=precision, gradient_clip_val=None)
    module.trainer = trainer
    made = module.configure_optimizers()
    return (made[0][0], made[1]) if isinstance(made, tuple) else (made, [])


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


def test_a_plain_student_among_others_is_shown_without_links(tmp_path):
    boost(tmp_path, student=lambda round: make_plain(round) if round == 1 else make_student(round))
    assert [row["accepted_class"] for row in curve(tmp_path)] == ["", "F0", "F0", "F1"]


def test_checks_before_a_run_draw_nothing(tmp_path):
    before = torch.get_rng_state()
    control(tmp_path).boosting.check(Toys())
    assert torch.equal(torch.get_rng_state(), before)


# ---- accept, widen, stop


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
    tried, weights = [], []

    def note(trainer, module):
        tried.append((module.number, module.student.links, trainer.current_epoch))
        weights.append(module.student.body[0].weight.detach().clone())

    options = {"settings": settings_for(accept="progress", min_progress=0.9)}
    controller = boost(tmp_path, callbacks=lambda: [Hook(on_train_start=note)], **options)
    # With one earlier student there is one to link to, however many a rung asks for; each try starts anew.
    assert tried == [(0, 0, 0), (1, 1, 0), (1, 1, 0)]
    assert not torch.equal(weights[1], weights[2])
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


def test_linked_activations_are_made_when_a_student_is_scored_and_never_again(tmp_path, monkeypatch):
    """A pass over the training part a round would not be seen in any figure."""
    monkeypatch.setattr(scoring, "activations_of", kill)
    assert len(boost(tmp_path).ensemble) == ROUNDS


def test_the_game_of_a_round_and_modes_that_stay(tmp_path):
    """The settings of the loss by hand; a module that the student keeps in eval mode stays so when it is scored."""
    games, modes, wanted = [], {}, ("eta", "population", "bound", "gamma", "kappa")

    def look(trainer, module):
        modes.setdefault(module.number, set()).add(tuple(part.training for part in module.student.modules()))

    def start(trainer, module):
        module.student.body[1].eval()
        games.append([getattr(module.game, name) for name in wanted])

    hooks = {"on_train_start": start, "on_train_batch_end": look, "on_fit_end": look}
    boost(tmp_path, settings=settings_for(2, kappa=0.5), callbacks=lambda: [Hook(**hooks)])
    bound = 2 * float(ledger(tmp_path, version=1)[0].abs().max())
    values = {"eta": 0.5, "population": TRAIN, "bound": bound, "gamma": 0.5 / (4 * bound * 0.5), "kappa": 0.5}
    assert [dict(zip(wanted, game, strict=True)) for game in games] == [pytest.approx(values)] * 2
    assert [len(found) for found in modes.values()] == [1, 1]
    assert not any(all(found) for found in modes[0])


def test_a_wider_student_is_built_and_shown(tmp_path, monkeypatch):
    def reject_the_first_try(settings, number, *evidence):
        if (number, controller.state.attempt) == (1, 0):
            return False, "not wanted"
        return decide(settings, number, *evidence)

    monkeypatch.setattr(commit, "decide", reject_the_first_try)
    ladder = [Rung(0), Rung(1), Rung(1, "residual", width=2)]
    controller = control(tmp_path, settings=settings_for(2, ladder=ladder))
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


# ---- another run in the same folder


def test_another_run_is_refused(tmp_path):
    boost(tmp_path, settings=settings_for(1))
    before = everything(tmp_path)

    def refused(match, datamodule=None, **options):
        with pytest.raises(UserError, match=match):
            boost(tmp_path, datamodule, **{"settings": settings_for(1), **options})
        assert everything(tmp_path) == before

    refused(r"another configuration(.|\n)*boosting\.eta: 0\.5 there, 0\.25 now", settings=settings_for(1, eta=0.25))
    refused(r"boosting\.ladder: ", settings=settings_for(1, ladder=[Rung(0), Rung(1)]))
    refused(r"seed: 0 there, 3 now", seed=3)
    refused(r"teacher's weights differ", teacher=make_teacher(seed=2))
    refused(r"training dataset has 160 samples.*started with\s+192", Toys(train=160))
    refused(r"validation dataset has 32 samples.*started with\s+64", Toys(val=32))
    boost(tmp_path, settings=settings_for(1))


class Shifted(nn.Module):
    """A teacher with a number and a function that are no weights."""

    def __init__(self, shift=0.0, function=torch.relu, noise=0.0):
        super().__init__()
        self.net, self.shift, self.function, self.noise = make_teacher(), shift, function, noise

    def forward(self, x):
        answers = self.function(self.net(x - self.shift))
        return answers + self.noise * torch.randn(answers.shape)


@pytest.mark.parametrize(
    ("options", "datamodule"),
    [({}, {}), ({"storage": "float16"}, {}), ({"views": 2}, {"noisy": True})],
    ids=["float32", "float16", "views"],
)
def test_a_teacher_of_the_same_weights_that_answers_otherwise_is_refused(tmp_path, options, datamodule):
    def run(rounds, teacher):
        return boost(tmp_path, Toys(**datamodule), settings=settings_for(rounds, **options), teacher=teacher)

    run(1, Shifted())
    before = everything(tmp_path)
    for teacher in (Shifted(shift=2.0), Shifted(function=F.gelu)):
        with pytest.raises(UserError, match=r"got one of the same weights whose answers differ by \d+% .*`run_dir`"):
            run(1, teacher)
        assert everything(tmp_path) == before
    run(2, Shifted(function=lambda x: torch.relu(x).bfloat16()))  # rounding, as of another device
    assert len(run(2, Shifted()).ensemble) == 2


def test_a_teacher_that_answers_at_random_is_not_compared(tmp_path):
    for rounds in (1, 2):
        assert len(boost(tmp_path, settings=settings_for(rounds), teacher=Shifted(noise=0.5)).ensemble) == rounds


def test_a_run_directory_that_was_emptied_is_begun_anew_by_the_same_controller(finished, tmp_path):
    """As in a notebook, where the cell of the loop is run again."""
    controller = boost(tmp_path)
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fit(controller)
    assert digests(tmp_path) == digests(finished.run_dir)


@pytest.mark.parametrize("accept", ["margin", "progress"])
def test_a_finished_run_goes_on_when_rounds_is_raised(tmp_path, accept):
    """It ends as a run of that many rounds from the start, in every file that does not hold times."""
    options = {"accept": accept, "min_progress": 0.0, "lr": 0.03}
    whole = boost(tmp_path / "whole", settings=settings_for(3, **options))
    boost(tmp_path / "run", settings=settings_for(2, **options))
    fits = []
    count = Hook(on_train_start=lambda trainer, module: fits.append(module.number))
    raised = boost(tmp_path / "run", settings=settings_for(3, **options), callbacks=lambda: [count])
    assert fits[0] == 2
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert curve(tmp_path / "run", without=TIMES) == curve(tmp_path / "whole", without=TIMES)
    assert (tmp_path / "run/config.yaml").read_text() == (tmp_path / "whole/config.yaml").read_text()
    assert raised.run.read("test") == whole.run.read("test")
    torch.testing.assert_close(ledger(tmp_path / "run"), ledger(tmp_path / "whole"), atol=0, rtol=0)
    before = digests(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"`rounds` of the boosting settings to be at least 3, as many as `run_dir` .* got 2"
    ):
        boost(tmp_path / "run", settings=settings_for(2, **options))
    assert digests(tmp_path / "run") == before


def test_rounds_that_are_raised_beside_another_setting_are_refused(tmp_path):
    boost(tmp_path, settings=settings_for(1))
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r"another configuration:\n  boosting\.eta: 0\.5 there, 0\.25 now\n"):
        boost(tmp_path, settings=settings_for(2, eta=0.25))
    assert everything(tmp_path) == before


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its config.yaml lacks settings that came later; they had the value that is the default now."""
    boost(tmp_path, settings=settings_for(1))
    config = tmp_path / "config.yaml"
    lines = config.read_text().splitlines()
    kept = [line for line in lines if "keep_epoch" not in line and "  at: 0" not in line]
    assert len(kept) == len(lines) - 1 - 3  # and one of each rung
    config.write_text("\n".join(kept))
    assert len(boost(tmp_path, settings=settings_for(2)).ensemble) == 2
    with pytest.raises(UserError, match=r"keep_epoch: 'last' there, 'best' now"):
        boost(tmp_path, settings=settings_for(2, keep_epoch="best"))


# ---- what is logged


def test_seconds_of_a_round_are_those_of_its_student(tmp_path, monkeypatch):
    """Without the pass of the teacher over all samples, for which the ledger of the first round is opened."""
    original = Boosting.open
    monkeypatch.setattr(Boosting, "open", lambda self, plan: (time.sleep(4), original(self, plan)))
    run = boost(tmp_path, settings=settings_for(1), trainer={"epochs": 1}).run
    assert 0 < run.rows()[1]["seconds"] < 4


def test_the_training_loss_is_logged_as_the_mean_over_samples(tmp_path):
    """Of the last epoch, by hand from the losses of its batches; the last of them is smaller than the others."""
    losses, logged = [], []

    class Loss(Hook):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append((trainer.current_epoch, float(outputs["loss"]), len(batch[0])))

    def look(trainer, module):
        logged.append(float(trainer.callback_metrics["train_loss"]))

    boost(tmp_path, Toys(train=TRAIN - 20), callbacks=lambda: [Loss(on_fit_end=look)], settings=settings_for(1))
    last = [(value, size) for epoch, value, size in losses if epoch == EPOCHS - 1]
    assert len({size for _, size in last}) == 2
    assert logged == pytest.approx([sum(value * size for value, size in last) / (TRAIN - 20)])


def test_a_round_may_be_stopped_by_its_training_loss(tmp_path):
    stopping = EarlyStopping("train_loss", patience=0, min_delta=1e6)
    controller = boost(tmp_path, callbacks=lambda: [stopping], settings=settings_for(1), trainer={"epochs": 9})
    assert controller.run.record(0)["epochs"] == 2


# ---- what a controller refuses


def test_a_checkpoint_of_another_round_is_refused(tmp_path):
    def keep(trainer, module):
        shutil.copy(controller.ckpt_path, tmp_path / "old.ckpt")

    controller, data = control(tmp_path / "run", student=make_plain), Toys()  # its weights would fit
    rounds = controller.rounds(data)
    make_trainer(Hook(on_train_end=keep), controller).fit(next(rounds), data)
    with pytest.raises(RunError, match=r"checkpoint of \(round, try\) \(1, 0\), got one of \(0, 0\)"):
        make_trainer(controller).fit(next(rounds), data, ckpt_path=tmp_path / "old.ckpt")
    assert list(digests(tmp_path / "run")) == ["000"]
