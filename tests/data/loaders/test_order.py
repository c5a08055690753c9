"""Orders that a user's sampler draws, shared by processes; which samples a loader gives, and in what batches."""

import copy
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bdistil.data.loaders import ViewPlan, begin_epoch, check_drawn, distinct_samples, largest_batch, training_loader
from bdistil.data.loaders.order import SharedOrder, given_rows, only_given
from bdistil.errors import RunError, UserError
from bdistil.utils import distributed

N, B = 22, 4
DATA = TensorDataset(torch.arange(N)[:, None].float(), torch.arange(N))


def shares(loader, world_size, *, epoch=0, seed=0, plan=None):
    """The batches of sample numbers that each process reads."""
    loaders = [
        training_loader(copy.deepcopy(loader), seed=seed, epoch=epoch, rank=rank, world_size=world_size, plan=plan)
        for rank in range(world_size)
    ]
    found = []
    for rank, ours in enumerate(loaders):
        torch.manual_seed(100 + rank)  # what the processes have drawn before does not count
        assert isinstance(ours.sampler, DistributedSampler)  # which Lightning leaves in place
        found.append([index.tolist() for *_, index in ours])
        assert len(found[-1]) == len(ours)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_sample_of_the_users_sampler_is_read_by_one_process(world_size):
    chosen = [*range(0, N, 2)]

    def read(**options):
        loader = DataLoader(DATA, B, sampler=SubsetRandomSampler(chosen))
        return [[*chain.from_iterable(share)] for share in shares(loader, world_size, **options)]

    found = read()
    assert len({len(share) for share in found}) == 1
    assert sorted({*chain.from_iterable(found)}) == chosen
    assert sum(map(len, found)) - len(chosen) < world_size  # repeated, so that all have as many
    assert found == read()
    assert found not in (read(epoch=1), read(seed=1))


def test_whole_batches_of_a_batch_sampler_are_shared():
    class Lengths(Sampler):
        """Batches of different lengths."""

        def __iter__(self):
            return iter([[0, 1, 2], [np.int64(3)], torch.tensor([4, 5]), [6]])

        def __len__(self):
            return 4

    loader = DataLoader(DATA, batch_sampler=Lengths())
    assert shares(loader, 2) == [[[0, 1, 2], [4, 5]], [[3], [6]]]
    assert shares(loader, 3) == [[[0, 1, 2], [6]], [[3], [0, 1, 2]], [[4, 5], [3]]]
    assert shares(loader, 8)[5] == [[3]]
    assert largest_batch(loader) == 3
    for x, y, index in training_loader(loader, seed=0, epoch=0, rank=0, world_size=2):
        assert torch.equal(x[:, 0].long(), y)
        assert np.array_equal(y.numpy(), index)


def test_a_draw_with_replacement_is_shared():
    sampler = WeightedRandomSampler([0.0] * 3 + [1.0] + [0.0] * (N - 4), 10)
    assert shares(DataLoader(DATA, B, sampler=sampler), 2) == [[[3] * 4, [3]]] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_views_are_read_by_a_sampler_of_the_users_own(world_size):
    loader = DataLoader(DATA, B, sampler=SubsetRandomSampler(range(8)))
    for epoch, view in ((0, 0), (1, 1), (2, 2), (3, 0)):
        found = [
            training_loader(loader, seed=0, epoch=epoch, rank=rank, world_size=world_size, plan=ViewPlan(0, 3)).sampler
            for rank in range(world_size)
        ]
        assert sorted(number for share in found for number in share) == [number + N * view for number in range(8)]


def test_a_share_of_the_users_own_is_kept():
    for rank in range(2):
        own = DistributedSampler(DATA, 2, rank, shuffle=True, seed=5)
        ours = training_loader(DataLoader(DATA, B, sampler=own), seed=0, epoch=3, rank=rank, world_size=2)
        own.set_epoch(3)
        assert [number for *_, index in ours for number in index] == [*own]


class Aware(Sampler):
    """A share of the samples, in an order of the epoch; not torch's DistributedSampler."""

    def __init__(self, rank, num_replicas):
        self.rank, self.num_replicas, self.epoch = rank, num_replicas, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        return iter(order[self.rank :: self.num_replicas].tolist())

    def __len__(self):
        return len(range(self.rank, N, self.num_replicas))


