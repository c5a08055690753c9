"""Formulas of B-DISTIL (arXiv 2302.10093): game weights, margins and the loss of a boosting round.

Letters: N samples of the training part, B samples of a batch, L outputs (classes), g teacher logits, f_t student t,
S = sum of (f_s - g) over the earlier students. Tensors stay on their device; sums over samples are
computed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdistil.functional.distillation import at_least_float32

# Below this value the logarithm of the barrier is continued by its tangent (see `log_barrier_loss`).
BARRIER_FLOOR = 1e-3


def log_normaliser(error: Tensor, eta: float, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of Z_j = sum_i exp(-eta S_ij) + exp(eta S_ij), without overflow.

    Args:
        error: running error S of the ensemble, shape (N, L), or any part of its rows.
        eta: step size of the game, > 0.
        dtype: dtype of the sum; that of `error` by default, at least float32.

    Returns:
        Shape (L,). Values for parts of the rows combine by ``torch.logaddexp`` or ``torch.logsumexp``.

    Example:
        >>> log_normaliser(torch.zeros(5, 2), eta=0.5).exp()
        tensor([10., 10.])
    """
    scaled = eta * at_least_float32(error)
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

    Example:
        >>> error = torch.zeros(4, 2)
        >>> up, down = game_rows(error[:1], log_normaliser(error, eta=0.5), eta=0.5)
        >>> up, down
        (tensor([[0.1250, 0.1250]]), tensor([[0.1250, 0.1250]]))
    """
    scaled = eta * at_least_float32(error)
    return torch.exp(-scaled - log_z), torch.exp(scaled - log_z)


def game_weights(error: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The two distributions over samples, K+ and K-, in closed form.

    K+_ij = exp(-eta S_ij) / Z_j and K-_ij = exp(eta S_ij) / Z_j. This equals the multiplicative update
    of B-DISTIL (arXiv 2302.10093), round after round.

    Args:
        error: S, shape (N, L).
        eta: step size of the game, > 0.

    Returns:
        (up, down), both (N, L), with ``up.sum(0) + down.sum(0) == 1``.

    Example:
        >>> up, down = game_weights(torch.tensor([[-1.0], [0.0], [1.0]]), eta=0.5)
        >>> up.squeeze(), down.squeeze()  # the weight is on samples that are too low, and on those too high
        (tensor([0.2532, 0.1536, 0.0932]), tensor([0.0932, 0.1536, 0.2532]))
    """
    return game_rows(error, log_normaliser(error, eta), eta)


def margins(error: Tensor, deviation: Tensor, eta: float) -> Tensor:
    """Margins of a student: m_j = sum_i (K+_ij - K-_ij) (f - g)_ij, positive where it corrects the ensemble.

    The convergence proof of the game needs m_j >= 0 for every student.

    Args:
        error: S before the student, shape (N, L).
        deviation: f - g of the student, shape (N, L).
        eta: step size of the game.

    Returns:
        Shape (L,).

    Example:
        >>> error = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> margins(error, deviation=-error, eta=0.5)
        tensor([0.3202])
    """
    up, down = game_weights(error, eta)
    return ((up - down) * deviation).sum(0)


def prefix_error(answer: Tensor, target: Tensor, error: Tensor, earlier: int) -> Tensor:
    """Error of the prefix that ends with a new student: the mean of its students minus g, (S + f - g) / (t + 1).

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
    Over the full set |f|, |g| <= b/2 keeps both arguments positive; a batch estimate can fall below zero,
    so the logarithm is continued by its tangent there.

    Args:
        deviation: d = f - g on the batch, shape (B, L).
        up: rows of K+, shape (B, L).
        down: rows of K-, shape (B, L).
        population: N, the number of samples that K+ and K- are normalised over.
        bound: b = 2 max|g|.
        gamma: weight of the squared error against the barrier; ``math.inf`` switches the barrier off.

    Returns:
        The loss, shape ().

    Example:
        >>> error = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> up, down = game_weights(error, eta=0.5)
        >>> options = {"population": 3, "bound": 4.0, "gamma": gamma_of(eta=0.5, kappa=1.0, bound=4.0)}
        >>> log_barrier_loss(torch.zeros(3, 1), up, down, **options)
        tensor(0.)
        >>> log_barrier_loss(-0.5 * error, up, down, **options)  # lower: the deviation corrects the error
        tensor(-0.4705)
    """
    deviation = at_least_float32(deviation)
    share = population / (len(deviation) * 2.0 * bound)
    rise = 1.0 + share * (up * deviation).sum(0)
    fall = 1.0 - share * (down * deviation).sum(0)
    barrier = _log_with_tangent(torch.stack((rise, fall))).sum(0).mean()
    return deviation.square().mean() - barrier / gamma


