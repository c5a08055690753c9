"""What a user can get wrong, and what a disk can: one message that says what is the matter, and nothing is lost."""

import lightning as L
import numpy as np
import pytest
import torch
from helpers.toys import (
    CLASSES,
    FEATURES,
    TRAIN,
    VAL,
    WIDTH,
    Hook,
    Items,
    Stream,
    Toys,
    boost,
    control,
    digests,
    everything,
    make_plain,
    make_student,
    make_trainer,
    samples,
    settings_for,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import BoostingSettings, ErrorLedger, ProgressiveEnsemble, RunError, Rung, Student, UserError
from bdistil.boosting import round as rounds


@pytest.fixture
def refused(tmp_path):
    """A whole run fails before its first step, with a message."""

    def refuse(error, match, datamodule=None, **options):
        steps = []
        count = Hook(on_train_batch_end=lambda *_: steps.append(1))
        with pytest.raises(error, match=match):
            boost(tmp_path / "run", datamodule, callbacks=lambda: [count], **options)
        assert not steps
        assert not digests(tmp_path / "run")

    return refuse


# ---- teacher and student


def test_different_numbers_of_outputs(refused):
    refused(
        UserError,
        r"teacher gives L=4 outputs, the student L=5\. Give the student a head of 4 outputs",
        student=lambda round: nn.Linear(FEATURES, 5),
    )


@pytest.mark.parametrize(
    ("who", "shape"), [("teacher", (2, 2, 2)), ("student", (2, 2, 2)), ("student", (8,)), ("student", (1, 8))]
)
def test_logits_of_another_shape(refused, who, shape):
    class Folded(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:2].reshape(shape)

    wrong = {"teacher": Folded(FEATURES, CLASSES)} if who == "teacher" else {"student": lambda r: Folded(FEATURES, 4)}
    got = ", ".join(map(str, shape))
    refused(UserError, rf"logits of shape \(2, L\) from the {who} for a batch of 2 samples, got \({got},?\)", **wrong)


def test_an_answer_that_is_no_tensor(refused):
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    refused(UserError, r"logits of shape \(2, L\) from the student .* got tuple", student=lambda r: Pair(FEATURES, 4))


def test_no_module_as_a_student(refused):
    refused(UserError, r"`student` to return a torch\.nn\.Module, got dict", student=lambda round: {"width": 3})


def test_no_module_as_a_later_student(tmp_path):
    with pytest.raises(UserError, match=r"`student` to return a torch\.nn\.Module, got NoneType"):
        boost(tmp_path, student=lambda round: None if round else make_plain(round))
    assert not list(digests(tmp_path))
    assert len(boost(tmp_path, student=make_plain).ensemble) == 3


def test_the_same_student_in_each_round(refused):
    same = make_plain(0)
    refused(UserError, "a new module in each round", student=lambda round: same)


def test_nan_in_the_teachers_logits(tmp_path):
    class Holed(nn.Linear):
        def forward(self, x):
            return torch.where(x[:, :1] == hole, torch.nan, super().forward(x))

    hole = samples(TRAIN, 11)[0][37, 0]
    with pytest.raises(RunError, match="NaN or infinity in the teacher's logits, first at sample 37"):
        boost(tmp_path, teacher=Holed(FEATURES, CLASSES))
    assert not digests(tmp_path)
    assert len(boost(tmp_path, settings=settings_for()).ensemble) == 3


class Breaks(nn.Module):
    """Its logits are NaN from a training step on."""

    def __init__(self, at):
        super().__init__()
        self.net, self.at, self.step = nn.Linear(FEATURES, CLASSES), at, 0

    def forward(self, x):
        self.step += self.training
        return self.net(x) * (torch.nan if self.step > self.at else 1.0)


def make_breaking(round):
    return Breaks(8 if round else 10_000)  # six steps an epoch, so that is batch 2 of epoch 1


@pytest.mark.parametrize("every", [50, 2])
def test_nan_in_the_loss(tmp_path, monkeypatch, every):
    monkeypatch.setattr(rounds, "CHECK_EVERY", every)
    with pytest.raises(
        RunError, match=r"round [12], epoch 1, batch 2 is NaN.*\n?.*Nothing of this round was committed"
    ):
        boost(tmp_path, student=make_breaking)
    assert list(digests(tmp_path)) == ["000"]
    ensemble = ProgressiveEnsemble.load(tmp_path)
    assert len(ensemble) == 1
    assert torch.isfinite(ensemble(samples(VAL, 12)[0])).all()
    assert torch.isfinite(
        torch.load(tmp_path / "work/001/last.ckpt", weights_only=True)["state_dict"]["student.net.weight"]
    ).all()


class Overflows(nn.Linear):
    """Infinite when it is scored, not when it is trained or looked at."""

    scored = False

    def forward(self, x):
        return super().forward(x) * (torch.inf if self.scored else 1.0)


def test_infinity_in_the_students_logits(tmp_path):
    def score(trainer, module):
        module.student.scored = True

    with pytest.raises(RunError, match="infinity in the student's logits, first at sample 0"):
        boost(
            tmp_path,
            student=lambda round: (Overflows if round else nn.Linear)(FEATURES, CLASSES),
            callbacks=lambda: [Hook(on_train_end=score)],
        )
    assert list(digests(tmp_path)) == ["000"]


# ---- data


def datamodule(train, val=None):
    """A data module of loaders."""
    made = L.LightningDataModule()
    made.train_dataloader = lambda: train
    made.val_dataloader = lambda: Toys().val_dataloader() if val is None else val
    return made


def loader(dataset):
    return DataLoader(dataset, batch_size=8)


X, Y = samples(16, 1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (loader(TensorDataset(X[:0], Y[:0])), "`train_dataloader.*to hold samples, got an empty TensorDataset"),
        (loader(Stream()), r"`train_dataloader.*map-style \(with __len__ and __getitem__\), got the iterable Stream"),
        (loader(Items((X[0], 1, 2))), r"batches of `train_dataloader\(\)` to be \(x, y\), got 3 values"),
        (loader(Items({"x": X[0]})), r"key 'labels' in batches of `train_dataloader\(\)`, got 'x'\."),
        (loader(Items(X[0])), r"to be \(x, y\), got Tensor"),
        ([loader(TensorDataset(X, Y))] * 2, "`train_dataloader.*to return one torch DataLoader, got list"),
        ({"a": loader(TensorDataset(X, Y))}, "`train_dataloader.*to return one torch DataLoader, got dict"),
        ([(X, Y)], "`train_dataloader.*to return one torch DataLoader, got list"),
    ],
    ids=["empty", "iterable", "three values", "dictionary", "no label", "two loaders", "named loaders", "batches"],
)
def test_training_data_that_the_ledger_cannot_address(refused, train, message):
    refused(UserError, message, datamodule(train))


