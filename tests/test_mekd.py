"""The two stages of MEKD in real fits: what they learn, what they ask, and where a restart goes on."""

import json
import math
import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Hook, in_child, logged, make_trainer

from bdistil import ApiTeacher, RunError, UserError
from bdistil.mekd import Deprivatization, MappingEmulation
from bdistil.mekd_data import AnsweredSamples, open_generated
from bdistil.mekd_networks import Discriminator, Generator
from bdistil.mekd_run import Emulation, Mekd, agreement_score
from bdistil.mekd_stage import StageKeeper, run_stage, sample_grid

CLASSES, SHAPE, LOCAL, HELD_OUT = 3, (1, 8, 8), 24, 8
SMALL = {"queries": 60, "first_queries": 20, "width": 4, "critic_width": 2, "gan_epochs": 2, "gan_batch_size": 8,
         "epochs": 2, "batch_size": 16}  # fmt: skip


def images(count, seed):
    """One bright stripe an image; its place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = 0.1 * torch.randn(count, *SHAPE, generator=generator)
    x[torch.arange(count), 0, 2 * labels + 1] += 1
    return x, labels


def answer(batch):
    """The model behind the API: how bright each stripe is, 8 times."""
    return 8 * batch.reshape(len(batch), 8, 8)[:, [1, 3, 5]].mean(-1)


class Local(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*images(LOCAL, 1)), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*images(HELD_OUT, 2)), batch_size=8)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*images(200, 3)), batch_size=100)


class Model:
    """Answers, and keeps count, on the disk too where the process may be killed."""

    name = "stripes"

    def __init__(self, hard=False, log=None, kill_at=None):
        self.hard, self.log, self.kill_at, self.asked = hard, log, kill_at, []

    def __call__(self, batch):
        self.asked += [row.tobytes() for row in batch]
        if self.kill_at is not None and len(self.asked) >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.writelines(f"{row.tobytes().hex()}\n" for row in batch)
        logits = answer(batch)
        return logits.argmax(-1) if self.hard else logits


def teacher_of(folder, model):
    kind = "labels" if model.hard else "logits"
    return ApiTeacher(model, CLASSES, folder / "answers.sqlite", answers=kind, batch_size=16)


def make_student(round=0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))


def emulate(folder, model=None, trainer=make_trainer, **settings):
    model = model or Model()
    settings = Mekd(**{**SMALL, **settings})
    return Emulation(
        settings, teacher_of(folder, model), Local(), folder / "mekd", seed=5,
        make_trainer=lambda max_epochs, callbacks, **options: trainer(*callbacks, epochs=max_epochs, **options),
    )  # fmt: skip


def unsaved(*callbacks, **options):
    return make_trainer(*callbacks, enable_checkpointing=False, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run; its folder, model, data and emulation."""
    folder = tmp_path_factory.mktemp("mekd")
    model = Model()
    emulation = emulate(folder, model)
    data = emulation.run(make_student)
    return folder, model, data, emulation


# ---- what a run asks and leaves


def test_the_queries_are_those_of_the_settings(run):
    _, model, _, emulation = run
    assert len(set(model.asked)) == len(model.asked) == emulation.teacher.queries <= 60
    assert emulation.pool == 60 - 20 - HELD_OUT
    # Latents of stage 1 are drawn by chance; those that were not drawn were not asked about.
    assert len(model.asked) >= HELD_OUT + emulation.pool + 10


def test_the_boosting_run_gets_generated_samples_with_the_teachers_class(run):
    folder, model, data, emulation = run
    (x, y), (held_out, answers) = data.parts["train"].tensors, data.parts["val"].tensors
    assert x.shape == (32, *SHAPE)
    assert torch.equal(y, torch.from_numpy(answer(x.numpy())).argmax(-1))
    assert torch.equal(held_out, images(HELD_OUT, 2)[0])
    assert torch.equal(answers, torch.from_numpy(answer(held_out.numpy())).argmax(-1))
    before = len(model.asked)
    emulation.teacher(x)  # as the run asks: to the bit what was asked before
    assert len(model.asked) == before
    opened = open_generated(folder / "mekd", Local())
    for part in ("train", "val"):
        for a, b in zip(data.parts[part].tensors, opened.parts[part].tensors, strict=True):
            assert torch.equal(a, b)
    data.setup("test")
    assert len(data.test_dataloader().dataset) == 200


def test_a_finished_run_asks_and_trains_nothing(run):
    folder, _, data, _ = run
    model = Model()

    def no_trainer(*args, **options):
        raise AssertionError("a finished stage needs no Trainer")

    again = emulate(folder, model, trainer=no_trainer).run(make_student)
    assert model.asked == []
    assert torch.equal(again.parts["train"].tensors[0], data.parts["train"].tensors[0])


