"""Calibrated confidences: a temperature for each prefix, and weights of the students."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds of a temperature: it tends to 0 for a prefix that is correct on all samples, to infinity for a random one.
LOWEST, HIGHEST = 0.05, 20.0
BINS = 15


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the cross entropy of softmax(logits / T) (Guo et al., arXiv 1706.04599).

    Labels are smoothed by 1 / (N + 1), as if one of N + 1 were drawn from all classes: otherwise T would tend to 0 if
    all of a few samples are correct. The cross entropy is convex in 1 / T; its slope, the mean of E_p[z] - z_label, is
    bisected.

    Logits are (N, L), labels (N,); the temperature is in 0.05 … 20.
    """
    logits = logits.double()
    of_label = (logits.gather(1, labels[:, None]).sum() + logits.mean()) / (len(logits) + 1)
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(50):
        middle = (low * high) ** 0.5
        slope = (torch.softmax(middle * logits, -1) * logits).sum(-1).mean() - of_label
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(1 / (low * high) ** 0.5)


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Expected calibration error of softmax(logits / temperature), in 15 equal bins; logits (N, L), labels (N,)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    probability = torch.softmax(logits / temperature, -1)
    return float(multiclass_calibration_error(probability, labels, logits.shape[-1], n_bins=BINS))


def weighted_prefixes(own: Tensor, weights: Tensor) -> Tensor:
    """Logits (T, N, L) of the prefixes: means, weighted by (T,), of the students' logits `own` (T, N, L) up to each."""
    return (own * weights[:, None, None]).cumsum(0) / weights.cumsum(0)[:, None, None]


def fit_weights(own: Tensor, labels: Tensor) -> list[float]:
    """Weights of the students that minimise the mean cross entropy of all prefixes, each with its own temperature.

    `own` are the logits (T, N, L) of the individual students, in the teacher's units. The weight of the first is 1.
    """
    own = own.double()
    free = torch.zeros(2, len(own), dtype=torch.float64, requires_grad=True)  # logarithms of weights and of 1 / T
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def weights() -> Tensor:
        return (free[0] - free[0, 0]).clamp(-3, 3).exp()

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = weighted_prefixes(own, weights()) * free[1].exp()[:, None, None]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(own)))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights().tolist()


def winning_weights(own: Tensor, labels: Tensor) -> list[float]:
    """Returns `fit_weights` if they are better than equal weights on held-out samples; otherwise an empty list.

    Weights and temperatures are fitted on one half of the samples and applied to the other, and vice versa. They are
    better if the mean cross entropy of the prefixes is lower and their mean accuracy higher than with equal weights.
    """
    even = torch.arange(len(labels)) % 2 == 0
    entropy, accuracy = [0.0, 0.0], [0.0, 0.0]  # with fitted and with equal weights
    for half in (even, ~even):
        for row, weights in enumerate((fit_weights(own[:, ~half], labels[~half]), [1.0] * len(own))):
            logits = weighted_prefixes(own.double(), torch.tensor(weights, dtype=torch.float64))
            temperatures = [fit_temperature(prefix, labels[~half]) for prefix in logits[:, ~half]]
            scaled = logits[:, half] / torch.tensor(temperatures)[:, None, None]
            entropy[row] += float(F.cross_entropy(scaled.flatten(0, 1), labels[half].repeat(len(own))))
            accuracy[row] += float((scaled.argmax(-1) == labels[half]).double().mean())
    won = entropy[0] < entropy[1] and accuracy[0] > accuracy[1]
    return fit_weights(own, labels) if won else []
