"""Quality of predictions: accuracy and cross entropy of classifiers, R² and rms error of real outputs."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

Task = Literal["classification", "regression"]


def score_name(task: str) -> str:
    """Name of the score in the columns `val_accuracy` and `test_accuracy`.

    Example:
        >>> score_name("classification"), score_name("regression")
        ('accuracy', 'R²')
    """
    return "R²" if task == "regression" else "accuracy"


class PrefixScores(Metric):
    """Accuracy and mean cross entropy of K predictors on the same samples.

    Args:
        predictors: K, for example the number of prefixes.

    Example:
        >>> scores = PrefixScores(predictors=2)
        >>> logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0]], [[4.0, 0.0], [0.0, 4.0]]])
        >>> scores.update(logits, torch.tensor([0, 1]))
        >>> accuracy, entropy = scores.compute()
        >>> accuracy.tolist(), [round(value, 3) for value in entropy.tolist()]
        ([0.5, 1.0], [2.018, 0.018])
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


def output_sums(answers: Tensor, labels: Tensor) -> Tensor:
    """Sums of a batch for `output_figures`; the sums of several batches add up.

    Args:
        answers: (..., B, L).
        labels: (B, L).

    Returns:
        (..., 3, L + 1): squared errors, labels and squared labels of each output; the last column counts samples.

    Example:
        >>> output_sums(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]])).tolist()
        [[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]
    """
    errors = (answers - labels).square().sum(-2)
    labelled = torch.stack((labels.sum(0), labels.square().sum(0))).expand(*errors.shape[:-1], 2, -1)
    sums = torch.cat((errors[..., None, :], labelled), -2)
    return torch.cat((sums, sums.new_full((*sums.shape[:-1], 1), len(labels))), -1)


def output_figures(sums: Tensor, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """R² and rms error, both (...), from the sums of `output_sums`.

    Both are means over the outputs, as in `r2_score` and `root_mean_squared_error` of scikit-learn.

    Args:
        sums: (..., 3, L + 1).
        scale: size of one unit of answers and labels in the units of the rms error, for each output (L,).

    Example:
        >>> r2, rms = output_figures(output_sums(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]])))
        >>> round(float(r2), 3), round(float(rms), 3)
        (-1.0, 0.707)
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

    Example:
        >>> errors = PrefixErrors(predictors=2)
        >>> errors.update(torch.tensor([[[1.0], [3.0]], [[1.0], [2.0]]]), torch.tensor([1.0, 2.0]))
        >>> errors.compute()[0].tolist()
        [-1.0, 1.0]
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, predictors: int = 1, outputs: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        blank = torch.zeros(predictors, 3, outputs + 1, dtype=torch.float64)
        self.add_state("sums", blank, dist_reduce_fx="sum")

    def update(self, answers: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            answers: (K, B, L).
            target: (B,) or (B, L).
        """
        self.sums += output_sums(answers.double(), target.reshape(answers.shape[1:]).double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """R² and rms error, both (K,), or () for K = 1 as torchmetrics squeezes it."""
        return output_figures(self.sums)


PrefixMetric = PrefixScores | PrefixErrors


def prefix_metric(task: Task, outputs: int, predictors: int = 1) -> PrefixMetric:
    """Metric for K predictors of L outputs, which counts the samples of this process only."""
    if task == "regression":
        return PrefixErrors(predictors, outputs, sync_on_compute=False)
    return PrefixScores(predictors, sync_on_compute=False)
