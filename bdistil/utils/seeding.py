"""Seeds as a pure function of a key: no random state is saved, and a restart draws the same numbers."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_of(*key: object) -> int:
    """A 32-bit seed for a key such as (seed, round, epoch, rank); the same on every machine.

    >>> seed_of(0, "round", 1) == seed_of(0, "round", 1) != seed_of(0, "round", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def reseed(*key: object) -> None:
    """Seeds Python, NumPy and torch (on all devices) from a key."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, without seeds for devices that may appear later, which take a millisecond
        torch.default_generator.manual_seed(seed)
