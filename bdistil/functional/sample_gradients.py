"""Per-sample gradients of all parameters by `torch.func`: the full version of `gradient_noise`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bdistil.errors import UserError
from bdistil.functional.distillation import kd_terms


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in gradients.values()], 1)


def sample_gradients(
    student: nn.Module, x: Tensor, target: Tensor, teacher_logits: Tensor, *, temperature: float, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Gradients of all parameters for each sample, of the label loss and of the teacher's loss; by `torch.func`.

    Args:
        student: in eval mode, so that samples do not see each other; maps x to logits.
        x: (n, ...).
        target: (n,).
        teacher_logits: (n, L).
        temperature: tau.
        chunk: samples at once.

    Returns:
        Both (n, P).
    """
    weights = {name: p.detach() for name, p in student.named_parameters()}

    def loss(weights: dict[str, Tensor], which: int, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        # Where a module has two names, `tie_weights` would swap it twice and put back what it had swapped in.
        logits = functional_call(student, weights, (x[None],), tie_weights=False)
        return kd_terms(logits, z[None], y[None], temperature=temperature)[which].sum()

    found = []
    for which in (0, 1):
        per_sample: Any = vmap(grad(loss), in_dims=(None, None, 0, 0, 0), chunk_size=chunk)
        found.append(_flat(per_sample(weights, which, x, target, teacher_logits)))
    return found[0], found[1]


def control_cosine(student: nn.Module, teacher: nn.Module, x: Tensor, target: Tensor, *, temperature: float) -> float:
    """How far the teacher's loss is the control variate that the theory takes it for: mean cosine over the samples.

    It compares the gradient of KL at the student with grad CE(student) - grad CE(teacher), each at its own weights.
    1 for linear models at temperature 1; the nearer to 1, the more the theory says of a network.

    Args:
        student: in eval mode.
        teacher: of the same architecture, in eval mode.
        x: (n, ...).
        target: (n,).
        temperature: tau.

    Raises:
        UserError: the two have other parameters.
    """
    shapes = [{name: p.shape for name, p in module.named_parameters()} for module in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "The cosine compares gradients of student and teacher weight by weight, so it expects a teacher of the "
            f"student's architecture (self-distillation), got {type(teacher).__name__} for {type(student).__name__}."
        )
    with torch.no_grad():
        logits = teacher(x)
    g, k = sample_gradients(student, x, target, logits, temperature=temperature)
    anchor, _ = sample_gradients(teacher, x, target, logits, temperature=temperature)
    return float(torch.cosine_similarity(k, g - anchor, dim=1).mean())