def test_it_leaves_figures_and_a_picture(run):
    folder = run[0] / "mekd"
    assert (folder / "stage1" / "samples.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((folder / "stage1" / "done.json").read_text())["epoch"] in (0, 1)
    figures = json.loads((folder / "student.json").read_text())
    assert set(figures) == {"epoch", "queries", "test_accuracy"}
    assert not list(folder.rglob("*.ckpt"))


def test_other_settings_and_too_few_queries_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"with other settings \(width: 4 there, 8 now\)"):
        emulate(run[0], width=8)
    with pytest.raises(UserError, match=r"those of stage 1 \(20\) and the held-out samples \(8\), got 29"):
        emulate(tmp_path, queries=29)
    with pytest.raises(UserError, match="Expected `first_queries` < `queries`"):
        Mekd(queries=10, first_queries=10)
    with pytest.raises(UserError, match="Expected the teacher of MEKD to be an ApiTeacher, got Linear"):
        Emulation(Mekd(), nn.Linear(2, 2), Local(), tmp_path, make_trainer=make_trainer)
    with pytest.raises(UserError, match=r"The teacher gives L=3 outputs, the student L=2"):
        emulate(tmp_path).run(lambda _: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    assert not (tmp_path / "mekd" / "stage1").exists()


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


def test_the_agreement_comes_first_and_the_entropy_breaks_ties():
    def score(agreement, entropy):
        return agreement_score({"mekd/agreement": agreement, "mekd/val_loss": entropy})

    assert score(0.9, 50.0) < score(0.8, 0.1)
    assert score(0.9, 0.1) < score(0.9, 0.2)


@pytest.mark.parametrize("values", [{"tau": 0}, {"kl": -1}, {"lr": 0}, {"mean": None}], ids=str)
def test_arguments_of_stage_two_that_cannot_be(values):
    given = {"hard": False, "mean": torch.zeros(CLASSES), "sd": torch.ones(CLASSES), **values}
    with pytest.raises(UserError, match="Expected"):
        MappingEmulation(make_student(), Generator(CLASSES, SHAPE, 4), **given)


# ---- the best epoch, and restarts


def test_the_best_epoch_is_kept_and_not_the_last(tmp_path):
    x = images(16, 1)[0]
    data = AnsweredSamples((x, torch.from_numpy(answer(x.numpy()))), (x, torch.from_numpy(answer(x.numpy()))), 8)
    stage, scores, weights = MappingEmulation(make_student(), None, hard=False), iter((3.0, 1.0, 2.0)), []
    look = Hook(on_train_epoch_end=lambda *_: weights.append(stage.student[1].weight.detach().clone()))
    best = run_stage(
        stage, data, tmp_path / "stage2", epochs=3, seed=0, score=lambda figures: next(scores),
        make_trainer=lambda max_epochs, callbacks, **o: make_trainer(look, *callbacks, epochs=max_epochs, **o),
    )  # fmt: skip
    assert best == {"epoch": 1, "score": 1.0, "epochs": 3}
    assert torch.equal(stage.student[1].weight, weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_stage_that_breaks_says_so_and_keeps_the_last_good_epoch(tmp_path):
    x = images(16, 1)[0]
    data = AnsweredSamples((x, torch.zeros(16, CLASSES)), (x, torch.zeros(16, CLASSES)), 8)
    stage, scores = MappingEmulation(make_student(), None, hard=False), iter((3.0, math.nan))
    with pytest.raises(RunError, match="Epoch 1 of stage2 ended with NaN"):
        run_stage(
            stage, data, tmp_path / "stage2", epochs=3, seed=0, score=lambda figures: next(scores),
            make_trainer=lambda max_epochs, callbacks, **o: make_trainer(*callbacks, epochs=max_epochs, **o),
        )  # fmt: skip
    assert (tmp_path / "stage2" / "best.safetensors").is_file()


def killed_run(folder, kill_at, kill_epoch):
    """A run that is killed at a query, or at the start of an epoch of a stage."""

    def die(trainer, module):
        if (type(module).__name__, trainer.current_epoch) == kill_epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    model = Model(log=folder / "asked.txt", kill_at=kill_at)
    hook = Hook(on_train_batch_end=die)
    emulate(folder, model, trainer=lambda *c, **o: make_trainer(hook, *c, **o), gan_epochs=3, epochs=3).run(
        make_student
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "kill_epoch"),
    [(5, None), (45, None), (None, ("Deprivatization", 1)), (None, ("MappingEmulation", 1))],
    ids=["a query of stage 1", "a query of the pool", "stage 1", "stage 2"],
)
def test_a_killed_run_goes_on_to_the_same_result_and_asks_nothing_twice(tmp_path, kill_at, kill_epoch):
    (tmp_path / "whole").mkdir()
    whole = emulate(tmp_path / "whole", Model(), gan_epochs=3, epochs=3)
    whole.run(make_student)
    folder = tmp_path / "killed"
    folder.mkdir()
    assert in_child(tmp_path / "log", killed_run, folder, kill_at, kill_epoch) == -signal.SIGKILL
    before = teacher_of(folder, Model()).queries
    model = Model(log=folder / "asked.txt")
    again = emulate(folder, model, gan_epochs=3, epochs=3)
    again.run(make_student)
    asked = (folder / "asked.txt").read_text().split()
    assert len(set(asked)) == len(asked) == whole.teacher.queries
    assert again.teacher.queries >= before + len(model.asked)
    assert again.teacher.queries - whole.teacher.queries <= 16  # one request was under way, and may have been answered
    for name in ("stage1/best.safetensors", "stage2/best.safetensors", "samples.f32"):
        assert (folder / "mekd" / name).read_bytes() == (tmp_path / "whole" / "mekd" / name).read_bytes(), name


# ---- pictures


@pytest.mark.parametrize(
    ("shape", "picture"), [((1, 8, 8), (20, 80)), ((3, 8, 8), (20, 80, 3)), ((12, 3), (10, 112))], ids=str
)
def test_a_grid_of_samples(shape, picture):
    grid = sample_grid(torch.randn(17, *shape))
    assert grid.shape == picture
    assert (grid.min(), grid.max()) == (0, 1)


def test_pictures_go_to_loggers_that_take_them(tmp_path):
    class Album(CSVLogger):
        def log_image(self, key, images, step):
            shown.append((key, images, step))

    shown = []
    stage = stage_one(tmp_path)
    keeper = StageKeeper(tmp_path, lambda figures: figures["mekd/distance"], pictures=2)
    make_trainer(keeper, epochs=4, logger=Album(tmp_path)).fit(stage, Local())
    assert [key for key, _, _ in shown] == ["mekd/samples"] * 3  # epochs 0, 2 and the last