class _RoundLoss(torch.autograd.Function):
    """Value and gradient of `round_loss` in closed form, in half the time of autograd."""

    @staticmethod
    def forward(
        ctx: Any, deviation: Tensor, error: Tensor, log_z: Tensor, eta: float, share: float, gamma: float, across: Any
    ) -> Tensor:
        up, down = game_rows(error, log_z, eta)
        pull = torch.stack(((up * deviation).sum(0), (down * -deviation).sum(0)))
        argument = 1.0 + share * (pull if across is None else across(pull))
        safe = argument.clamp_min(BARRIER_FLOOR)
        weight = 1.0 / (gamma * deviation.shape[1])
        rise, fall = weight * share / safe
        ctx.save_for_backward(2.0 / deviation.numel() * deviation - rise * up + fall * down)
        return deviation.square().mean() - weight * (safe.log() + (argument - safe) / BARRIER_FLOOR).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.saved_tensors[0], None, None, None, None, None, None


def round_loss(
    deviation: Tensor,
    error: Tensor,
    log_z: Tensor,
    *,
    eta: float,
    population: int,
    bound: float,
    gamma: float,
    across: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`log_barrier_loss` with the weights of `game_rows`, differentiable with respect to the deviation only.

    The barrier is the logarithm of a sum over the batch. If several processes share a batch, each needs the sum over
    the whole batch; otherwise the game would depend on the number of processes.

    Args:
        deviation: d = f - g on the batch, shape (B, L); half precision is converted to float32.
        error: rows of S, shape (B, L).
        log_z: `log_normaliser` of all N rows, shape (L,).
        eta: step size of the game.
        population: N.
        bound: b = 2 max|g|.
        gamma: weight of the squared error against the barrier.
        across: mean over the processes that share a batch in equal parts; None for one process.

    Returns:
        The loss, shape (). With `across`, the mean of the processes' gradients is the gradient of the whole batch.

    Example:
        >>> error = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> deviation = torch.zeros(3, 1, requires_grad=True)
        >>> log_z = log_normaliser(error, eta=0.5)
        >>> round_loss(deviation, error, log_z, eta=0.5, population=3, bound=4.0, gamma=0.03125).backward()
        >>> deviation.grad.squeeze()  # downhill is against the error
        tensor([-0.6403,  0.0000,  0.6403])
    """
    share = population / (len(deviation) * 2.0 * bound)
    loss: Tensor = _RoundLoss.apply(at_least_float32(deviation), error, log_z, eta, share, gamma, across)
    return loss


def prefix_kl_loss(
    deviation: Tensor,
    error: Tensor,
    target: Tensor,
    *,
    earlier: int,
    scale: float = 1.0,
    temperature: float = 2.0,
    residual: float = 0.1,
) -> Tensor:
    """KL divergence of the whole prefix from the teacher, instead of the error of the new student alone.

    With p = g + (S + d) / (t + 1), the logits of the prefix that ends with the student, in the teacher's units,
    loss = (t + 1) tau^2 KL(softmax(g / tau) || softmax(p / tau)) + residual * mean((f - (g - S))^2).
    Multiplied by the number of students, the gradient with respect to the student is that of plain distillation
    (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        deviation: d = f - g on the batch, shape (B, L), in units of the ledger.
        error: rows of S, shape (B, L).
        target: g, shape (B, L).
        earlier: t, the number of students before.
        scale: one unit of the ledger in the teacher's units.
        temperature: tau > 0.
        residual: weight of the squared error of the student to g - S.

    Returns:
        The loss, shape ().

    Example:
        >>> g, s = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5]])
        >>> prefix_kl_loss(-s, s, g, earlier=1)  # the student repairs the whole error
        tensor(0.)
        >>> prefix_kl_loss(torch.zeros(1, 2), s, g, earlier=1)
        tensor(0.0722)
    """
    deviation = at_least_float32(deviation)
    repaired = error + deviation
    goal = F.log_softmax(target * (scale / temperature), -1)
    soft = F.log_softmax((target + repaired / (earlier + 1)) * (scale / temperature), -1)
    divergence = F.kl_div(soft, goal, reduction="batchmean", log_target=True)
    return (earlier + 1) * temperature**2 * divergence + residual * repaired.square().mean()


def gamma_of(eta: float, kappa: float, bound: float) -> float:
    """The gamma at which a student aims at g - kappa S for small eta S: gamma = eta / (4 b kappa).

    Args:
        eta: step size of the game.
        kappa: correction strength; 0 is plain averaging (gamma is infinite), 1 corrects the whole error.
        bound: b = 2 max|g|.

    Example:
        >>> gamma_of(eta=0.5, kappa=1.0, bound=4.0)
        0.03125
    """
    return eta / (4.0 * bound * kappa) if kappa > 0 else float("inf")
