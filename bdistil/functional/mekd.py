"""Losses of the two stages of MEKD, for soft and hard answers, and distances between generated and real samples.

Source: "Aligning Logits Generatively for Principled Black-Box Knowledge Distillation" (MEKD, arXiv 2205.10490).
Letters: m samples of a batch, L outputs. All functions are differentiable in the outputs of the networks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.functional.distillation import at_least_float32, centre


def _same_shape(*tensors: Tensor) -> None:
    """Asserts equal shapes: (m,) and (m, 1) would broadcast to (m, m), each sample with every other."""
    assert len({tensor.shape for tensor in tensors}) == 1, [tuple(tensor.shape) for tensor in tensors]


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """BCE(D(x_real), 1) + BCE(D(G(z)), 0), from logits (m,) each.

    Example:
        >>> discriminator_loss(torch.zeros(2), torch.zeros(2))  # 2 log 2
        tensor(1.3863)
    """
    return F.softplus(-real).mean() + F.softplus(generated).mean()


def generator_loss(generated: Tensor, weight: Tensor, share: float = 0.5) -> Tensor:
    """BCE(D(G(z)), 1) + share · mean_i(-weight_i · log D(G(z))_i).

    Args:
        generated: logits of the discriminator, (m,).
        weight: weight of each generated sample, (m,), from `confidence` or `balance`. No gradient.
        share: weight of the second term.

    Example:
        >>> generator_loss(torch.zeros(1), torch.ones(1))  # 1.5 log 2
        tensor(1.0397)
    """
    _same_shape(generated, weight)
    miss = F.softplus(-generated)  # -log sigmoid
    return miss.mean() + share * (weight.detach() * miss).mean()


def confidence(answers: Tensor) -> Tensor:
    """The teacher's largest softmax probability (m,), from its logits (m, L).

    Example:
        >>> confidence(torch.zeros(1, 4))
        tensor([0.2500])
    """
    return answers.softmax(-1).amax(-1)


def balance(labels: Tensor, counts: Tensor) -> Tensor:
    """Weights (m,) that are larger for rarer teacher labels; they replace `confidence` for hard answers.

    weight_i = n / (L · n_label) with n = sum of counts, at most 10; all are 1 if the classes are balanced.

    Args:
        labels: top-1 classes (m,).
        counts: number of answers of each class so far, (L,).

    Example:
        >>> balance(torch.tensor([0, 1]), torch.tensor([3, 1]))
        tensor([0.6667, 2.0000])
    """
    counts = counts.clamp_min(1e-12)
    return (counts.sum() / (len(counts) * counts)).clamp_max(10.0)[labels]


def statistics(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd (L,) of a teacher's centred logits (N, L), used to standardise them.

    Example:
        >>> statistics(torch.tensor([[2.0, 0.0], [0.0, 2.0], [4.0, 0.0]]))
        (tensor([ 0.6667, -0.6667]), tensor([1.5275, 1.5275]))
    """
    centred = centre(answers)
    return centred.mean(0), centred.std(0).clamp_min(1e-6)


