"""Seeds as a pure function of a key: no random state is saved, and a restart draws the same numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


def seed_of(*key: object) -> int:
    """A 32-bit seed for a key such as (seed, round, epoch, rank); the same on every machine.

    >>> seed_of(0, "round", 1) == seed_of(0, "round", 1) != seed_of(0, "round", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def reseed(*key: object) -> None:
    """Seeds Python, NumPy and torch (on all devices) from a key."""
    seed_cpu(seed := seed_of(*key))
    if torch.accelerator.is_available():
        torch.manual_seed(seed)


@contextmanager
def drawn_from(*key: object) -> Iterator[None]:
    """Context that seeds the CPU generators of Python, NumPy and torch from a key and restores them afterwards."""
    with isolate_rng(include_cuda=False):
        seed_cpu(seed_of(*key))
        yield


def seed_cpu(seed: int) -> None:
    """Seeds Python, NumPy and torch on the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
