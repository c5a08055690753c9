"""Teachers: frozen, asked once for every sample, in no checkpoint."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


class FrozenTeacher(nn.Module):
    """Any ``nn.Module`` (x -> logits) as a teacher: never in train mode, never a gradient.

    The wrapped module is frozen in place: its parameters stop asking for gradients and it is put into eval mode.

    Args:
        module: maps a batch x (B, ...) to logits (B, L).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) of a batch, without a graph."""
        logits: Tensor = self.module(x)
        return logits

    @property
    def fingerprint(self) -> str:
        """Sha256 over names and values of all weights and buffers: says whether two teachers are the same."""
        digest = hashlib.sha256()
        for name, value in self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
