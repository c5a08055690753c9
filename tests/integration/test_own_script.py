"""What a script of five lines gets, with somebody's own data, students and LightningModules."""

import shutil
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.toys import (
    BATCH,
    CLASSES,
    FEATURES,
    TEST,
    TIMES,
    TRAIN,
    VAL,
    Hook,
    Killed,
    Toys,
    boost,
    control,
    curve,
    digests,
    everything,
    fit,
    kill,
    make_plain,
    make_student,
    make_teacher,
    make_trainer,
    samples,
    settings_for,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset

import bdistil.reporting.report
import bdistil.storage.run_directory
from bdistil import BoostingSettings
from bdistil.callbacks import RoundController, round_controller

# What Lightning and torch say of its defaults: a logger in files, memory that is pinned for a GPU.
defaults = pytest.mark.filterwarnings("ignore:Starting from v1.9.0", "ignore:'pin_memory' argument is set as true")


class Named(Dataset):
    """Samples whose x is a dictionary."""

    def __init__(self, part):
        self.x, self.y = part

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return {"signal": self.x[index], "length": torch.tensor(FEATURES)}, self.y[index]


class Reads(nn.Module):
    """A network of such samples."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        assert x["signal"].shape[1:] == (FEATURES,)
        assert len(x["length"]) == len(x["signal"])
        return self.net(x["signal"])


class Dictionaries(Toys):
    def train_dataloader(self):
        return DataLoader(Named(self.parts["train"]), batch_size=BATCH, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Named(self.parts["val"]), batch_size=BATCH)

    def test_dataloader(self):
        return DataLoader(Named(self.parts["test"]), batch_size=BATCH)


def test_x_may_be_a_dictionary(finished, tmp_path):
    """The same run as with plain tensors, students that link among them."""

    def student(round):
        made = make_student(round)
        made.body = Reads(made.body)
        return made

    boost(tmp_path, Dictionaries(), teacher=Reads(make_teacher()), student=student)
    assert curve(tmp_path, without=TIMES) == curve(finished.run_dir, without=TIMES)


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
    monkeypatch.setattr(round_controller, "write_report", bdistil.reporting.report.write_report)
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
