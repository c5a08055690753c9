"""How noisy the gradient of distillation is, and what weight helps: KD as partial variance reduction.

The gradient (1 - lambda) grad CE + lambda grad KL is that of the labels with the teacher's as a control variate
(arXiv 2305.17581). Three scalars of the last linear layer, made without a backward pass, give its noise at any lambda.

Letters: n samples that were looked at, D inputs of the last layer, P parameters, g the label gradient of a sample, k
the teacher's, h = g - k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bdistil.errors import UserError

# alpha mu / B for which the best weight is reported, and the one that a suggestion is made for; see `best_weight`.
STEPS = (1e-3, 1e-2, 1e-1)
USUAL_STEP = 1e-2
# Below this mean cross entropy a student fits its labels, and there is no noise left that a teacher could take away.
INTERPOLATED = 0.01


@dataclass(frozen=True)
class GradientMoments:
    """Second moments of the label gradient g and the teacher gradient k of single samples.

    Attributes:
        samples: n.
        gg, kk, gk: mean over the samples of <u_i, v_i>.
        mean_gg, mean_kk, mean_gk: <mean u, mean v>.
        unseen: share of the training part that was not looked at; of a whole part the mean gradient is exact.
    """

    samples: int
    gg: float
    kk: float
    gk: float
    mean_gg: float
    mean_kk: float
    mean_gk: float
    unseen: float = 1.0

    def _variance(self, second: float, mean: float) -> float:
        return (second - mean) * self.samples / (self.samples - 1)

    @property
    def variance(self) -> tuple[float, float, float]:
        """V_gg, V_kk, V_gk: (co)variances of single samples, without bias."""
        pairs = ((self.gg, self.mean_gg), (self.kk, self.mean_kk), (self.gk, self.mean_gk))
        gg, kk, gk = (self._variance(*pair) for pair in pairs)
        return gg, kk, gk

    @property
    def mean_square(self) -> tuple[float, float, float]:
        """The same of the mean gradients; what the noise adds to it is taken away, so a value may be below 0."""
        gg, kk, gk = (self.unseen * v / self.samples for v in self.variance)
        return self.mean_gg - gg, self.mean_kk - kk, self.mean_gk - gk

    def plain(self) -> dict[str, float]:
        """The scalars by name, for logs."""
        gg, kk, gk = self.variance
        return {"v_gg": gg, "v_kk": kk, "v_gk": gk}


def last_layer_moments(
    activations: Tensor, label_residual: Tensor, teacher_residual: Tensor, population: int | None = None
) -> GradientMoments:
    """Moments of the last layer's gradients, from what goes in and the residuals at its output; no backward pass.

    The gradient of a sample is R_i a_i^T, so <u_i, v_i> = <R_u,i, R_v,i> |a_i|^2 and the mean is R^T A / n.

    Args:
        activations: inputs of the layer (n, D), with a column of ones where it has a bias.
        label_residual: R_g (n, L).
        teacher_residual: R_k (n, L).
        population: N that the n samples are of; endless by default.

    Raises:
        UserError: fewer than two samples.
    """
    a, g, k = activations.double(), label_residual.double(), teacher_residual.double()
    size = a.square().sum(1)
    second = [((u * v).sum(1) * size).mean() for u, v in ((g, g), (k, k), (g, k))]
    return _moments(len(a), second, g.T @ a / len(a), k.T @ a / len(a), population)


def gradient_moments(
    label_gradients: Tensor, teacher_gradients: Tensor, population: int | None = None
) -> GradientMoments:
    """Moments of gradients that are given sample by sample, both (n, P), of a training part of `population` samples.

    Raises:
        UserError: fewer than two samples.
    """
    g, k = label_gradients.double(), teacher_gradients.double()
    second = [(u * v).sum(1).mean() for u, v in ((g, g), (k, k), (g, k))]
    return _moments(len(g), second, g.mean(0), k.mean(0), population)


def _moments(samples: int, second: Sequence[Tensor], g: Tensor, k: Tensor, population: int | None) -> GradientMoments:
    if samples < 2:
        raise UserError(f"Expected two samples or more to tell noise from gradient, got {samples}.")
    means = [(u * v).sum() for u, v in ((g, g), (k, k), (g, k))]
    unseen = 1.0 - samples / population if population else 1.0
    gg, kk, gk, mean_gg, mean_kk, mean_gk = (float(value) for value in (*second, *means))
    return GradientMoments(samples, gg, kk, gk, mean_gg, mean_kk, mean_gk, unseen)


# ---- the curves over lambda


def _at(weight: float, scalars: tuple[float, float, float]) -> float:
    gg, kk, gk = scalars
    return (1 - weight) ** 2 * gg + weight**2 * kk + 2 * weight * (1 - weight) * gk


def variance_at(moments: GradientMoments, weight: float) -> float:
    """Var(lambda): variance of the gradient of one sample at a distillation weight."""
    return _at(weight, moments.variance)


def noise_to_signal(moments: GradientMoments, weight: float) -> float:
    """NSR(lambda) = Var / Mean^2 of one sample; infinite where the mean gradient can not be told from 0.

    Raw variance is not to be compared across temperatures, this is.
    """
    signal = _at(weight, moments.mean_square)
    return variance_at(moments, weight) / signal if signal > 0 else math.inf


def least_variance_weight(moments: GradientMoments) -> float:
    """lambda_minvar = (V_gg - V_gk) / V_hh, in 0 … 1."""
    gg, kk, gk = moments.variance
    spread = gg + kk - 2 * gk
    return min(max((gg - gk) / spread, 0.0), 1.0) if spread > 0 else 0.0


def explained_share(moments: GradientMoments) -> float:
    """R^2 = V_gh^2 / (V_gg V_hh): the share of the label gradient's variance that the control variate can take away."""
    gg, kk, gk = moments.variance
    spread = gg * (gg + kk - 2 * gk)
    return (gg - gk) ** 2 / spread if spread > 0 else 0.0


