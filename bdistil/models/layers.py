"""TODO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channels times a factor, one at least."""
    return [max(1, round(count * width)) for count in channels]


class Classifier(nn.Module):
    """A body, dropout and a linear head.

    Args:
        body: maps x (B, ...) to features (B, D).
        features: D.
        outputs: L.
        dropout: before the head.
    """

    def __init__(self, body: nn.Module, features: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.body, self.dropout, self.head = body, nn.Dropout(dropout), nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of x (B, ...)."""
        logits: Tensor = self.head(self.dropout(self.body(x)))
        return logits


class ChannelsFirst(nn.Module):
    """Sequences as convolutions want them."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, M) of (B, M, C)."""
        return x.transpose(1, 2)


class InputNoise(nn.Module):
    """Adds Gaussian noise in training, against overfitting of a small data set.

    Args:
        deviation: of the noise.
    """

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        """x with noise, of the same shape; x itself in eval mode."""
        return x + self.deviation * torch.randn_like(x) if self.training and self.deviation else x


class SequenceClassifier(Classifier):
    """A classifier of sequences (B, M, C) that sees noise in training.

    Args:
        body: maps sequences to features (B, D).
        features: D.
        outputs: L.
        dropout: before the head.
        noise: standard deviation of what is added to the input in training.
    """

    def __init__(self, body: nn.Module, features: int, outputs: int, dropout: float, noise: float) -> None:
        super().__init__(body, features, outputs, dropout)
        self.noise = InputNoise(noise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of sequences (B, M, C)."""
        return super().forward(self.noise(x))
