"""Seeds are a function of what they are for, on every device that is here."""

import random

import numpy as np
import pytest
import torch

from bdistil.utils.seeding import reseed, seed_of


@pytest.mark.parametrize("devices", [False, True])
def test_reseeding_is_what_torch_does(monkeypatch, devices):
    seeded, original = [], torch.manual_seed
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeded.append(seed) or original(seed))
    reseed("round", 3)
    found = random.random(), np.random.random(), torch.rand(3).tolist()
    seed = seed_of("round", 3)
    assert seeded == ([seed] if devices else []), "each of the devices is seeded where there are any"
    random.seed(seed)
    np.random.seed(seed)
    original(seed)
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == found
