"""Samplers of the user's own on two real processes: each sample of an epoch is in one step, of one of them."""

import json
import os

import lightning as L
import numpy as np
import pytest
import torch
from helpers.toys import CLASSES, FEATURES, TRAIN, VAL, Toys, boost, on_ranks, samples, settings_for
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SubsetRandomSampler, TensorDataset

from bdistil import RunError, UserError
from bdistil.storage.run_directory import RunDirectory

EPOCHS, CHOSEN = 2, range(5, VAL, 3)


class Pairs(Sampler):
    """Batches of two samples whose numbers are as far apart as can be, in a random order; no BatchSampler of torch."""

    def __iter__(self):
        return iter([[row, TRAIN - 1 - row] for row in torch.randperm(TRAIN // 2).tolist()])

    def __len__(self):
        return TRAIN // 2


class Aware(Sampler):
    """The share of this process; not torch's DistributedSampler."""

    def __init__(self):
        self.rank, self.num_replicas, self.epoch = int(os.environ["RANK"]), 2, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(self.epoch))
        return iter(order[self.rank :: 2].tolist())

    def __len__(self):
        return TRAIN // 2


class Unseeded(Sampler):
    """Draws from a generator that no seed reaches."""

    def __iter__(self):
        return iter(np.random.default_rng().permutation(TRAIN).tolist())

    def __len__(self):
        return TRAIN


def loader_of(kind, data):
    if kind == "pairs":
        return DataLoader(data, batch_sampler=Pairs())
    if kind == "batches":
        return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 16, False))
    if kind == "aware":
        return DataLoader(data, 16, sampler=Aware())
    return DataLoader(data, 16, sampler=Unseeded() if kind == "unseeded" else SubsetRandomSampler(range(TRAIN)))


class Sampled(Toys):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

        if kind == "parts":  # each process has drawn its own, once
            self.parts["train"] = samples(TRAIN, 20 + int(os.environ.get("RANK", 0)))

    def setup(self, stage):
        self.batch = 32 // self.trainer.world_size

    def train_dataloader(self):
        return loader_of(self.kind, TensorDataset(*self.parts["train"]))

    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.parts["val"]), self.batch, sampler=SubsetRandomSampler(CHOSEN))


class See(L.Callback):
    def __init__(self, seen):
        self.seen = seen

    def on_train_batch_start(self, trainer, module, batch, number):
        self.seen.append((trainer.current_epoch, batch[2].tolist()))


KINDS = ("subset", "pairs", "batches", "aware")
ALL = (*KINDS, "unseeded", "parts")


def script(folder):
    """What each of the processes runs."""
    for kind in ALL:
        seen = []
        options = {"strategy": "ddp", "devices": 2, "epochs": EPOCHS}
        try:
            boost(
                folder / kind, Sampled(kind), settings=settings_for(1), trainer=options,
                student=lambda round: nn.Linear(FEATURES, CLASSES),
                callbacks=lambda seen=seen: [See(seen)],
            )  # fmt: skip
        except (RunError, UserError) as error:
            seen.append(str(error))
        (folder / f"{kind}.{os.environ['RANK']}").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Folder of the runs, and for each kind the (epoch, samples) of the steps of both processes."""
    folder = tmp_path_factory.mktemp("orders")
    assert on_ranks(folder, script, folder) == [0, 0], (folder / "rank0.log").read_text()[-5000:]
    return folder, {kind: [json.loads((folder / f"{kind}.{rank}").read_text()) for rank in (0, 1)] for kind in ALL}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_an_epoch_is_in_one_step_of_one_process(seen, kind):
    orders = []
    for epoch in range(EPOCHS):
        steps = [[step for number, step in rank if number == epoch] for rank in seen[1][kind]]
        assert len(steps[0]) == len(steps[1])
        samples = [sample for rank in steps for step in rank for sample in step]
        assert sorted(samples) == list(range(TRAIN))
        orders.append(steps[0])
        if kind == "pairs":
            assert all(first + second == TRAIN - 1 for rank in steps for first, second in rank)
        else:
            assert {len(step) for rank in steps for step in rank} == {16}
    assert orders[0] != orders[1]


@pytest.mark.distributed
def test_a_sampler_that_no_seed_reaches_is_refused(seen):
    message = seen[1]["unseeded"][0][-1]
    assert message.startswith("Unseeded, the sampler of `train_dataloader()`, has given each process another order")
    assert "generator=torch.Generator().manual_seed(0)" in message
    assert RunDirectory(seen[0] / "unseeded").committed() == 0


@pytest.mark.distributed
def test_processes_with_other_samples_are_refused(seen):
    for messages in seen[1]["parts"]:
        (message,) = messages
        assert message.startswith(
            "The processes read different samples behind the same numbers of `train_dataloader()`"
        )
    assert not list((seen[0] / "parts/ledger").glob("*/ledger.json"))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_chooses_the_validation_samples_on_two_ranks(seen, kind):
    ledger = json.loads((seen[0] / kind / "ledger/val/ledger.json").read_text())
    assert ledger["samples"] == len(CHOSEN)
