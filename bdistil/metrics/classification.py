"""What an ordered ensemble is measured by: accuracy of each prefix, and the curve of accuracy against cost."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class PrefixScores(Metric):
    """Accuracy and mean cross entropy of K predictors on the same samples.

    Args:
        predictors: K, for example the number of prefixes.
    """

    full_state_update = False
    right: Tensor
    entropy: Tensor
    samples: Tensor

    def __init__(self, predictors: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("right", "entropy"):
            self.add_state(name, torch.zeros(predictors, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: (K, B, L).
            target: class numbers (B,).
        """
        flat = logits.float().flatten(0, 1)
        entropy = F.cross_entropy(flat, target.repeat(len(logits)), reduction="none").view(len(logits), -1)
        self.right += (logits.argmax(-1) == target).sum(-1)
        self.entropy += entropy.sum(-1)
        self.samples += len(target)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Accuracy in 0 … 1 and mean cross entropy in nats, both (K,), or () for K = 1 as torchmetrics squeezes it."""
        return self.right / self.samples, self.entropy / self.samples
