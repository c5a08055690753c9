"""What is measured of real outputs in place of accuracy and cross entropy: R² and rms error on the labels.

Both are means over the outputs of what each of them has, as `r2_score` and `root_mean_squared_error` of scikit-learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def as_columns(labels: Tensor, outputs: int) -> Tensor:
    """Labels (B,) or (B, L) as (B, L)."""
    return labels.reshape(len(labels), outputs)


def output_sums(answers: Tensor, labels: Tensor) -> Tensor:
    """Sums of a batch, which add up over batches.

    Args:
        answers: (..., B, L).
        labels: (B, L).

    Returns:
        (..., 3, L + 1): squared errors, labels and squared labels an output; the last column counts samples.
    """
    errors = (answers - labels).square().sum(-2)
    labelled = torch.stack((labels.sum(0), labels.square().sum(0))).expand(*errors.shape[:-1], 2, -1)
    sums = torch.cat((errors[..., None, :], labelled), -2)
    return torch.cat((sums, sums.new_full((*sums.shape[:-1], 1), len(labels))), -1)


def output_figures(sums: Tensor, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """R² and rms error of sums as of `output_sums`, both (...).

    Args:
        sums: (..., 3, L + 1).
        scale: of each output (L,), what one unit of answers and labels is in those of the rms error.
    """
    samples = sums[..., 0, -1:]
    errors, labels, squares = sums[..., :-1].unbind(-2)
    spread = squares - labels.square() / samples
    return (1 - errors / spread).mean(-1), ((errors / samples).sqrt() * scale).mean(-1)


class PrefixErrors(Metric):
    """R² and rms error of K predictors of L real outputs on the same samples.

    Args:
        predictors: K.
        outputs: L.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, predictors: int = 1, outputs: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        blank = torch.zeros(predictors, 3, outputs + 1, dtype=torch.float64)
        self.add_state("sums", blank, dist_reduce_fx="sum")
        self.outputs = outputs

    def update(self, answers: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            answers: (K, B, L).
            target: (B,) or (B, L).
        """
        self.sums += output_sums(answers.double(), as_columns(target, self.outputs).double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """R² and rms error, both (K,), or () for K = 1 as torchmetrics squeezes it."""
        return output_figures(self.sums)
