"""Randomness as a pure function of what it is for: nothing is saved, and a restart draws the same numbers."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_of(*key: object) -> int:
    """A 32-bit seed for a key such as (seed, round, epoch, rank): equal keys, equal seeds, on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def reseed(*key: object) -> None:
    """Seeds Python, NumPy and torch (all devices that are here) from a key."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, but for a note to each kind of device for when it appears, which takes a millisecond
        torch.default_generator.manual_seed(seed)
