"""Losses of knowledge distillation and their gradients with respect to the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdistil.errors import UserError


def centre(logits: Tensor) -> Tensor:
    """Logits (B, L) minus their mean over the outputs, to which softmax is invariant.

    Example:
        >>> centre(torch.tensor([[3.0, 1.0]])).tolist()
        [[1.0, -1.0]]
    """
    return logits - logits.mean(-1, keepdim=True)


def at_least_float32(values: Tensor) -> Tensor:
    """Converts 16-bit values, which are too coarse for softmax and sums, to float32; others are unchanged.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class KDTerms(NamedTuple):
    """Per-sample losses and their gradients with respect to the logits, returned by `kd_terms`.

    Attributes:
        ce: cross entropy of the labels, (B,).
        kl: tau^2 KL(teacher || student), (B,), or (M, B) for M teachers.
        label_residual: R_g = softmax(z) - y, (B, L); 0 for a sample without a label.
        teacher_residual: R_k = tau (softmax(z / tau) - softmax(z_t / tau)), (B, L), or (M, B, L).
    """

    ce: Tensor
    kl: Tensor
    label_residual: Tensor
    teacher_residual: Tensor


def kd_terms(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float) -> KDTerms:
    """Per-sample label loss and teacher loss, with their gradients with respect to the logits; at least in float32.

    Convention: the teacher's loss has the factor tau^2 (Hinton et al., arXiv 1503.02531, section 2), so that its
    gradient keeps its size at any temperature.

    Args:
        student_logits: z, (B, L).
        teacher_logits: z_t, (B, L), or (M, B, L) for M teachers.
        target: class numbers y, (B,), -100 for a sample without a label, or soft labels (B, L).
        temperature: tau > 0 of both softmaxes of the teacher's loss.

    Raises:
        UserError: student and teacher differ in the number of classes.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> ce, kl, *_ = kd_terms(student, teacher, torch.tensor([0]), temperature=2.0)
        >>> ce, kl
        (tensor([0.1269]), tensor([0.4805]))
    """
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise UserError(
            f"Expected as many logits of the student as of the teacher, got {student_logits.shape[-1]} and "
            f"{teacher_logits.shape[-1]}."
        )
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    soft = F.log_softmax(student_logits / temperature, -1)
    goal = F.log_softmax(teacher_logits / temperature, -1)
    kl = temperature**2 * F.kl_div(soft.expand_as(goal), goal, reduction="none", log_target=True).sum(-1)
    return KDTerms(
        F.cross_entropy(student_logits, target, reduction="none"),
        kl,
        _label_residual(student_logits.softmax(-1), target),
        temperature * (soft.exp() - goal.exp()),
    )


def _label_residual(answers: Tensor, target: Tensor) -> Tensor:
    """softmax(z) - y (B, L), 0 for samples that cross entropy ignores."""
    if target.is_floating_point():
        return answers - target
    classes = torch.arange(answers.shape[-1], device=target.device)
    one_hot = (target[:, None] == classes).to(answers.dtype)  # F.one_hot does not run in torch.func.vmap
    return torch.where(target[:, None] >= 0, answers - one_hot, 0.0)
