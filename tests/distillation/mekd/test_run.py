"""A whole run of MEKD: what it asks, leaves and refuses, and where it goes on after a kill."""

import json
import os
import signal
from functools import partial

import lightning as L
import pytest
import torch
from helpers.mekd_toys import (
    CLASSES,
    HELD_OUT,
    LOCAL,
    SHAPE,
    SMALL,
    Local,
    Model,
    answer,
    emulate,
    images,
    make_student,
    teacher_of,
)
from helpers.toys import Hook, in_child, make_trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from bdistil import ApiTeacher, UserError
from bdistil.distillation.mekd.run import Emulation, Mekd
from bdistil.distillation.mekd.samples import (
    AnsweredSamples,
    GeneratedSamples,
    distinct_local,
    open_generated,
    repeated,
)


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


def test_local_samples_among_those_of_stage_two_and_the_rounds(run, tmp_path):
    model = Model()
    data = emulate(tmp_path, model, queries=80, gan_epochs=1, epochs=1, local_share=0.5, student=False).run(
        make_student
    )
    x, y = data.parts["train"].tensors
    local = images(LOCAL, 1)[0]
    used = 80 - 20 - HELD_OUT - LOCAL  # as many as generated ones: all local ones, some of them twice
    assert x.shape == (2 * used, *SHAPE)
    assert all((row == local).flatten(1).all(1).any() for row in x[-used:])
    assert not any((row == local).flatten(1).all(1).any() for row in x[:-used])
    assert torch.equal(y, torch.from_numpy(answer(x.numpy())).argmax(-1))
    assert len(set(model.asked)) == len(model.asked) <= 80
    opened = open_generated(tmp_path / "mekd", Local())
    assert all(
        torch.equal(a, b) for a, b in zip(data.parts["train"].tensors, opened.parts["train"].tensors, strict=True)
    )


def test_local_data_without_a_test_part_give_classes_as_well(run):
    class Untested(L.LightningDataModule):
        train_dataloader, val_dataloader = Local.train_dataloader, Local.val_dataloader

    x = images(8, 1)[0]
    data = GeneratedSamples((x, answer(x)), (x, answer(x)), 4, Untested())
    assert torch.equal(data.parts["train"].tensors[1], answer(x).argmax(-1))
    assert not is_overridden("test_dataloader", data, L.LightningDataModule)
    assert is_overridden("test_dataloader", run[2], L.LightningDataModule)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.75])
