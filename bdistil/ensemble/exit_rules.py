"""Exit rules: how sure an answer is, and at which confidence a sample is decided.

A rule gives each sample a number in 0 … 1, larger where the answer is surer; a sample is decided at a stage where the
number reaches the stage's threshold. The last stage decides all that is left.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["max_prob", "margin", "entropy", "agreement"]
RULES: tuple[Rule, ...] = get_args(Rule)
NEVER = 2.0  # a threshold that no sample reaches
REGISTER = 16  # float32 in 512 bits


def confidence_of(logits: Tensor, rule: Rule, temperature: float = 1.0, votes: Tensor | None = None) -> Tensor:
    """How sure the answers of a prefix are.

    ``max_prob`` is the largest softmax probability, ``margin`` its distance to the second, ``entropy`` is 1 - H / ln L,
    ``agreement`` the share of the prefix's students whose own answer is that of the prefix; one student alone agrees
    with nobody, so it is 0 at the first stage.

    Args:
        logits: (B, L).
        rule: one of `RULES`.
        temperature: the logits are divided by it; agreement does not ask for it.
        votes: (B, L), how many of the students answer each class; only for agreement.

    Returns:
        (B,) in 0 … 1.
    """
    if rule == "agreement":
        assert votes is not None
        chosen = votes.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
        count = votes.sum(1)
        return torch.where(count > 1, chosen / count.clamp(min=1), torch.zeros_like(chosen))
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    probability = _softmax(scaled)
    if rule == "max_prob":
        return probability.amax(-1)
    if rule == "margin":
        first, second = probability.topk(2, -1).values.unbind(-1)
        return first - second
    entropy: Tensor = -torch.special.xlogy(probability, probability).sum(-1)
    return 1 - entropy / math.log(logits.shape[-1])


def _softmax(logits: Tensor) -> Tensor:
    """Over the classes of (B, L). Over the last dimension torch is slow where it does not fill a vector register."""
    return torch.softmax(logits, -1) if logits.shape[-1] >= REGISTER else torch.softmax(logits.t(), 0).t()


def add_votes(votes: Tensor | None, logits: Tensor) -> Tensor:
    """Counts the answers of one more student: votes (B, L), None before the first; its own logits (B, L)."""
    vote = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return vote if votes is None else votes + vote
