"""Tiny data, a tiny teacher and tiny students: a whole boosting run takes a second."""

import csv
import gc
import hashlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
from helpers.processes import BUSY
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bdistil import BoostingSettings, ErrorLedger, ProgressiveEnsemble, Rung, Student
from bdistil.callbacks import RoundController

TRAIN, VAL, TEST = 192, 64, 64
FEATURES, CLASSES, WIDTH, BATCH = 8, 4, 6, 32
ROUNDS, EPOCHS = 3, 2
BODY, HEAD, JOIN = FEATURES * WIDTH, WIDTH * CLASSES, WIDTH * CLASSES  # multiply-adds of the parts of a toy student
TIMES = {"latency_ms", "seconds"}  # columns of the curve that no two runs share

gc.freeze()  # the controller collects once a round: not all that was imported, which takes longer than a round


def make_teacher(seed=1):
    """A net with fixed weights whose answers depend on its mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, CLASSES)
        )


def samples(count, seed):
    """x (count, 8), and y (count,) as the teacher says; one in eight is wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    with torch.no_grad():
        y = make_teacher().eval()(x).argmax(-1)
    wrong = torch.rand(count, generator=generator) < 1 / 8
    return x, torch.where(wrong, (y + 1) % CLASSES, y)


class Noisy(Dataset):
    """Random augmentation: each reading of a sample gives another x."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        return self.tensors[0][index] + 0.1 * torch.randn(FEATURES), self.tensors[1][index]


class Stream(IterableDataset):
    """Samples without a number."""

    def __iter__(self):
        return iter([samples(1, 1)])


class Items(Dataset):
    """One item, of any form."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.item


class Toys(L.LightningDataModule):
    """192 training, 64 validation and 64 test samples; knows nothing of bdistil."""

    def __init__(self, *, train=TRAIN, val=VAL, noisy=False, workers=0):
        super().__init__()
        self.parts = {"train": samples(train, 11), "val": samples(val, 12), "test": samples(TEST, 13)}
        self.noisy, self.workers = noisy, workers

    def train_dataloader(self):
        data = (Noisy if self.noisy else TensorDataset)(*self.parts["train"])
        return DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=self.workers)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.parts["val"]), batch_size=BATCH)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*self.parts["test"]), batch_size=BATCH)


class ClosedToys(Toys):
    """Has the parts of a stage only between `setup` and `teardown`."""

    def __init__(self):
        super().__init__()
        self.files, self.parts = self.parts, {}

    def setup(self, stage):
        names = ("train", "val") if stage == "fit" else ("test",)
        self.parts = {**self.parts, **{name: self.files[name] for name in names}}

    def teardown(self, stage):
        self.parts = {}


def make_student(round, width=1.0):
    """Batch norm and dropout: what a wrong mode or a wrong seed would show.

    No bias before batch norm: its gradient would be rounding noise, which AdamW blows up to whole steps.
    """
    wide = int(WIDTH * width)
    return Student(
        nn.Sequential(nn.Linear(FEATURES, wide, bias=False), nn.BatchNorm1d(wide), nn.ReLU(), nn.Dropout(0.1)),
        nn.Linear(wide, CLASSES),
    )


def make_plain(round):
    """A student that takes no links."""
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
    )


def settings_for(rounds=3, **settings):
    """A ladder of one and two links; any progress is enough, so that no toy run stops by chance."""
    return BoostingSettings(**{"rounds": rounds, "ladder": [Rung(0), Rung(1), Rung(2, "hidden", 5)],
                               "margin_share": 0.0, "accept": "margin", **settings})  # fmt: skip


def make_trainer(*callbacks, epochs=2, logger=False, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, **quiet, **options}
    return L.Trainer(max_epochs=epochs, logger=logger, callbacks=list(callbacks), **options)


def control(run_dir, *, settings=None, student=make_student, teacher=None, **options):
    """A controller of a toy run."""
    teacher = make_teacher() if teacher is None else teacher
    return RoundController(run_dir, teacher=teacher, student=student, settings=settings or settings_for(), **options)


def fit(controller, datamodule=None, *, callbacks=list, **trainer):
    """Fits all rounds. `callbacks()` gives those that stand beside the controller in one of them."""
    datamodule = datamodule or Toys()
    for module in controller.rounds(datamodule):
        make_trainer(*callbacks(), controller, **trainer).fit(module, datamodule, ckpt_path=controller.ckpt_path)
    return controller


def boost(run_dir, datamodule=None, *, callbacks=list, trainer=None, **options):
    """A whole run; gives its controller."""
    return fit(control(run_dir, **options), datamodule, callbacks=callbacks, **(trainer or {}))