def test_validation_data_that_the_ledger_cannot_address(refused):
    refused(UserError, "`val_dataloader.*empty", datamodule(Toys().train_dataloader(), loader(TensorDataset(X[:0]))))
    refused(UserError, "`val_dataloader.*iterable Stream", datamodule(Toys().train_dataloader(), loader(Stream())))


def test_no_validation_data(refused):
    data = datamodule(Toys().train_dataloader())
    del data.val_dataloader
    refused(UserError, r"`LightningDataModule` to define `val_dataloader\(\)`.*split one off the training part", data)


@pytest.mark.parametrize("hook", ["on_after_batch_transfer", "on_before_batch_transfer"])
def test_a_data_module_that_changes_batches(refused, hook):
    kind = type("Changing", (Toys,), {hook: lambda self, batch, dataloader_idx: [batch[0] + 1, *batch[1:]]})
    refused(UserError, rf"`Changing\.{hook}` changes batches after they are read", kind())


def test_random_augmentation_in_the_collate_function(refused):
    def jitter(items):
        x, y = torch.utils.data.default_collate(items)
        return x + torch.randn_like(x), y

    train = DataLoader(Toys().train_dataloader().dataset, batch_size=32, collate_fn=jitter)
    refused(UserError, r"random augmentation.*recompute.*views=K", datamodule(train))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_dataset_that_shrank(tmp_path, part):
    boost(tmp_path, settings=settings_for(1))
    before = everything(tmp_path)
    now = {"train": (160, TRAIN), "val": (32, VAL)}[part]
    with pytest.raises(UserError, match=rf"dataset has {now[0]} samples, .* was started with {now[1]}"):
        boost(tmp_path, Toys(**{part: now[0]}), settings=settings_for(1))
    assert everything(tmp_path) == before