def test_local_samples_make_up_their_share(share):
    """Few of many, or all of them repeated; queries are spent on each once."""
    queries, local = 1000, images(LOCAL, 1)[0]
    distinct = distinct_local(queries, LOCAL, share)
    others = queries - distinct
    chosen = repeated(local[:distinct], others, share)
    assert len(chosen) / (len(chosen) + others) == pytest.approx(share, abs=0.001)
    assert len(chosen.flatten(1).unique(dim=0)) == distinct == min(LOCAL, round(1000 * share))


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
    with pytest.raises(UserError, match=r"those of stage 1 \(20\) and of the local samples \(8\), got 29"):
        emulate(tmp_path, queries=29)
    with pytest.raises(UserError, match=r"local samples \(9\), got 30"):
        emulate(tmp_path, queries=30, local_share=0.1)
    with pytest.raises(UserError, match=r"Expected `local_share` of MEKD in \[0, 1\), got 1"):
        Mekd(local_share=1.0)
    for wrong in ({"optimizer": "adam"}, {"tau": -1.0}, {"lr": 0.0}, {"kl": -1.0}, {"average": 2.0}, {"width": 1}):
        with pytest.raises(UserError, match=f"`{next(iter(wrong))}`.* of MEKD"):
            Mekd(**wrong)
    with pytest.raises(UserError, match="Expected `first_queries` < `queries`"):
        Mekd(queries=10, first_queries=10)
    with pytest.raises(UserError, match="Expected the teacher of MEKD to be an ApiTeacher, got Linear"):
        Emulation(Mekd(), nn.Linear(2, 2), Local(), tmp_path, make_trainer=make_trainer)
    few = ApiTeacher(Model(), CLASSES, tmp_path / "few.sqlite", budget=59)
    with pytest.raises(
        UserError, match=r"Expected `budget` of the ApiTeacher to be at least `queries` of MEKD \(60\), got 59"
    ):
        Emulation(Mekd(**SMALL), few, Local(), tmp_path / "mekd", make_trainer=make_trainer)
    assert not (tmp_path / "mekd").exists()
    with pytest.raises(UserError, match=r"The teacher gives L=3 outputs, the student L=2"):
        emulate(tmp_path).run(lambda _: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    assert not (tmp_path / "mekd" / "stage1").exists()


# ---- local data


class Alone(Dataset):
    """x without y."""

    def __init__(self, x, noise=0.0):
        self.x, self.noise = x, noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + self.noise * torch.randn(()) if self.noise else self.x[index]


class Parts(L.LightningDataModule):
    """Loaders of any kind."""

    def __init__(self, train, val):
        super().__init__()
        self.loaders = train, val

    def train_dataloader(self):
        return self.loaders[0]

    def val_dataloader(self):
        return self.loaders[1]


def emulation_of(folder, train, val, trainer=make_trainer, model=None, **settings):
    make = trainer
    return Emulation(
        Mekd(**{**SMALL, **settings}), teacher_of(folder, model or Model()), Parts(train, val), folder / "mekd",
        make_trainer=lambda max_epochs, callbacks, **options: make(*callbacks, epochs=max_epochs, **options),
    )  # fmt: skip


def loader_of(x, **options):
    return DataLoader(Alone(x), batch_size=8, **options)


def test_local_samples_may_be_x_alone(tmp_path):
    x, held_out = images(LOCAL, 1)[0], images(HELD_OUT, 2)[0]
    found = emulation_of(tmp_path, loader_of(x), loader_of(held_out))
    assert torch.equal(found.samples, x)
    assert torch.equal(found.held_out, held_out)
    mappings = DataLoader([{"x": x[0]}] * 4)
    with pytest.raises(UserError, match=r"to be x \(B, ...\), or to begin with it, got a dict"):
        emulation_of(tmp_path / "mapping", mappings, loader_of(held_out))


def test_samplers_choose_the_local_samples(tmp_path):
    x = images(40, 1)[0]
    train, val = (loader_of(x, sampler=SubsetRandomSampler(rows)) for rows in (range(30), range(30, 40)))
    found = emulation_of(tmp_path, train, val)
    assert torch.equal(found.samples, x[:30])
    assert torch.equal(found.held_out, x[30:])


def test_a_restart_with_another_split_is_refused_before_it_asks(tmp_path):
    x, model = images(40, 1)[0], Model()
    emulation_of(tmp_path, loader_of(x[:30]), loader_of(x[30:]))
    emulation_of(tmp_path, loader_of(x[:30]), loader_of(x[30:]))
    with pytest.raises(UserError, match=r"`train_dataloader\(\)` has another x than in the run.*seed it: random_split"):
        emulation_of(tmp_path, loader_of(x[10:]), loader_of(x[:10]), model=model)
    with pytest.raises(UserError, match=r"`val_dataloader\(\)` has another x than in the run"):
        emulation_of(tmp_path, loader_of(x[:30]), loader_of(x[20:30]), model=model)
    assert not model.asked


@pytest.mark.parametrize("part", ["train_dataloader", "val_dataloader"])
def test_local_samples_that_are_random_are_refused(tmp_path, part):
    x, model = images(LOCAL, 1)[0], Model()
    random = DataLoader(Alone(x, noise=0.1), batch_size=8)
    parts = (random, loader_of(x)) if part.startswith("train") else (loader_of(x), random)
    with pytest.raises(UserError, match=rf"`{part}\(\)` to be the same at each reading"):
        emulation_of(tmp_path, *parts, model=model)
    assert not model.asked


def test_one_held_out_sample_is_refused(tmp_path):
    x = images(LOCAL, 1)[0]
    with pytest.raises(UserError, match=r"`val_dataloader\(\)` to give two held-out samples or more.*got 1"):
        emulation_of(tmp_path, loader_of(x), loader_of(x[:1]))


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}], ids=str)
def test_a_trainer_that_does_not_validate_each_epoch_is_refused(tmp_path, options):
    x = images(LOCAL, 1)[0]
    run = emulation_of(tmp_path, loader_of(x), loader_of(x), trainer=partial(make_trainer, **options))
    with pytest.raises(UserError, match="to validate after each epoch"):
        run.run(make_student)
    assert not list((tmp_path / "mekd" / "stage1").glob("*.ckpt"))


def test_no_batch_has_one_sample(tmp_path):
    """Batch norm fails on it, after all queries are spent."""
    x = images(33, 1)[0]
    y = torch.zeros(33, CLASSES)
    for size, sizes in ((16, [16, 16]), (33, [33]), (32, [32]), (8, [8] * 4), (1, [1] * 33), (5, [5] * 6 + [3])):
        loader = AnsweredSamples((x, y), (x, y), size).train_dataloader()
        assert [len(batch[0]) for batch in loader] == sizes


# ---- restarts


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