class AwareBatches:
    """The same in batches; no BatchSampler of torch."""

    def __init__(self, own):
        self.own, self.rank, self.num_replicas = own, own.rank, own.num_replicas

    def set_epoch(self, epoch):
        self.own.set_epoch(epoch)

    def __iter__(self):
        return iter(BatchSampler(self.own, B, drop_last=False))

    def __len__(self):
        return -(-len(self.own) // B)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("batches", [False, True])
def test_any_share_of_the_users_own_is_kept_where_lightning_leaves_it_in_place(views, batches):
    for rank in range(2):
        own, plan = Aware(rank, 2), ViewPlan(0, views) if views > 1 else None
        assert given_rows(DataLoader(DATA, B, sampler=own), "val_dataloader") is None, "it chooses no samples"
        given = DataLoader(DATA, batch_sampler=AwareBatches(own)) if batches else DataLoader(DATA, B, sampler=own)
        ours = training_loader(given, seed=0, epoch=4, rank=rank, world_size=2, plan=plan)
        assert isinstance(ours.sampler, DistributedSampler)
        found = [number for *_, index in ours for number in index]
        own.set_epoch(4)
        assert found == [number + N * (4 % views) for number in own]
        begin_epoch(ours, 5)
        assert own.epoch == 5
        if not batches:
            assert distinct_samples(ours, N) == N


def test_a_sampler_without_a_length_cannot_be_shared():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield 0

    loader, batches = DataLoader(DATA, B, sampler=Endless()), DataLoader(DATA, batch_sampler=Endless())
    assert next(iter(training_loader(loader, seed=0, epoch=0, rank=0, world_size=1)))[2].tolist() == [0] * B
    for read in (lambda: given_rows(loader, "train_dataloader"), lambda: largest_batch(batches)):
        with pytest.raises(UserError, match=r"that has a `__len__`, so that its samples can be read.* got Endless"):
            read()
    with pytest.raises(UserError, match=r"has a `__len__`, so that several.*`train_dataloader\(\)` gives, got Endless"):
        training_loader(loader, seed=0, epoch=0, rank=0, world_size=2)


def test_other_orders_on_other_processes_are_found(monkeypatch):
    loader = training_loader(
        DataLoader(DATA, B, sampler=SubsetRandomSampler(range(N))), seed=0, epoch=0, rank=0, world_size=2
    )
    list(loader)
    monkeypatch.setattr(distributed, "all_max", lambda drawn: drawn)
    check_drawn(loader)
    check_drawn(DataLoader(DATA))
    monkeypatch.setattr(distributed, "all_max", lambda drawn: torch.maximum(drawn, -drawn.flip(0) + 1))
    with pytest.raises(RunError, match=r"SubsetRandomSampler, the sampler of .* has given each process another order"):
        check_drawn(loader)


# ---- which samples


@pytest.mark.parametrize(
    ("loader", "rows"),
    [
        (DataLoader(DATA, B), None),
        (DataLoader(DATA, B, shuffle=True), None),
        (DataLoader(DATA, B, sampler=SubsetRandomSampler([5, 2, 9])), [2, 5, 9]),
        (DataLoader(DATA, B, sampler=RandomSampler(range(7))), [*range(7)]),
        (DataLoader(DATA, B, sampler=DistributedSampler(DATA, 2, 0)), None),
        (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, False)), None),
        (DataLoader(DATA, batch_sampler=[[1, 2], [3]]), [1, 2, 3]),
        (DataLoader(DATA, batch_sampler=[[*range(N)]]), None),
    ],
)
def test_samples_that_a_loader_gives(loader, rows):
    state = torch.get_rng_state()
    assert given_rows(loader, "val_dataloader") == rows
    assert torch.equal(torch.get_rng_state(), state)
    if rows is None:
        assert only_given(loader, "val_dataloader") is loader
    else:
        found = only_given(loader, "val_dataloader")
        assert torch.cat([y for _, y in found]).tolist() == rows
        assert found.batch_size == largest_batch(loader)


def test_the_settings_of_a_loader_are_kept():
    loader = DataLoader(DATA, B, sampler=SubsetRandomSampler([1]), num_workers=2, prefetch_factor=3)
    found = only_given(loader, "val_dataloader")
    assert (found.num_workers, found.prefetch_factor, found.batch_size) == (2, 3, B)


def test_a_shared_order_has_a_checksum():
    order = SharedOrder(SubsetRandomSampler(range(N)), samples=N, num_replicas=2, rank=0, seed=0)
    list(order)
    first = order.drawn
    order.set_epoch(1)
    list(order)
    assert order.drawn != first


def test_samples_that_a_share_draws_repeatedly_all_count():
    class Weighted(Sampler):
        """Of one of two processes."""

        num_replicas, rank = 2, 0

        def __iter__(self):
            return iter([0] * 3 * N)

        def __len__(self):
            return 3 * N

    loader = training_loader(DataLoader(DATA, B, sampler=Weighted()), seed=0, epoch=0, rank=0, world_size=2)
    assert distinct_samples(loader, 6 * N) == 6 * N