def test_an_index_out_of_range(tmp_path):
    ledger = ErrorLedger(tmp_path)
    ledger.create(5, [(0, torch.randn(5, 3))], outputs=3)
    ledger.use(0)
    for bad in (5, -1):
        with pytest.raises(UserError, match=rf"sample index to be in 0 … 4, got {bad}"):
            ledger.rows(torch.tensor([0, bad]))
    assert ledger.rows(np.array([4, 0]))[0].shape == (2, 3)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.0}, r"`eta` of the boosting settings to be > 0 .*got 0\.0"),
        ({"eta": -1.0}, r"`eta` .*got -1\.0"),
        ({"kappa": 1.0, "gamma": 0.1}, r"`kappa` or `gamma`, got both \(1\.0 and 0\.1\)"),
        ({"kappa": -0.5}, r"`kappa` .*>= 0.*got -0\.5"),
        ({"gamma": 0.0}, r"`gamma` .*> 0.*got 0\.0"),
        ({"rounds": 0}, r"`rounds` .*>= 1.*got 0"),
        ({"accept": "always"}, r"`accept` .*'progress' or 'margin', got 'always'"),
        ({"state": "none"}, r"`state` .*'cached' or 'recompute', got 'none'"),
        ({"views": 0}, r"`views` .*>= 1, or left out, got 0"),
        ({"views": 2, "state": "recompute"}, r"`views` or `state='recompute'`, got both \(views=2\)"),
        ({"storage": "int8"}, r"`storage` .*'float32' or 'float16', got 'int8'"),
        ({"ladder": []}, r"`ladder` .*one rung or more, got \[\]"),
        ({"lr": 0.0}, r"`lr` .*got 0\.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        BoostingSettings(**settings)


@pytest.mark.parametrize("rung", [{"links": -1}, {"kind": "sum"}, {"hidden": 0}, {"width": 0.0}])
def test_a_rung_out_of_range(rung):
    (name, value), *_ = rung.items()
    with pytest.raises(UserError, match=rf"`{name}`.*{value}"):
        Rung(**rung)


def test_width_without_a_student_that_takes_it(refused, tmp_path):
    def narrow(round):
        return make_student(round)

    wide = settings_for(ladder=[Rung(0), Rung(1, width=1.5)])
    refused(UserError, r"width x1\.5.*make_student\(round, width=1\.0\), or leave such rungs out",
            student=narrow, settings=wide)  # fmt: skip
    boost(tmp_path / "run", student=narrow, settings=settings_for(1))  # as the message says, in the same folder
    assert list(digests(tmp_path / "run")) == ["000"]


def test_a_body_of_another_width_than_its_head(refused):
    refused(
        UserError,
        r"body to return features \(B, 3\), got \(2, 6\)",
        student=lambda round: Student(nn.Linear(FEATURES, WIDTH), nn.ReLU(), features=3, outputs=CLASSES),
    )


# ---- fits that are none


def test_a_round_that_is_not_fitted(tmp_path):
    rounds = control(tmp_path).rounds(Toys())
    next(rounds)
    with pytest.warns(UserWarning, match=r"Round 1 was not fitted, so the loop .* ends; nothing of it was committed"):
        assert next(rounds, None) is None
    assert not digests(tmp_path)
    assert len(boost(tmp_path).ensemble) == 3


def test_a_round_that_is_fitted_without_the_controller(tmp_path):
    data = Toys()
    rounds = control(tmp_path).rounds(data)
    module = next(rounds)
    with pytest.raises((UserError, RunError), match=r"callbacks=\[controller\]"):
        make_trainer(enable_checkpointing=False).fit(module, data)
    rounds.close()
    assert not digests(tmp_path)


def test_a_strangers_module(tmp_path):
    controller, data = control(tmp_path), Toys()
    rounds = controller.rounds(data)
    module = next(rounds)
    with pytest.raises(
        UserError, match=r"controller\.rounds\(datamodule\)` gave for round 1, got another module \(BoringModel\)"
    ):
        make_trainer(controller).fit(BoringModel(), data)
    make_trainer(controller).fit(module, data)
    next(rounds)
    with pytest.raises(UserError, match=r"gave for round 2, got another module \(BoostingRound\)"):
        make_trainer(controller).fit(module, data)
    rounds.close()
    assert list(digests(tmp_path)) == ["000"]
