"""Confidences that mean what they say: a temperature for each prefix, and weights of the students."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A prefix that is right on all samples would ask for the temperature 0, one at random for infinity.
LOWEST, HIGHEST = 0.05, 20.0
BINS = 15


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which softmax(logits / T) has the least cross entropy.

    The cross entropy is convex in 1 / T (temperature scaling, Guo et al., arXiv 1706.04599), so its slope there is
    bisected: the mean of E_p[z] - z_label.

    Args:
        logits: (N, L).
        labels: (N,).

    Returns:
        In 0.05 … 20.
    """
    logits = logits.double()
    of_label = logits.gather(1, labels[:, None]).mean()
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(50):
        middle = (low * high) ** 0.5
        slope = (torch.softmax(middle * logits, -1) * logits).sum(-1).mean() - of_label
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(1 / (low * high) ** 0.5)


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Expected calibration error: the distance of confidence and accuracy over 15 equal bins, weighed by samples.

    Args:
        logits: (N, L).
        labels: (N,).
        temperature: of the logits.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    probability = torch.softmax(logits / temperature, -1)
    return float(multiclass_calibration_error(probability, labels, logits.shape[-1], n_bins=BINS))


def weighted_prefixes(own: Tensor, weights: Tensor) -> Tensor:
    """Logits of the prefixes: the weighted mean of the students up to each, (T, N, L).

    Args:
        own: (T, N, L), of the students alone.
        weights: (T,), > 0.
    """
    return (own * weights[:, None, None]).cumsum(0) / weights.cumsum(0)[:, None, None]


def fit_weights(own: Tensor, labels: Tensor) -> list[float]:
    """Weights of the students with the least mean cross entropy of all prefixes, each with a temperature of its own.

    Args:
        own: (T, N, L), of the students alone, in the teacher's units.
        labels: (N,).

    Returns:
        One weight a student; that of the first is 1.
    """
    own = own.double()
    free = torch.zeros(2, len(own), dtype=torch.float64, requires_grad=True)  # logarithms of weights and of 1 / T
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _mean_entropy(own, labels, _weights(free[0]), free[1].exp())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return [float(w) for w in _weights(free[0].detach())]


def _weights(logarithms: Tensor) -> Tensor:
    return (logarithms - logarithms[0]).clamp(-3, 3).exp()


def _mean_entropy(own: Tensor, labels: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    logits = weighted_prefixes(own, weights) * inverse[:, None, None]
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(own)))


def winning_weights(own: Tensor, labels: Tensor) -> list[float]:
    """Fitted weights where they win on samples that they were not fitted on; else none.

    Each half of the samples is answered with weights and temperatures fitted on the other. They win when the mean cross
    entropy of the prefixes is lower than with equal weights, and their mean accuracy higher.

    Args:
        own: (T, N, L), of the students alone, in the teacher's units.
        labels: (N,).

    Returns:
        One weight a student, or an empty list.
    """
    equal = [1.0] * len(own)
    entropy, accuracy = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for fold in (0, 1):
        there = torch.arange(len(labels)) % 2 == fold
        for row, weights in enumerate((fit_weights(own[:, ~there], labels[~there]), equal)):
            loss, right = _held_out(own, labels, torch.tensor(weights, dtype=torch.float64), there)
            entropy[row] += loss
            accuracy[row] += right
    won = bool(entropy[0] < entropy[1] and accuracy[0] > accuracy[1])
    return fit_weights(own, labels) if won else []


def _held_out(own: Tensor, labels: Tensor, weights: Tensor, there: Tensor) -> tuple[float, float]:
    """Cross entropy and accuracy over all prefixes on some samples, with temperatures of the others."""
    logits = weighted_prefixes(own.double(), weights)
    temperatures = temperatures_of(logits[:, ~there], labels[~there])
    scaled = logits[:, there] / torch.tensor(temperatures)[:, None, None]
    loss = F.cross_entropy(scaled.flatten(0, 1), labels[there].repeat(len(own)))
    return float(loss), float((scaled.argmax(-1) == labels[there]).double().mean())


def temperatures_of(prefixes: Tensor, labels: Tensor) -> Sequence[float]:
    """The temperature of each prefix; logits (T, N, L), labels (N,)."""
    return [fit_temperature(logits, labels) for logits in prefixes]
