"""The arithmetic of progressive ensemble distillation: functions of tensors, no state.

Letters: N samples of the training part, B samples of a batch, L outputs (classes), T rounds.
All functions are differentiable and keep the dtype and device of what they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Under this value the logarithm of the barrier goes on as its tangent (see `log_barrier_loss`).
BARRIER_FLOOR = 1e-3


def log_normaliser(error: Tensor, eta: float, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of Z_j = sum_i exp(-eta S_ij) + exp(eta S_ij), safe at any size of eta S.

    Args:
        error: running error S of the ensemble, shape (N, L), or any part of its rows.
        eta: step size of the game, > 0.
        dtype: in which the terms are added up; by default that of `error`.

    Returns:
        Shape (L,). Parts of the rows are joined with ``torch.logaddexp`` or ``torch.logsumexp``.
    """
    scaled = eta * error
    largest = scaled.detach().abs().amax(0)
    terms = torch.exp(scaled - largest) + torch.exp(-scaled - largest)
    return largest + terms.sum(0, dtype=dtype).log()


def game_rows(error: Tensor, log_z: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Rows of the two distributions of the game, given the normaliser of all N rows.

    Args:
        error: rows of S, shape (B, L).
        log_z: `log_normaliser` of all N rows, shape (L,).
        eta: step size of the game.

    Returns:
        (up, down), both (B, L): the weight where the ensemble is too low, and where it is too high.
    """
    scaled = eta * error
    return torch.exp(-scaled - log_z), torch.exp(scaled - log_z)


def game_weights(error: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The two distributions over samples, K+ and K-, in closed form.

    K+_ij = exp(-eta S_ij) / Z_j and K-_ij = exp(eta S_ij) / Z_j. This equals the multiplicative update
    of B-DISTIL (arXiv 2302.10093), round after round, with S = sum over earlier rounds of (f_s - g).

    Args:
        error: S, shape (N, L).
        eta: step size of the game, > 0.

    Returns:
        (up, down), both (N, L), with ``up.sum(0) + down.sum(0) == 1``.
    """
    return game_rows(error, log_normaliser(error, eta), eta)


def margins(error: Tensor, deviation: Tensor, eta: float) -> Tensor:
    """How far a student goes the right way: m_j = sum_i (K+_ij - K-_ij) (f - g)_ij.

    The convergence proof of the game needs m_j >= 0 of every student.

    Args:
        error: S before the student, shape (N, L).
        deviation: f - g of the student, shape (N, L).
        eta: step size of the game.

    Returns:
        Shape (L,).
    """
    up, down = game_weights(error, eta)
    return ((up - down) * deviation).sum(0)


def prefix_error(answer: Tensor, target: Tensor, error: Tensor, earlier: int) -> Tensor:
    """Error of the prefix that ends with a new student: the mean of its students less g, (S + f - g) / (t + 1).

    Adding g gives the logits of that prefix.

    Args:
        answer: f, logits of the new student, shape (B, L).
        target: g, shape (B, L).
        error: S before the student, shape (B, L).
        earlier: t, the number of students before it.

    Returns:
        Shape (B, L).

    Example:
        >>> prefix_error(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[2.0]]), earlier=1)
        tensor([[2.]])
    """
    return (error + answer - target) / (earlier + 1)


def _log_with_tangent(value: Tensor) -> Tensor:
    """log(value), continued below `BARRIER_FLOOR` by its tangent: finite, and its gradient never vanishes.

    With v' = max(v, floor) that is log(v') + (v - v')/floor on both sides.
    """
    safe = value.clamp_min(BARRIER_FLOOR)
    return torch.log(safe) + (value - safe) / BARRIER_FLOOR


def log_barrier_loss(
    deviation: Tensor, up: Tensor, down: Tensor, *, population: int, bound: float, gamma: float
) -> Tensor:
    """The loss of one round (FIND-WL): squared error to the teacher, and a log barrier on the game's margins.

    With p_j = (N/B) sum_i K+_ij d_ij and n_j = -(N/B) sum_i K-_ij d_ij over the batch,
    loss = mean(d^2) - (1/gamma) mean_j [log(1 + p_j/2b) + log(1 + n_j/2b)].
    Over the full set |f|, |g| <= b/2 keeps both arguments positive; a batch estimate can fall below,
    so the logarithm goes on as its tangent there.

    Args:
        deviation: d = f - g on the batch, shape (B, L).
        up: rows of K+, shape (B, L).
        down: rows of K-, shape (B, L).
        population: N, the number of samples that K+ and K- are normalised over.
        bound: b = 2 max|g|.
        gamma: weight of the squared error against the barrier; ``math.inf`` switches the barrier off.

    Returns:
        The loss, shape ().
    """
    share = population / (len(deviation) * 2.0 * bound)
    rise = 1.0 + share * (up * deviation).sum(0)
    fall = 1.0 - share * (down * deviation).sum(0)
    barrier = _log_with_tangent(torch.stack((rise, fall))).sum(0).mean()
    return deviation.square().mean() - barrier / gamma


def gamma_of(eta: float, kappa: float, bound: float) -> float:
    """The gamma at which a student aims at g - kappa S for small eta S: gamma = eta / (4 b kappa).

    Args:
        eta: step size of the game.
        kappa: correction strength; 0 is plain averaging (gamma is infinite), 1 repairs the whole error.
        bound: b = 2 max|g|.
    """
    return eta / (4.0 * bound * kappa) if kappa > 0 else float("inf")
