"""Confidence scores by which samples exit early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RULES = ("max_prob", "margin", "entropy", "agreement")


def confidence_of(logits: Array, rule: str, scale: float | Array = 1.0, votes: Array | None = None) -> Array:
    """Confidence of the answers of a prefix.

    Args:
        logits: (B, L).
        rule: one of `RULES`.
        scale: factor on the logits, for example 1 / temperature; a number, or one per sample (B,).
        votes: (B, L), number of students that predict each class; only for agreement.

    Returns:
        (B,) in 0 … 1.
    """
    if rule == "agreement":
        assert votes is not None
        chosen, count = votes[np.arange(len(votes)), logits.argmax(1)], votes.sum(1)
        return np.where(count > 1, chosen / np.maximum(count, 1), 0)
    exponents = logits.T.copy()  # the classes come first: NumPy is slow along a short last dimension
    exponents -= np.maximum.reduce(exponents, 0)
    exponents *= scale
    powers = np.exp(exponents)
    total: Array = np.add.reduce(powers, 0)
    if rule == "max_prob":
        return 1 / total
    if rule == "margin":
        return np.asarray((1 - np.partition(powers, -2, 0)[-2]) / total)
    entropy = np.log(total) - np.add.reduce(powers * exponents, 0) / total
    return np.asarray(1 - entropy / math.log(logits.shape[1]))


def confidence_of_one(logits: Sequence[float], rule: str, scale: float) -> float:
    """Confidence of one sample in Python floats: for ten classes this takes less time than one NumPy call.

    Args:
        logits: (L).
        rule: one of `RULES` except agreement.
        scale: factor on the logits.
    """
    largest = max(logits)
    powers = [math.exp((logit - largest) * scale) for logit in logits]
    total = sum(powers)
    if rule == "max_prob":
        return 1 / total
    if rule == "margin":
        return (1 - sorted(powers)[-2]) / total
    mean = sum(power * (logit - largest) for power, logit in zip(powers, logits)) * scale / total  # noqa: B905
    return 1 - (math.log(total) - mean) / math.log(len(logits))


def add_votes(votes: Array | None, logits: Array) -> Array:
    """Adds the predictions of one more student, from its logits (B, L), to the votes (B, L); None before the first."""
    votes = np.zeros(logits.shape, np.float32) if votes is None else votes.copy()
    votes[np.arange(len(logits)), logits.argmax(1)] += 1
    return votes
