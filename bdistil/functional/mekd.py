"""The arithmetic of MEKD: losses of its two stages, soft and hard, and the distances that choose a generator.

After "Aligning Logits Generatively for Principled Black-Box Knowledge Distillation" (arXiv 2205.10490). Letters: m
samples of a batch, L outputs. All functions are differentiable in what a network made.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.functional.distillation import centre


def _same_shape(*tensors: Tensor) -> None:
    """Shapes (m,) and (m, 1) would broadcast to (m, m), every sample with every other."""
    assert len({tensor.shape for tensor in tensors}) == 1, [tuple(tensor.shape) for tensor in tensors]


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """BCE(D(x_real), 1) + BCE(D(G(z)), 0), from logits (m,) each."""
    return F.softplus(-real).mean() + F.softplus(generated).mean()


def generator_loss(generated: Tensor, weight: Tensor, share: float = 0.5) -> Tensor:
    """BCE(D(G(z)), 1) + share · mean_i(-weight_i · log D(G(z))_i).

    Args:
        generated: logits of the discriminator, (m,).
        weight: what the teacher says of each generated sample, (m,): `confidence` or `balance`. No gradient.
        share: of the second term.
    """
    _same_shape(generated, weight)
    miss = F.softplus(-generated)  # -log sigmoid
    return miss.mean() + share * (weight.detach() * miss).mean()


def confidence(answers: Tensor) -> Tensor:
    """The teacher's largest softmax probability (m,) from its logits (m, L): a probability, not the class."""
    return answers.softmax(-1).amax(-1)


def balance(labels: Tensor, counts: Tensor) -> Tensor:
    """Weights (m,) that grow with the rarity of the teacher's label, in place of a confidence that hard answers lack.

    weight_i = n / (L · n_label) with n = sum of counts, at most 10: 1 for all where the classes are balanced.

    Args:
        labels: top-1 classes (m,).
        counts: how often each class was answered so far, (L,).
    """
    counts = counts.double().clamp_min(1e-12)
    return (counts.sum() / (len(counts) * counts)).clamp_max(10.0).float()[labels]


def statistics(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd (L,) over centred answers (N, L) of a probe; with them an answer looks like a standard normal."""
    centred = centre(answers)
    return centred.mean(0), centred.std(0).clamp_min(1e-6)


def soft_latent(logits: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Logits (m, L) as the generator's z: centred, and standardised by the teacher's statistics."""
    return (centre(logits) - mean) / sd


def hard_latent(logits: Tensor) -> Tensor:
    """Logits (m, L) as the generator's z where the teacher gives labels: probabilities times sqrt(L).

    A one-hot then has the norm sqrt(L) of a standard normal z, and a student that is sure gives the same.
    """
    return logits.softmax(-1) * math.sqrt(logits.shape[-1])


def soft_emulation(
    generator: nn.Module, student: Tensor, teacher: Tensor, mean: Tensor, sd: Tensor, *, tau: float, kl: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The two parts of the loss of stage 2 with soft answers.

    L1(G(z_S), G(z_T)) as a mean, with z as `soft_latent` gives it, in the place of the paper's y/tau that is to look
    like N(0, I); and kl · tau · KL(softmax(y_T/tau) || softmax(y_S/tau)). The factor is tau, as in MEKD, and not tau².

    Args:
        generator: G, frozen.
        student: its logits y_S (m, L).
        teacher: logits y_T (m, L).
        mean: of the teacher's centred logits, (L,).
        sd: likewise, (L,).
        tau: temperature.
        kl: weight of the second part.

    Returns:
        Both, shape () each; the loss is their sum.
    """
    _same_shape(student, teacher)
    with torch.no_grad():
        goal = generator(soft_latent(teacher, mean, sd))
    images = (generator(soft_latent(student, mean, sd)) - goal).abs().mean()
    target, answer = F.log_softmax(teacher / tau, -1), F.log_softmax(student / tau, -1)
    return images, kl * tau * F.kl_div(answer, target, reduction="batchmean", log_target=True)


def hard_emulation(generator: nn.Module, student: Tensor, labels: Tensor, *, kl: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two parts of the loss of stage 2 with top-1 answers: tau is 1, so that KL to the one-hot is cross entropy.

    Args:
        generator: G, frozen.
        student: its logits y_S (m, L).
        labels: the teacher's classes (m,).
        kl: weight of the second part.

    Returns:
        Both, shape () each; the loss is their sum.
    """
    outputs = student.shape[-1]
    with torch.no_grad():
        goal = generator(F.one_hot(labels, outputs).to(student.dtype) * math.sqrt(outputs))
    images = (generator(hard_latent(student)) - goal).abs().mean()
    return images, kl * F.cross_entropy(student, labels)


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of samples, unbiased, with the kernel (x·y/D + 1)³.

    Args:
        first: (n, ...), n >= 2.
        second: (k, ...), k >= 2, of the same shape behind.

    Returns:
        Shape (): around 0 where both are drawn alike, and then also below.
    """
    x, y = first.flatten(1).double(), second.flatten(1).double()
    return _discrepancy(*(((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))))


def narrow_distance(first: Tensor, second: Tensor) -> Tensor:
    """The same with the kernel exp(-4 |x - y|² / median), the median being that of |x - y|² within the second set.

    For sequences, which begin anywhere, so that the mean of all is near 0. `kernel_distance` then calls a flat line
    nearer than waves of a few of the kinds. This kernel is 1/50 at the median: what is nothing like a sample counts
    nothing, and each further kind that is made is a gain. The scale of the values does not matter.

    Args:
        first: (n, ...), n >= 2.
        second: (k, ...), k >= 2, of the same shape behind.

    Returns:
        Shape (): around 0 where both are drawn alike, and then also below; at most 2.
    """
    x, y = first.flatten(1).double(), second.flatten(1).double()
    scale = F.pdist(y).square().median().clamp_min(1e-12) / 4
    return _discrepancy(*(torch.exp(-torch.cdist(a, b).square() / scale) for a, b in ((x, x), (y, y), (x, y))))


def _discrepancy(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Squared maximum mean discrepancy from the kernel's values (n, n), (k, k) and (n, k)."""
    own = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return own[0] + own[1] - 2 * xy.mean()
