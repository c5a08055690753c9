"""The index beside each sample: the same data as the user's loader gives, in an order of our own."""

from dataclasses import dataclass
from itertools import chain, product

import numpy as np
import pytest
import torch
from helpers.toys import Items, Stream
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from bdistil.data.loaders import (
    IndexedDataset,
    check_dataset,
    distinct_samples,
    is_random,
    rows_loader,
    sequential_loader,
    single_loader,
    training_loader,
)
from bdistil.errors import UserError
from bdistil.utils import distributed

N, B = 22, 4
X = torch.arange(N * 3, dtype=torch.float32).view(N, 3)
Y = torch.arange(N) % 5


class Plain(Dataset):
    """The same samples one by one."""

    def __init__(self, change=lambda x: x):
        self.change = change

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.change(X[index]), int(Y[index])


class Augmented(TensorDataset):
    """A dataset of tensors that changes what it gives."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 100, y


class Backwards(Sampler):
    """A sampler of the user's own."""

    def __iter__(self):
        return iter(range(N - 1, -1, -1))

    def __len__(self):
        return N


def half_and_sum(items):
    """A collate function of the user's own."""
    x, y = default_collate(items)
    return x / 2, x.sum(1) + y


def train(loader, *, seed=0, epoch=0, rank=0, world_size=1):
    return training_loader(loader, seed=seed, epoch=epoch, rank=rank, world_size=world_size)


def order(loader):
    return np.concatenate([index for *_, index in loader]).tolist()


TENSORS = TensorDataset(X, Y)


# ---- fast and slow


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.distributed)], ids=["no workers", "two workers"]
)
@pytest.mark.parametrize("make", [train, sequential_loader], ids=["training", "sequential"])
def test_tensors_at_once_equal_samples_one_by_one(make, workers):
    fast, slow = (
        list(make(DataLoader(data, batch_size=B, shuffle=make is train, num_workers=workers)))
        for data in (TENSORS, Plain())
    )
    assert len(fast) == len(slow) == 6
    for ours, theirs in zip(fast, slow, strict=True):
        for batch in (ours, theirs):
            x, y, index = batch
            assert isinstance(index, np.ndarray)
            assert index.dtype == np.int64
            assert torch.equal(x, X[index])
            assert torch.equal(y, Y[index])
        assert np.array_equal(ours[2], theirs[2])


@pytest.mark.parametrize("dataset", [TENSORS, Plain()], ids=["tensors", "plain"])
@pytest.mark.parametrize("make", [train, sequential_loader, lambda loader: rows_loader(loader, [range(5)])])
def test_collate_function_of_the_user(make, dataset):
    for x, y, index in make(DataLoader(dataset, batch_size=B, collate_fn=half_and_sum)):
        assert torch.equal(x, X[index] / 2)
        assert torch.equal(y, X[index].sum(1) + Y[index])


@pytest.mark.parametrize("make", [train, sequential_loader, lambda loader: rows_loader(loader, [range(5)])])
def test_a_dataset_of_tensors_that_changes_them(make):
    for x, y, index in make(DataLoader(Augmented(X, Y), batch_size=B)):
        assert torch.equal(x, X[index] + 100)
        assert torch.equal(y, Y[index])


def test_numbers_are_those_of_the_dataset_that_the_loader_reads():
    rows = [7, 3, 20, 11]
    (x, y, index), *rest = sequential_loader(DataLoader(Subset(TENSORS, rows), batch_size=B))
    assert not rest
    assert index.tolist() == [0, 1, 2, 3]
    assert torch.equal(x, X[rows])
    assert torch.equal(y, Y[rows])


@pytest.mark.parametrize("dataset", [TENSORS, Plain()], ids=["tensors", "plain"])
def test_an_indexed_dataset(dataset):
    indexed = IndexedDataset(dataset)
    assert len(indexed) == N
    (x, y), index = indexed[5]
    assert (x.tolist(), int(y), index) == (X[5].tolist(), int(Y[5]), 5)
    x, y, index = indexed.collate(indexed.__getitems__([4, 2]))
    assert (x.tolist(), y.tolist(), index.tolist()) == (X[[4, 2]].tolist(), Y[[4, 2]].tolist(), [4, 2])


