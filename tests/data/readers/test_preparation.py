"""Standardisation and windows of time series."""

import numpy as np
import pytest
import torch

from bdistil.data.readers import moments, windows


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
