"""Bodies made of stages, whose activations later students build on.

Stages are counted from 1 in `Rung.at` and in messages; the activation after stage k has the key k - 1 in code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.inputs import call_on
from bdistil.utils.modules import eval_mode

# Key of the features (B, D) among the activations of a student: the output of its whole body.
FEATURES = -1
_POINTWISE = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class StagedBody(nn.Module):
    """Stages in order. The activation after each of them can be read by later students.

    Args:
        stages: modules; the last one returns features (B, D).

    Attributes:
        start: number of stages that an activation of an earlier student replaces; `stages` holds the others.
        projections: by activation key, the projection of the earlier student's activation that is added.
        refinement: module applied to the activation that the body starts from; its output replaces that activation.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages, self.projections = nn.ModuleList(stages), nn.ModuleDict()
        self.refinement: nn.Module | None = None
        self.start = 0

    @property
    def reads(self) -> list[int]:
        """Keys of the earlier student's activations that it reads: the one it starts from, then those it projects."""
        return [*([self.start - 1] if self.start else []), *map(int, self.projections)]

    @property
    def keys(self) -> list[int]:
        """Keys of the activations that later students can read, besides `FEATURES`."""
        return list(range(max(self.start - 1, 0), self.start + len(self.stages) - 1))

    def forward(self, x: Any, linked: Sequence[Tensor] = ()) -> Tensor:
        """Features (B, D) of x, with the activations named in `reads`."""
        return self.activations(x, linked)[FEATURES]

    def activations(self, x: Any, linked: Sequence[Tensor] = ()) -> dict[int, Tensor]:
        """The activations named in `keys`, and the features (B, D)."""
        given, found, value = iter(_laid_out(linked, self)), {}, x
        if self.start:
            value = next(given)
            value = found[self.start - 1] = value if self.refinement is None else self.refinement(value)
        added = {int(key): project(next(given)) for key, project in self.projections.items()}
        for key, stage in enumerate(self.stages, self.start):
            value = found[key] = _with_term(stage, value, added[key]) if key in added else call_on(stage, value)
        found[FEATURES] = found.pop(self.start + len(self.stages) - 1)
        return found

    def begin_at(self, count: int) -> None:
        """Drops the first `count` stages: an activation of the earlier student replaces them."""
        self.stages, self.start = self.stages[count:], count

    def project(self, given: Mapping[int, Tensor], x: Any, linked: Sequence[Tensor]) -> None:
        """Adds projections of the earlier student's activations to those of the same keys.

        Args:
            given: activations of the earlier student on an example batch.
            x: the example batch.
            linked: tensors that the body reads so far.

        Raises:
            UserError: two activations of one key have different resolutions, or none is shared.
        """
        with eval_mode(self), torch.no_grad():
            own = self.activations(x, linked)
        shared = [key for key in self.keys if key in given and key >= self.start]
        if not shared:
            raise UserError(
                f"Expected a student with an activation that the student before has, too; it has those after stages "
                f"{_counted(self.keys)}, the one before after {_counted(given)}. Take Rung(1, 'concat')."
            )
        for key in shared:
            stage = self.stages[key - self.start]
            self.projections[str(key)] = _projection(given[key], own[key], stage, key + 1)


def check_stages(body: StagedBody, value: Any) -> None:
    """Checks that the stages accept their inputs and do not change them in place, as later students read them.

    Raises:
        UserError: a stage, or the refinement, cannot take its input, or changes it in place; it is named.
    """
    named = [(f"Stage {number}", stage) for number, stage in enumerate(body.stages, body.start + 1)]
    if body.refinement is not None:
        named.insert(0, ("The refinement", body.refinement))
    with eval_mode(body), torch.no_grad():
        for name, stage in named:
            if isinstance(value, Tensor) and value.is_floating_point():
                value = torch.randn_like(value)  # an in-place ReLU would not change the output of a ReLU
            before = value.clone() if isinstance(value, Tensor) else None
            try:
                after = call_on(stage, value)
            except RuntimeError as error:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UserError(f"{name} of the student cannot take its input of {shape}: {error}.") from error
            if before is not None and not torch.equal(before, value):
                raise UserError(f"{name} of the student changes its input in place. Set inplace=False there.")
            value = after


def _laid_out(maps: Sequence[Tensor], body: nn.Module) -> Sequence[Tensor]:
    """Converts maps (B, C, H, W) to channels last if the body's weights are; the cache holds them channels first.

    Otherwise each convolution would convert its input, which took a quarter of a training step.
    """
    if not any(weight.ndim == 4 and not weight.is_contiguous() for weight in body.parameters()):
        return maps
    return [m.contiguous(memory_format=torch.channels_last) if m.ndim == 4 else m for m in maps]


def _with_term(stage: nn.Module, value: Any, term: Tensor) -> Tensor:
    """Output of a stage with a term added, before its final activation function if it has one."""
    layers = list(stage) if isinstance(stage, nn.Sequential) else [stage]
    last = layers.pop() if len(layers) > 1 and _is_activation_function(layers[-1]) else None
    for layer in layers:
        value = call_on(layer, value)
    out: Tensor = value + term if last is None else last(value + term)
    return out


def _is_activation_function(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__ == nn.ReLU.__module__ and kind is not nn.MultiheadAttention


def _projection(given: Tensor, own: Tensor, stage: nn.Module, number: int) -> nn.Module:
    """A 1x1 convolution or a linear layer from the earlier student's activation to the shape of the student's own.

    Sequences are (B, C, M) after a convolution, and (B, M, C) otherwise.
    """
    first = own.ndim > 3 or any(isinstance(module, nn.Conv1d) for module in stage.modules())
    rest = slice(2, None) if first else slice(1, -1)
    if own.ndim not in (2, *_POINTWISE) or given.ndim != own.ndim or given.shape[rest] != own.shape[rest]:
        raise UserError(
            f"Expected activations of one resolution after stage {number}, got {tuple(own.shape[1:])} and "
            f"{tuple(given.shape[1:])} of the student before. Take Rung(1, 'concat'), or stages that agree."
        )
    if own.ndim > 2 and first:
        return _POINTWISE[own.ndim](given.shape[1], own.shape[1], 1, bias=False)
    return nn.Linear(given.shape[-1], own.shape[-1], bias=False)


def _counted(keys: Any) -> str:
    return ", ".join(str(key + 1) for key in sorted(keys) if key != FEATURES) or "none"