# ---- the order of training


def test_order_is_a_function_of_seed_and_epoch():
    loader = DataLoader(TENSORS, batch_size=B, shuffle=True)
    orders = {}
    for seed in (0, 7):
        for epoch in (0, 1, 2):
            torch.manual_seed(seed + 10 * epoch)  # no other randomness counts
            first = order(train(loader, seed=seed, epoch=epoch))
            torch.rand(3)
            assert order(train(loader, seed=seed, epoch=epoch)) == first
            assert sorted(first) == list(range(N))
            orders[seed, epoch] = tuple(first)
    assert len(set(orders.values())) == len(orders)


def test_reading_moves_no_random_numbers():
    state = torch.get_rng_state()
    order(train(DataLoader(TENSORS, batch_size=B, shuffle=True)))
    list(rows_loader(DataLoader(TENSORS, batch_size=B), [range(5)]))
    assert torch.equal(torch.get_rng_state(), state)


def test_epochs_that_lightning_sets():
    loader = train(DataLoader(TENSORS, batch_size=B, shuffle=True), seed=3, epoch=0)
    loader.sampler.set_epoch(4)
    assert order(loader) == order(train(DataLoader(TENSORS, batch_size=B, shuffle=True), seed=3, epoch=4))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("samples", [N, N - 1])
