"""Per-sample gradients of all parameters by `torch.func`, instead of those of the last layer alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bdistil.errors import UserError
from bdistil.functional.distillation import kd_terms
from bdistil.utils.trees import map_tensors


def sample_gradients(
    student: nn.Module,
    x: Any,
    target: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    chunk: int = 64,
    parameters: Collection[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of the label loss and the teacher loss with respect to P parameters.

    Args:
        student: maps x to logits; in eval mode, so that samples do not depend on each other.
        x: (n, ...), or a tuple or mapping of such tensors.
        target: (n,).
        teacher_logits: (n, L).
        temperature: tau.
        chunk: samples computed at once.
        parameters: names of the parameters; by default all trainable ones.

    Returns:
        Both (n, P).

    Example:
        >>> student = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(student.weight)
        >>> labels, _ = sample_gradients(
        ...     student, torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), torch.zeros(2, 2), temperature=1.0
        ... )
        >>> labels.tolist()
        [[-0.5, 0.5], [1.0, -1.0]]
    """
    names = trained_names(student) if parameters is None else parameters
    weights = {name: p.detach() for name, p in student.named_parameters() if name in names}
    shared = _names_of_parameters(student)

    def loss(weights: dict[str, Tensor], which: int, x: Any, y: Tensor, z: Tensor) -> Tensor:
        # `tie_weights` would swap a module with two names twice, and restore the wrong weights.
        batch = map_tensors(x, lambda leaf: leaf[None])
        every = {name: weights[first] for name, first in shared.items() if first in weights}
        logits = functional_call(student, every, (batch,), tie_weights=False)
        return kd_terms(logits, z[None], y[None], temperature=temperature)[which].sum()

    found = []
    for which in (0, 1):
        per_sample: Any = vmap(grad(loss), in_dims=(None, None, 0, 0, 0), chunk_size=chunk)
        gradients = per_sample(weights, which, x, target, teacher_logits)
        found.append(torch.cat([value.flatten(1) for value in gradients.values()], 1))
    return found[0], found[1]


def _names_of_parameters(student: nn.Module) -> dict[str, str]:
    """The first name of each parameter, by all its names: one for each module that holds it."""
    first = {id(parameter): name for name, parameter in student.named_parameters()}
    return {
        f"{place}.{name}" if place else name: first[id(parameter)]
        for place, module in student.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def trained_names(student: nn.Module) -> list[str]:
    """Names of the parameters that are not frozen."""
    return [name for name, p in student.named_parameters() if p.requires_grad]


def control_cosine(student: nn.Module, teacher: nn.Module, x: Any, target: Tensor, *, temperature: float) -> float:
    """Mean cosine between grad KL at the student and grad CE(student) - grad CE(teacher), each at its own weights.

    The theory of arXiv 2305.17581 assumes that both are equal, so a value near 1 supports its use for a network. It is
    1 for linear models at temperature 1. Arguments as for `sample_gradients`; the teacher is a module of the student's
    architecture, in eval mode.

    Raises:
        UserError: the parameters of student and teacher differ in names or shapes.

    Example:
        >>> student, teacher = nn.Linear(1, 2), nn.Linear(1, 2)
        >>> x, target = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
        >>> round(control_cosine(student, teacher, x, target, temperature=1.0), 3)
        1.0
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
    names = trained_names(student)  # the teacher is frozen
    anchor, _ = sample_gradients(teacher, x, target, logits, temperature=temperature, parameters=names)
    return float(torch.cosine_similarity(k, g - anchor, dim=1).mean())
