"""TODO."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def centre(logits: Tensor) -> Tensor:
    """Logits less their mean over the outputs of a sample, shape (B, L): the part that softmax sees."""
    return logits - logits.mean(-1, keepdim=True)


def at_least_float32(values: Tensor) -> Tensor:
    """The same values, as float32 where they are of 16 bits: mixed precision is too coarse for softmax and sums."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class KDTerms(NamedTuple):
    """Per-sample losses and the residuals that drive the last layer, as `kd_terms` returns them."""

    ce: Tensor
    kl: Tensor
    label_residual: Tensor
    teacher_residual: Tensor


def kd_terms(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float) -> KDTerms:
    """Label loss and teacher loss of every sample, with the gradients of both with respect to the logits.

    Convention: the teacher's loss carries tau^2, so that its gradient keeps its size at any temperature.

    Args:
        student_logits: shape (B, L).
        teacher_logits: shape (B, L), or (M, B, L) of M teachers.
        target: class numbers, shape (B,).
        temperature: tau > 0 of both softmaxes of the teacher's loss.

    Returns:
        ce (B,), kl (B,) = tau^2 KL(teacher || student), and the residuals R_g = softmax(z) - y and
        R_k = tau (softmax(z/tau) - softmax(z_t/tau)), both (B, L). Of M teachers kl is (M, B) and R_k (M, B, L).
    """
    soft = F.log_softmax(student_logits / temperature, -1)
    goal = F.log_softmax(teacher_logits / temperature, -1)
    kl = temperature**2 * F.kl_div(soft.expand_as(goal), goal, reduction="none", log_target=True).sum(-1)
    classes = torch.arange(student_logits.shape[-1], device=target.device)
    one_hot = (target[:, None] == classes).to(student_logits.dtype)  # as F.one_hot, which torch.func.vmap refuses
    return KDTerms(
        F.cross_entropy(student_logits, target, reduction="none"),
        kl,
        student_logits.softmax(-1) - one_hot,
        temperature * (soft.exp() - goal.exp()),
    )