def soft_latent(logits: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Logits (m, L) as the generator's z: centred, and standardised by the teacher's `statistics`.

    Example:
        >>> soft_latent(torch.tensor([[3.0, 1.0]]), mean=torch.zeros(2), sd=torch.full((2,), 2.0))
        tensor([[ 0.5000, -0.5000]])
    """
    return (centre(logits) - mean) / sd


def hard_latent(logits: Tensor) -> Tensor:
    """Logits (m, L) as the generator's z for a teacher that returns labels: probabilities times sqrt(L).

    A one-hot then has the norm sqrt(L) of a standard normal z, and so has the answer of a confident student.

    Example:
        >>> hard_latent(torch.zeros(1, 4))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    return logits.softmax(-1) * math.sqrt(logits.shape[-1])


def _image_loss(generator: nn.Module | None, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of |G(z_S) - G(z_T)|, from the latents (m, L); 0 without a generator. No gradient through z_T."""
    if generator is None:
        return student.new_zeros(())
    with torch.no_grad():
        goal = generator(teacher)
    loss: Tensor = (generator(student) - goal).abs().mean()
    return loss


def soft_emulation(
    generator: nn.Module | None,
    student: Tensor,
    teacher: Tensor,
    mean: Tensor,
    sd: Tensor,
    *,
    tau: float,
    kl: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The two terms of the stage-2 loss for soft answers.

    The first is the mean of |G(z_S) - G(z_T)|, with z from `soft_latent` in place of the paper's y/tau, which should be
    distributed as N(0, I). The second is kl · tau · KL(softmax(y_T/tau) || softmax(y_S/tau)), with the factor tau of
    MEKD and not tau².

    Args:
        generator: G, frozen; None omits the first term.
        student: logits y_S (m, L).
        teacher: logits y_T (m, L).
        mean: mean of the teacher's centred logits, (L,).
        sd: their standard deviation, (L,).
        tau: temperature.
        kl: weight of the second term.

    Returns:
        Both terms, shape () each; the loss is their sum.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> soft_emulation(nn.Identity(), student, teacher, torch.zeros(2), torch.ones(2), tau=1.0)
        (tensor(1.), tensor(0.3278))
    """
    _same_shape(student, teacher)
    images = _image_loss(generator, soft_latent(student, mean, sd), soft_latent(teacher, mean, sd))
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    target, answer = F.log_softmax(teacher / tau, -1), F.log_softmax(student / tau, -1)
    return images, kl * tau * F.kl_div(answer, target, reduction="batchmean", log_target=True)


def hard_emulation(
    generator: nn.Module | None, student: Tensor, labels: Tensor, *, kl: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`soft_emulation` for top-1 answers, classes (m,): tau is 1, so KL to the one-hot is cross entropy.

    Example:
        >>> hard_emulation(nn.Identity(), torch.zeros(1, 2), torch.tensor([0]))
        (tensor(0.7071), tensor(0.6931))
    """
    outputs = student.shape[-1]
    goal = F.one_hot(labels, outputs).to(student.dtype) * math.sqrt(outputs)
    return _image_loss(generator, hard_latent(student), goal), kl * F.cross_entropy(at_least_float32(student), labels)


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of samples, unbiased, with the kernel (x·y/D + 1)³.

    Args:
        first: (n, ...), n >= 2.
        second: (k, ...), k >= 2, samples of the same shape.

    Returns:
        Shape (): near 0, possibly negative, for two sets from the same distribution.

    Example:
        >>> kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
        tensor(9.5000, dtype=torch.float64)
    """
    x, y = first.flatten(1).double(), second.flatten(1).double()
    return _discrepancy(*(((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))))


def narrow_distance(first: Tensor, second: Tensor) -> Tensor:
    """`kernel_distance` with the kernel exp(-4 |x - y|² / median), with the median of |x - y|² in the second set.

    Meant for sequences of arbitrary phase, whose mean is near 0: there `kernel_distance` prefers a constant sequence to
    waves of some of the classes. This kernel is 1/50 at the median, so samples far from all others do not count, and
    each further class that is generated reduces the distance. It is invariant to scale and at most 2.

    Example:
        >>> narrow_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [4.0]]))
        tensor(0.0366, dtype=torch.float64)
    """
    x, y = first.flatten(1).double(), second.flatten(1).double()
    scale = F.pdist(y).square().median().clamp_min(1e-12) / 4
    return _discrepancy(*(torch.exp(-torch.cdist(a, b).square() / scale) for a, b in ((x, x), (y, y), (x, y))))


def _discrepancy(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Squared maximum mean discrepancy from the kernel's values (n, n), (k, k) and (n, k)."""
    own = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return own[0] + own[1] - 2 * xy.mean()