def _control(moments: GradientMoments) -> tuple[float, float, float]:
    """E<g,h>, E|h|^2 and |mean h|^2."""
    gg, kk, gk = moments.mean_square
    return moments.gg - moments.gk, moments.gg + moments.kk - 2 * moments.gk, max(gg + kk - 2 * gk, 0.0)


def best_weight(moments: GradientMoments, step: float) -> float:
    """lambda* of the theory, near convergence: E<g,h> / (E|h|^2 + |mean h|^2 / step), in 0 … 1.

    Args:
        moments: at the point where training settles.
        step: alpha mu / B, of a step size alpha and batches of B samples: a batch has B times less noise than a
            sample, and the same pull to the teacher's faults. mu is that of f - f* = mu |x - x*|^2 in the direction of
            this pull, as `pull_curvature` measures it. With it the formula is exact to first order; mu as strong
            convexity would give a bound.
    """
    shared, size, bias = _control(moments)
    spread = size + bias / step
    return min(max(shared / spread, 0.0), 1.0) if spread > 0 else 0.0


def neighbourhood(moments: GradientMoments, weight: float, step: float) -> float:
    """N(lambda) / N(0): how far from the optimum SGD settles with a teacher, as a ratio to the labels alone.

    N(lambda) is the noise alpha / 4B E|g - lambda h|^2, and what the pull to the teacher costs, lambda^2 |mean h|^2 /
    4 mu. At lambda* the ratio is 1 - rho^2 / (1 + beta) of arXiv 2305.17581.

    Args:
        moments: at the point where training settles.
        weight: lambda.
        step: alpha mu / B, see `best_weight`.
    """
    shared, size, bias = _control(moments)
    gained = 2.0 * weight * shared - weight**2 * (size + bias / step)
    return 1.0 - gained / moments.gg if moments.gg > 0 else 1.0


def pull_curvature(
    activations: Tensor, logits: Tensor, label_residual: Tensor, teacher_residual: Tensor, iterations: int = 30
) -> float:
    """mu in the direction of the teacher's pull: |m|^2 / (2 m^T H^-1 m), m the mean of h, H the Hessian of CE.

    Of the last layer, near its optimum. H is solved by conjugate gradients, so directions that are much flatter than
    the others, which training hardly reaches either, are left out when the iterations end.

    Args:
        activations: inputs of the layer (n, D), with a column of ones where it has a bias.
        logits: (n, L).
        label_residual: R_g (n, L).
        teacher_residual: R_k (n, L).
        iterations: of conjugate gradients, at most.

    Returns:
        mu; 0 where there is no pull.
    """
    p, a = logits.softmax(-1), activations

    def hessian(direction: Tensor) -> Tensor:
        moved = p * (a @ direction.T)
        return (moved - p * moved.sum(1, keepdim=True)).T @ a / len(a)

    pull = (label_residual - teacher_residual).T @ a / len(a)
    rest, along, gained, size = pull, pull, 0.0, float(pull.square().sum())
    first = size
    for _ in range(iterations):
        bent = hessian(along)
        curved = float((along * bent).sum())
        if curved <= 0 or size <= 1e-8 * first:
            break
        gained += size**2 / curved
        rest = rest - size / curved * bent
        size, before = float(rest.square().sum()), size
        along = rest + size / before * along
    return first / (2.0 * gained) if gained > 0 else 0.0


# ---- a suggestion


@dataclass(frozen=True)
class Suggestion:
    """A distillation weight, and the sentence that says why."""

    weight: float
    reason: str


def suggest(
    moments: GradientMoments, *, label_loss: float, step: float = USUAL_STEP, highest: float = 0.9
) -> Suggestion:
    """The distillation weight to train with from here on: the theory's, never above the one of least variance.

    Too large a weight is far worse than too small a one: it pulls to the teacher's faults, and no step size mends that.

    Args:
        moments: of the student as it is.
        label_loss: its mean cross entropy on the same samples.
        step: alpha mu / B, see `best_weight`.
        highest: no suggestion is above it.
    """
    if label_loss < INTERPOLATED:
        return Suggestion(
            0.0, f"the student fits its labels (cross entropy {label_loss:.2g}): no noise is left to reduce"
        )
    theory, calm = best_weight(moments, step), least_variance_weight(moments)
    weight = min(theory, calm, highest)
    by_step = ", ".join(f"{best_weight(moments, s):.2f} at {s:g}" for s in sorted({*STEPS, step}))
    return Suggestion(
        weight,
        f"the teacher explains {explained_share(moments):.0%} of the label gradient's variance; best weight by step "
        f"size times curvature over batch size: {by_step}; least variance at {calm:.2f}; noise to signal "
        f"{noise_to_signal(moments, 0.0):.3g} without the teacher, {noise_to_signal(moments, weight):.3g} with it",
    )


def scheduled_weight(start: float, factor: float, epoch: int) -> float:
    """Distillation weight of an epoch: decays (factor < 1) or grows (factor > 1) by a factor an epoch, in 0 … 1."""
    return min(max(start * factor**epoch, 0.0), 1.0)