class Hook(L.Callback):
    """Calls functions of (trainer, module) in hooks: ``Hook(on_train_epoch_end=function)``."""

    def __init__(self, **hooks):
        for name, function in hooks.items():
            assert hasattr(L.Callback, name), name
            setattr(self, name, lambda trainer, module, *_, function=function: function(trainer, module))


class Batches(L.Callback):
    """Keeps the training batches of a fit."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)


def in_child(log, function, *args):
    """Calls a function in a process of its own: 0, 1 for an exception, -9 for a kill. What it says is in the log."""
    return in_children({log: {}}, function, args)[0]


def on_ranks(folder, function, *args, count=2, nodes=1, own=None):
    """Calls a function in processes that stand to each other like those of torchrun; their statuses by rank.

    The start of torchrun itself would take as long as the tests. What they say is in `rank0.log` and so on. `own` gives
    variables of the environment to a rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = count // nodes
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "TORCHELASTIC_RUN_ID": "tests"}  # fmt: skip
    places = [{"RANK": rank, "LOCAL_RANK": rank % here, "GROUP_RANK": rank // here} for rank in range(count)]
    logs = {folder / f"rank{rank}.log": group | place | (own or {}).get(rank, {}) for rank, place in enumerate(places)}
    return in_children(logs, function, args)


def in_children(logs, function, args):
    """Calls a function in a process for each log, with the environment that is given for it; their statuses.

    When one fails, the others are killed; their status is None.
    """
    context = multiprocessing.get_context("forkserver")  # a new interpreter, which imports torch once for all children
    context.set_forkserver_preload(["bdistil.callbacks"])
    children = [
        context.Process(target=_child, args=(log, environment, function, args)) for log, environment in logs.items()
    ]
    for child in children:
        child.start()
    waits = {child.sentinel: child for child in children}
    end = time.monotonic() + BUSY
    while waits and time.monotonic() < end:
        for sentinel in connection.wait(waits, end - time.monotonic()):
            waits.pop(sentinel).join()
        if any(child.exitcode for child in children):  # the others would wait for it
            break
    failed = any(child.exitcode for child in children)
    for child in waits.values():
        child.kill()
        child.join()
    if waits and not failed:
        raise AssertionError("\n".join(f"{log} hangs:\n{Path(log).read_text()[-5000:]}" for log in logs))
    return [None if child in waits.values() else child.exitcode for child in children]


def _child(log, environment, function, args):
    os.environ.update({key: str(value) for key, value in environment.items()})
    os.environ.pop("WANDB_SERVICE", None)  # of the test process, if a test of it has started one
    rank_zero_only.rank = environment.get("RANK", 0)  # read from the environment when Lightning is imported
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        try:
            function(*args)
        except Exception as error:
            file.write(f"{traceback.format_exc()}\n{type(error).__name__}: {error}\n")
            sys.exit(1)


def digests(run_dir):
    """Sha256 of the weights of every committed round."""
    files = sorted(run_dir.glob("rounds/*/student.safetensors"))
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def everything(folder):
    """All files of a run by name, and their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def curve(run_dir, *, without=()):
    """Rows of curve.csv as text."""
    with open(run_dir / "curve.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(file)]


def by_hand(ensemble, teacher, x):
    """What a run should say of samples x, made from its students alone: all (N, L) but the list of f."""
    with torch.no_grad():
        g = teacher.eval()(x)
        g = g - g.mean(-1, keepdim=True)
        g = g / ensemble.scale
        logits = [stage.logits * stage.index / ensemble.scale for stage in ensemble.stages(x)]  # running sums
    students = [now - before for now, before in zip(logits, [torch.zeros_like(g), *logits], strict=False)]
    return SimpleNamespace(g=g, students=students, error=sum(f - g for f in students))


class Killed(Exception):  # noqa: N818
    """Ends a run as a kill does: nothing of the library answers to it."""


def kill(*_, **__):
    raise Killed


def ledger(run_dir, part="train", version=ROUNDS, count=TRAIN):
    """g and S of all samples, as a run left them."""
    found = ErrorLedger(run_dir / "ledger" / part)
    found.open(count)
    found.use(version)
    return found.rows(torch.arange(count))


def finished_run(run_dir):
    """A whole run, with what was seen of it after each round."""
    x = samples(VAL, 12)[0]
    seen = SimpleNamespace(run_dir=run_dir, x=x, weights=[], answers=[], curves=[])

    def look(trainer, module):
        seen.weights.append((run_dir / f"rounds/{module.number:03d}/student.safetensors").read_bytes())
        seen.answers.append(ProgressiveEnsemble.load(run_dir)(x))
        seen.curves.append(curve(run_dir))

    seen.controller = boost(run_dir, callbacks=lambda: [Hook(on_fit_end=look)])
    assert len(seen.answers) == ROUNDS
    return seen


def logged(folder):
    """Rows of the metrics that a CSVLogger wrote."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))
