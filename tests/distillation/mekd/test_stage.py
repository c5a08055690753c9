"""The two stages of MEKD in fits of their own: what they learn and ask, and which epoch they keep."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.mekd_toys import CLASSES, LOCAL, SHAPE, Local, Model, answer, images, make_student, teacher_of, unsaved
from helpers.toys import Hook, logged, make_trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from bdistil import RunError, UserError
from bdistil.distillation.mekd import Deprivatization, MappingEmulation
from bdistil.distillation.mekd.networks import Discriminator, Generator
from bdistil.distillation.mekd.samples import AnsweredSamples
from bdistil.distillation.mekd.stage import StageKeeper, run_stage, show_samples

# ---- stage 1


def stage_one(folder, queries=20, hard=False, share=0.5, **options):
    teacher = teacher_of(folder, Model(hard))
    torch.manual_seed(0)
    networks = Generator(CLASSES, SHAPE, 4), Discriminator(SHAPE, 2)
    return Deprivatization(*networks, teacher, queries=queries, share=share, seed=3, **options)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_latents_are_drawn_once_and_their_answers_used_again(tmp_path, hard):
    stage = stage_one(tmp_path, hard=hard)
    unsaved(epochs=12).fit(stage, Local())
    # 12 epochs of 3 batches of 8 draw 288 times from 20 latents; each was asked about once.
    assert stage.teacher.queries == len(stage.teacher.ask.asked) == 20
    assert not stage.answers.isnan().any()
    assert torch.equal(stage.counts, stage.answers.argmax(-1).bincount(minlength=CLASSES).float())


def test_without_a_pool_every_step_asks(tmp_path):
    stage = stage_one(tmp_path, queries=None)
    unsaved(epochs=2).fit(stage, Local())
    assert stage.teacher.queries == 2 * LOCAL
    assert stage.counts.sum() == 2 * LOCAL


def test_each_network_learns_from_its_own_loss(tmp_path):
    stage = stage_one(tmp_path)
    before = {name: value.clone() for name, value in stage.named_parameters()}
    grads = []
    stage._step_before = stage._step

    def step(optimizer, loss_of):
        loss = stage._step_before(optimizer, loss_of)
        grads.append([p.requires_grad for p in stage.generator.parameters()])
        return loss

    stage._step = step
    unsaved(epochs=1).fit(stage, Local())
    moved = [not torch.equal(value, before[name]) for name, value in stage.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)
    assert all(all(flags) for flags in grads)  # nothing is left frozen


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_generator_that_is_kept_is_the_running_mean_of_its_weights(tmp_path, average):
    stage, expected = stage_one(tmp_path, average=average), []

    def follow(trainer, module, *_):
        now = torch.cat([p.detach().flatten() for p in stage.generator.parameters()])
        expected[:] = [average * expected[0] + (1 - average) * now if expected else now]

    unsaved(Hook(on_train_batch_end=follow), epochs=3).fit(stage, Local())
    kept = torch.cat([p.flatten() for p in stage.trained.parameters()])
    assert torch.allclose(kept, expected[0], atol=1e-6)
    last = torch.cat([p.flatten() for p in stage.generator.parameters()])
    assert torch.equal(kept, last) == (average == 0)
    z = torch.randn(4, CLASSES)
    stage.trained.eval()
    assert torch.equal(stage(z), stage.trained(z))


def test_losses_rates_and_distance_are_logged(tmp_path):
    logger = CSVLogger(tmp_path / "log", name="", version="")
    unsaved(epochs=2, logger=logger, log_every_n_steps=1).fit(stage_one(tmp_path), Local())
    rows = logged(tmp_path / "log")
    names = {key for row in rows for key, value in row.items() if value}
    assert {f"mekd/{n}" for n in ("discriminator_loss", "generator_loss", "teacher_weight", "distance", "lr")} <= names
    weights = [float(row["mekd/teacher_weight"]) for row in rows if row["mekd/teacher_weight"]]
    assert all(1 / CLASSES < weight <= 1 for weight in weights)  # a probability, and not a class


def test_the_generator_comes_nearer_to_held_out_samples(tmp_path):
    stage = stage_one(tmp_path, lr=5e-3)
    stage.generator.fit_range(images(LOCAL, 1)[0])
    seen = []
    look = Hook(on_validation_end=lambda trainer, _: seen.append(float(trainer.callback_metrics["mekd/distance"])))
    unsaved(look, epochs=30, num_sanity_val_steps=0).fit(stage, Local())
    assert min(seen[10:]) < 0.7 * seen[0]


# ---- stage 2


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("through", [True, False], ids=["images", "plain"])
def test_a_student_learns_the_teachers_answers(tmp_path, hard, through):
    x, held_out = images(160, 1)[0], images(60, 2)[0]
    teacher = teacher_of(tmp_path, Model(hard))
    data = AnsweredSamples((x, teacher(x)), (held_out, teacher(held_out)), 16)
    torch.manual_seed(0)
    generator = Generator(CLASSES, SHAPE, 4) if through else None
    options = {} if hard else {"mean": torch.zeros(CLASSES), "sd": torch.ones(CLASSES)}
    stage = MappingEmulation(make_student(), generator, hard=hard, **options)
    trainer = unsaved(epochs=4)
    trainer.fit(stage, data)
    assert float(trainer.callback_metrics["mekd/agreement"]) > 0.9
    assert float(trainer.callback_metrics["mekd/image_loss"] > 0) == through
    assert float(trainer.callback_metrics["mekd/lr"]) == pytest.approx(0.001)
    assert all(name.startswith("student.") for name in stage.state_dict())


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("through", [True, False], ids=["images", "plain"])
def test_figures_of_stage_two_are_those_of_the_arithmetic(hard, through):
    x, held_out = images(32, 1)[0], images(20, 2)[0]
    answers = [4 * torch.from_numpy(answer(part.numpy())) for part in (x, held_out)]
    generator = Generator(CLASSES, SHAPE, 4) if through else None
    stage = MappingEmulation(
        make_student(), generator, hard=hard, mean=torch.zeros(CLASSES), sd=torch.ones(CLASSES), lr=1e-4
    )
    labels, before, losses = answers[0].argmax(-1), stage.student(x).detach(), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            losses.append(float(outputs["loss"].detach()))

    trainer = unsaved(Look(), epochs=1)
    trainer.fit(stage, AnsweredSamples((x, answers[0]), (held_out, answers[1]), 32))
    figures = {name.removeprefix("mekd/"): float(value) for name, value in trainer.callback_metrics.items()}
    p, q = (answers[0] / 5).softmax(-1), (before / 5).softmax(-1)
    expected = F.cross_entropy(before, labels) if hard else 5 * (p * (p / q).log()).sum(-1).mean()
    assert figures["answer_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert losses == [pytest.approx(figures["image_loss"] + figures["answer_loss"], rel=1e-5)]
    after, target = stage.student(held_out).detach(), answers[1].argmax(-1) if hard else answers[1].softmax(-1)
    assert figures["val_loss"] == pytest.approx(float(F.cross_entropy(after, target)), rel=1e-4)
    assert generator is None or not generator.training  # its statistics stay


def test_the_agreement_comes_first_and_the_entropy_breaks_ties():
    stage = MappingEmulation(make_student(), None, hard=False)

    def score(agreement, entropy):
        return stage.score({"mekd/agreement": agreement, "mekd/val_loss": entropy})

    assert score(0.9, 50.0) < score(0.8, 0.1)
    assert score(0.9, 0.1) < score(0.9, 0.2)


@pytest.mark.parametrize(("optimizer", "rates"), [("sgd", [0.05, 0.005, 0.005]), ("adamw", [0.375, 0.125, 0.0])])
def test_the_rate_falls_step_by_step_and_is_logged(tmp_path, optimizer, rates):
    x = images(32, 1)[0]
    data = AnsweredSamples((x, torch.zeros(32, CLASSES)), (x, torch.zeros(32, CLASSES)), 16)
    stage = MappingEmulation(make_student(), None, hard=False, optimizer=optimizer, lr=0.5)
    seen = []
    look = Hook(on_train_batch_end=lambda trainer, *_: seen.append(trainer.optimizers[0].param_groups[0]["lr"]))
    logger = CSVLogger(tmp_path / "log", name="", version="")
    unsaved(look, epochs=3, logger=logger, log_every_n_steps=1).fit(stage, data)
    assert seen[1::2] == pytest.approx(rates)  # of 6 steps
    rows = [float(row["mekd/lr"]) for row in logged(tmp_path / "log") if row.get("mekd/lr")]
    assert rows == pytest.approx([sum(([0.5, *seen])[i : i + 2]) / 2 for i in (0, 2, 4)], abs=1e-6)


@pytest.mark.parametrize("values", [{"tau": 0}, {"kl": -1}, {"lr": 0}, {"mean": None}, {"optimizer": "adam"}], ids=str)
def test_arguments_of_stage_two_that_cannot_be(values):
    given = {"hard": False, "mean": torch.zeros(CLASSES), "sd": torch.ones(CLASSES), **values}
    with pytest.raises(UserError, match="Expected"):
        MappingEmulation(make_student(), Generator(CLASSES, SHAPE, 4), **given)


# ---- the best epoch


def test_the_best_epoch_is_kept_and_not_the_last(tmp_path):
    x = images(16, 1)[0]
    data = AnsweredSamples((x, torch.from_numpy(answer(x.numpy()))), (x, torch.from_numpy(answer(x.numpy()))), 8)
    stage, scores, weights = MappingEmulation(make_student(), None, hard=False), iter((3.0, 1.0, 2.0)), []
    stage.score = lambda metrics: next(scores)
    look = Hook(on_train_epoch_end=lambda *_: weights.append(stage.student[1].weight.detach().clone()))
    best = run_stage(
        stage, data, tmp_path / "stage2", epochs=3, seed=0,
        make_trainer=lambda max_epochs, callbacks, **o: make_trainer(look, *callbacks, epochs=max_epochs, **o),
    )  # fmt: skip
    assert best == {"epoch": 1, "score": 1.0, "epochs": 3}
    assert torch.equal(stage.student[1].weight, weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_stage_that_breaks_says_so_and_keeps_the_last_good_epoch(tmp_path):
    x = images(16, 1)[0]
    data = AnsweredSamples((x, torch.zeros(16, CLASSES)), (x, torch.zeros(16, CLASSES)), 8)
    stage, scores = MappingEmulation(make_student(), None, hard=False), iter((3.0, math.nan))
    stage.score = lambda metrics: next(scores)
    with pytest.raises(RunError, match="Epoch 1 of stage2 ended with NaN"):
        run_stage(
            stage, data, tmp_path / "stage2", epochs=3, seed=0,
            make_trainer=lambda max_epochs, callbacks, **o: make_trainer(*callbacks, epochs=max_epochs, **o),
        )  # fmt: skip
    assert (tmp_path / "stage2" / "best.safetensors").is_file()


# ---- pictures


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 8, 8), (73, 19)), ((3, 8, 8), (73, 19)), ((12, 3), (105, 9))], ids=str
)
def test_samples_in_one_picture(tmp_path, shape, size):
    show_samples(make_trainer(), torch.randn(16, *shape), tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == size
        assert [low for low, _ in picture.getextrema()] == [0, 0, 0]
        assert max(high for _, high in picture.getextrema()) == 255


def test_pictures_go_to_loggers_that_take_them(tmp_path):
    class Album(CSVLogger):
        def log_image(self, key, images, step):
            shown.append((key, images, step))

    shown = []
    stage = stage_one(tmp_path)
    keeper = StageKeeper(tmp_path, pictures=2)
    make_trainer(keeper, epochs=4, logger=Album(tmp_path)).fit(stage, Local())
    assert [key for key, _, _ in shown] == ["mekd/samples"] * 3  # epochs 0, 2 and the last
