"""The table of patients and its split."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from bdistil.data.diabetes import Diabetes, read_diabetes
from bdistil.errors import UserError


def test_the_patients_are_those_of_scikit_learn():
    x, y = read_diabetes()
    bunch = load_diabetes(scaled=False)
    np.testing.assert_allclose(x.numpy(), bunch.data, rtol=1e-6)
    np.testing.assert_array_equal(y.numpy(), bunch.target)
    data = Diabetes()
    data.setup()
    parts = [part.tensors for part in data.parts.values()]
    assert [len(y) for _, y in parts] == [264, 89, 89]
    np.testing.assert_allclose(parts[0][0].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(parts[0][0].std(0), 1, atol=1e-5)
    assert sorted(torch.cat([y for _, y in parts]).tolist()) == sorted(bunch.target)


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="of 442 patients, got 300, 89"):
        Diabetes(validation=300)