@pytest.mark.parametrize("shuffle", [True, False])
def test_two_ranks_share_the_samples(shuffle, samples, epoch):
    loader = DataLoader(TensorDataset(X[:samples], Y[:samples]), batch_size=B, shuffle=shuffle)
    parts = [order(train(loader, epoch=epoch, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [11, 11]
    assert set(parts[0]) | set(parts[1]) == set(range(samples))
    assert len(set(parts[0]) & set(parts[1])) == 22 - samples  # an odd number is made even by one sample twice


def test_workers_are_seeded_by_the_order_of_the_epoch():
    """What a worker draws is the seed of the loader's generator and its number."""
    seeds = {}
    for seed, epoch, rank in product((0, 7), (0, 1), (0, 1)):
        for _ in range(2):  # equal orders, equal seeds
            loader = train(DataLoader(TENSORS, batch_size=B, shuffle=True), seed=seed, rank=rank, world_size=2)
            loader.sampler.set_epoch(epoch)
            iter(loader)
            seeds.setdefault((seed, epoch, rank), set()).add(loader.generator.initial_seed())
    assert {len(found) for found in seeds.values()} == {1}
    assert len(set.union(*seeds.values())) == len(seeds)


@pytest.mark.parametrize(("samples", "read", "distinct"), [(22, 22, 22), (21, 22, 21), (21, 8, 8)])
def test_samples_that_are_repeated_to_make_ranks_even_count_once(samples, read, distinct):
    loader = DataLoader(TensorDataset(X[:samples], Y[:samples]), batch_size=B, shuffle=True)
    assert distinct_samples(train(loader, world_size=2), read) == distinct
    assert distinct_samples(DataLoader(TENSORS, B, sampler=Backwards()), 60) == 60


def test_a_loader_that_reads_in_order_goes_on_doing_so():
    assert order(train(DataLoader(TENSORS, batch_size=B), epoch=5)) == list(range(N))


@pytest.mark.parametrize("shuffle", [True, False])
def test_drop_last_and_batch_size(shuffle):
    sizes = [len(y) for _, y, _ in train(DataLoader(TENSORS, batch_size=B, shuffle=shuffle, drop_last=True))]
    assert sizes == [4] * 5
    assert [len(y) for _, y, _ in train(DataLoader(TENSORS, batch_size=B, shuffle=shuffle))] == [4] * 5 + [2]
    assert len(order(train(DataLoader(TENSORS, B, sampler=Backwards(), drop_last=True)))) == 20


class EvenFirst(RandomSampler):
    """A sampler of the user's own that happens to inherit from one of torch's."""

    def __iter__(self):
        return iter([*range(0, N, 2), *range(1, N, 2)])


SAMPLERS = {
    "own": (Backwards, lambda found: found == list(range(N - 1, -1, -1))),
    "subset": (lambda: SubsetRandomSampler([2, 5, 9]), lambda found: sorted(found) == [2, 5, 9]),
    "weighted": (lambda: WeightedRandomSampler([0] * 3 + [1] + [0] * (N - 4), 10), lambda found: found == [3] * 10),
    "inherits": (lambda: EvenFirst(TENSORS), lambda found: found == [*range(0, N, 2), *range(1, N, 2)]),
    "fewer": (lambda: RandomSampler(TENSORS, num_samples=5), lambda found: len(set(found)) == len(found) == 5),
    "more": (lambda: RandomSampler(TENSORS, replacement=True, num_samples=60), lambda found: len(found) == 60),
    "again": (lambda: RandomSampler(TENSORS, replacement=True), lambda found: len(set(found)) < len(found) == N),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_of_the_users_own_is_kept(name):
    make, is_kept = SAMPLERS[name]
    loader = train(DataLoader(TENSORS, batch_size=B, sampler=make()))
    found = order(loader)
    assert is_kept(found), found
    assert loader.batch_size == B
    for x, _, index in loader:
        assert torch.equal(x, X[index])


def test_a_batch_sampler_of_the_users_own_is_kept():
    class Pairs(BatchSampler):
        def __iter__(self):
            return iter([[9, 1], [0, 3, 4]])

    loader = train(DataLoader(TENSORS, batch_sampler=Pairs(Backwards(), 2, False)))
    assert [index.tolist() for *_, index in loader] == [[9, 1], [0, 3, 4]]


def tell(worker):
    """A worker_init_fn."""


def test_settings_of_the_user_are_kept():
    loader = DataLoader(
        TENSORS, batch_size=B, num_workers=2, prefetch_factor=5, persistent_workers=True, timeout=3, worker_init_fn=tell
    )
    for ours in (train(loader), train(DataLoader(TENSORS, sampler=Backwards())), sequential_loader(loader)):
        if ours.num_workers:
            kept = (ours.num_workers, ours.prefetch_factor, ours.persistent_workers, ours.timeout, ours.worker_init_fn)
            assert kept == (2, 5, True, 3, tell)
    assert rows_loader(loader, [range(1)]).num_workers == 2
    assert not rows_loader(loader, [range(1)]).persistent_workers  # it is read once


# ---- in order


def test_sequential_loader_is_in_order():
    for loader in (DataLoader(TENSORS, batch_size=B, shuffle=True), DataLoader(TENSORS, B, sampler=Backwards())):
        batches = list(sequential_loader(loader))
        assert [len(index) for *_, index in batches] == [4] * 5 + [2]
        assert order(batches) == list(range(N))


@pytest.mark.parametrize("world_size", [1, 2, 3, 22])
def test_each_sample_is_in_order_on_one_rank_only(world_size):
    loader = DataLoader(TENSORS, batch_size=B)
    shares = [sequential_loader(loader, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(chain.from_iterable(map(order, shares))) == list(range(N))
    assert [order(share) for share in shares] == [list(range(rank, N, world_size)) for rank in range(world_size)]
    assert [len(share.sampler) for share in shares] == [len(order(share)) for share in shares]
    with pytest.raises(UserError, match="a validation sample for each of 23 processes, got 22"):
        sequential_loader(loader, world_size=23)


@pytest.mark.parametrize(("total", "block"), [(70, 4), (96, 4), (3, 4), (0, 4)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_groups_of_whole_blocks(monkeypatch, total, block, world_size):
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    found = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(distributed.my_blocks(total, block))
    assert [*chain.from_iterable(found)] == [(low, min(low + block, total)) for low in range(0, total, block)]
    assert all(blocks[0][0] % (4 * block) == 0 for blocks in found if blocks)
    assert max(map(len, found)) - min(map(len, found)) <= 2 * 4


def test_blocks_are_batches():
    loader = rows_loader(DataLoader(TENSORS, batch_size=3, shuffle=True, drop_last=True), [range(2, 9), range(20, 22)])
    assert len(loader) == 2
    assert [index.tolist() for *_, index in loader] == [list(range(2, 9)), [20, 21]]
    assert all(torch.equal(x, X[index]) for x, _, index in loader)


# ---- what can be known to be wrong


@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda loader: [loader], lambda loader: (loader,)])
def test_a_dataset_that_will_do(wrap):
    loader = wrap(DataLoader(TENSORS, batch_size=B))
    assert check_dataset(loader, "train_dataloader") == N
    assert isinstance(single_loader(loader), DataLoader)
    assert check_dataset(DataLoader(Items([X[0], 1])), "val_dataloader") == 1


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream()), r"`val_dataloader\(\)` to be map-style .*got the iterable Stream\. .*map-style dataset"),
        (DataLoader(ChainDataset([Stream()])), "got the iterable ChainDataset"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), r"`val_dataloader\(\)` to hold samples, got an empty TensorDataset"),
        (DataLoader(Items((X, Y, Y))), r"`val_dataloader\(\)` to be \(x, y\), got 3 values\. The index is added"),
        (DataLoader(Items((X,))), "got 1 values"),
        (DataLoader(Items(X)), "got Tensor"),
        (DataLoader(Items({"x": X, "y": Y})), r"the key 'labels' in batches of `val_dataloader\(\)`, got 'x', 'y'"),
        ([DataLoader(TENSORS)] * 2, r"`val_dataloader\(\)` to return one torch DataLoader, got list"),
        ([], "one torch DataLoader, got list"),
        ([TENSORS], "one torch DataLoader, got TensorDataset"),
        ({"a": DataLoader(TENSORS)}, "one torch DataLoader, got dict"),
        (None, "one torch DataLoader, got NoneType"),
    ],
)
def test_a_loader_that_will_not_do(loader, message):
    with pytest.raises(UserError, match=message):
        check_dataset(loader, "val_dataloader")


def test_a_loader_that_makes_no_batches():
    loader = DataLoader(TENSORS, batch_size=None)
    with pytest.raises(UserError, match="batch_size"):
        check_dataset(loader, "train_dataloader")


def test_only_takes_a_list_of_one():
    assert single_loader([5]) == single_loader((5,)) == single_loader(5) == 5
    assert single_loader([5, 6]) == [5, 6]


@dataclass
class Named:
    x: torch.Tensor


class Graph:
    """As of PyG."""

    def __init__(self, x):
        self.x = x

    def to_dict(self):
        return {"x": self.x}


@pytest.mark.parametrize(
    ("change", "random"),
    [
        (lambda x: x, False),
        (lambda x: x + 1, False),
        (lambda x: x + torch.rand(()), True),
        (lambda x: x if x[0] < 6 else x + torch.rand(()), True),  # only some samples: here the third
        (lambda x: (x, x + torch.rand(())), True),
        (lambda x: x.numpy() + np.random.rand(), True),
        (lambda x: x * float("nan"), False),
        (lambda x: Named(x), False),
        (lambda x: Named(x + torch.rand(())), True),
        (lambda x: Graph(x + torch.rand(())), True),
        (lambda x: Image.fromarray(np.random.default_rng().integers(0, 9, (2, 2), np.uint8)), True),
    ],
    ids=[
        "as it is",
        "changed",
        "random",
        "random later",
        "random part",
        "random array",
        "not a number",
        "a dataclass",
        "a random dataclass",
        "a random graph",
        "a random image",
    ],
)
def test_is_random(change, random):
    assert is_random(Plain(change)) is random
