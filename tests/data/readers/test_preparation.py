"""Standardisation and windows of time series."""

import numpy as np
import pytest
import torch

from bdistil.data.readers import moments, share_split, stratified_split, windows


def test_moments_are_those_of_all_steps():
    series = [torch.randn(5, 2) * 3 + 1, torch.randn(9, 2)]
    mean, spread = moments(series)
    steps = np.concatenate([s.numpy() for s in series])
    np.testing.assert_allclose(mean, steps.mean(0), rtol=1e-5)
    np.testing.assert_allclose(spread, steps.std(0), rtol=1e-5)


def test_a_channel_that_does_not_move_is_divided_by_one():
    assert moments([torch.full((4, 1), 7.0)])[1].tolist() == [1.0]


@pytest.mark.parametrize(("steps", "length", "hop"), [(20, 5, 3), (20, 20, 7), (21, 4, 4), (6, 7, 2)])
def test_windows_are_slices(steps, length, hop):
    values = torch.arange(steps * 2.0).view(steps, 2)
    found = windows(values, length, hop)
    expected = [values[low : low + length] for low in range(0, steps - length + 1, hop)]
    assert found.shape == (len(expected), length, 2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("sizes", [(300, 90), (90, 0), (30, 300)])
def test_a_rare_class_keeps_training_samples(sizes):
    labels = torch.tensor([0] * 1000 + [1] * 5 + [2] * 2 + [3])
    train, val, test = stratified_split(labels, sizes, seed=1)
    assert sorted(torch.cat((train, val, test)).tolist()) == list(range(len(labels)))
    assert labels[train].unique().tolist() == [0, 1, 2, 3]
    assert labels[train].bincount()[1:].tolist() == [1, 1, 1]
    assert labels[val].bincount(minlength=4)[0] == sizes[0] // 4  # the others are as many as was asked for


@pytest.mark.parametrize("shares", [(0.2,), (0.15, 0.15), (0.4, 0.4), ()])
def test_a_split_by_shares_is_of_every_class_and_leaves_none_without_training_samples(shares):
    labels = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    labels = torch.cat((labels, torch.tensor([7, 8, 8])))
    train, *parts = share_split(labels, shares, seed=3)
    assert sorted(torch.cat((train, *parts)).tolist()) == list(range(len(labels)))
    assert labels[train].unique().tolist() == labels.unique().tolist()
    for part, share in zip(parts, shares, strict=True):
        counts = labels[part].bincount(minlength=9)[:3] - share * labels.bincount()[:3]
        assert counts.abs().max() <= 1
    again, other = share_split(labels, shares, seed=3), share_split(labels, shares, seed=4)
    assert all(torch.equal(*pair) for pair in zip([train, *parts], again, strict=True))
    assert not shares or not torch.equal(train, other[0])
