"""Teacher wrappers: frozen, adapted to the students' inputs and outputs, or an average of several."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.functional.distillation import at_least_float32
from bdistil.metrics.cost import is_compiled
from bdistil.models.inputs import call_on, expectation_of
from bdistil.teachers.api import SMALLEST_PROBABILITY
from bdistil.utils.trees import map_tensors


class FrozenTeacher(nn.Module):
    """Any ``nn.Module`` (x -> logits) as a teacher: always in eval mode, never with a gradient.

    The wrapped module is frozen in place: its parameters no longer require gradients. Its weights may have any
    precision: x is converted to theirs, and the logits to float32.

    Args:
        module: maps a batch x (B, ...) to logits (B, L), see `run_teacher`.

    Attributes:
        frozen: the parameters that required gradients before.

    Example:
        >>> teacher = FrozenTeacher(nn.Sequential(nn.Linear(4, 3), nn.Dropout()))
        >>> teacher.train()(torch.zeros(2, 4)).requires_grad, teacher.module.training
        (False, False)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.frozen = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in self.frozen:  # a scripted module has no requires_grad_()
            parameter.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode, whatever `mode` is."""
        with suppress(NotImplementedError):  # a graph of torch.export has the mode in which it was exported
            super().train(False)
        return self

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) float32 of a batch, without a graph."""
        if any(part.training for part in self.module.modules()):  # by a call on the module itself
            self.train(False)
        return run_teacher(self.module, x).float()

    @property
    def fingerprint(self) -> str:
        """Sha256 over the state of a teacher; equal for equal teachers.

        Attributes and functions are not part of it: when a run resumes, the teacher's outputs are compared, too.

        State is all weights and buffers, other state such as packed int8 weights, code and constants of scripted
        modules, and the string `identity` of modules that have one. A compiled module equals the plain one.
        """
        digest = hashlib.sha256()
        for name, value in self.module.state_dict().items():
            digest.update(name.replace("_orig_mod.", "").encode())
            digest.update(_content(value))
        for part in _outermost(self.module):
            scriptable: Any = part
            scripted, identity = isinstance(part, torch.jit.ScriptModule), getattr(part, "identity", "")
            own = str(identity).encode() if isinstance(identity, str | nn.Module) else b""  # no function or object
            digest.update(scriptable.save_to_buffer() if scripted else own)
        return digest.hexdigest()


def _content(value: Any) -> bytes:
    """Bytes of a tensor, and of values that a module keeps beside its tensors; equal in every process."""
    if isinstance(value, Tensor) and value.is_quantized:
        scheme = [value.q_scale(), value.q_zero_point()] if value.qscheme() == torch.per_tensor_affine else [
            value.q_per_channel_scales(), value.q_per_channel_zero_points(), value.q_per_channel_axis()]  # fmt: skip
        return _content([value.int_repr(), *scheme])
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, list | tuple):
        return b"".join(map(_content, value))
    if isinstance(value, dict):
        return b"".join(_content(part) for pair in value.items() for part in pair)
    return re.sub(r" at 0x\w+", "", repr(value)).encode()  # addresses differ between processes


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """A module and its submodules, without those inside a scripted one."""
    if is_compiled(module):  # it has the attributes of the module inside
        yield from _outermost(module.get_submodule("_orig_mod"))
        return
    yield module
    if not isinstance(module, torch.jit.ScriptModule):
        for child in module.children():
            yield from _outermost(child)


def comes_trained(network: nn.Module) -> bool:
    """Whether a network needs no training in a recipe: its attribute `trained`, False by default."""
    return bool(getattr(network, "trained", False))


def run_teacher(network: nn.Module, x: Any) -> Tensor:
    """Logits (B, L) of a teacher for x, whose real numbers are converted to the precision of its weights.

    A teacher may return its logits in a larger structure: as the attribute or key ``logits``, as the only value of a
    mapping, or first in a tuple. x of several parts may be unpacked into several arguments, see `call_on`.

    Raises:
        UserError: the output holds no logits, or an operator of the network is missing on the device of x.

    Example:
        >>> run_teacher(nn.Linear(2, 3).double(), torch.zeros(1, 2)).dtype
        torch.float64
    """
    if not isinstance(network, AdaptedTeacher | AveragedTeacher):  # they convert x for each of their networks
        kinds = (weight.dtype for weight in network.parameters() if weight.is_floating_point())
        if kind := next(kinds, None):
            x = map_tensors(x, lambda part: part.to(kind) if part.is_floating_point() else part)
    try:
        return _logits_in(call_on(network, x), network)
    except NotImplementedError as error:  # torch has no such operator for the device, as of int8 on a GPU
        if "operator" not in str(error):
            raise
        raise UserError(
            f"The teacher {type(network).__name__} does not run on this device: {str(error).partition('. ')[0]}. Give "
            "Trainer(accelerator='cpu') (--trainer.accelerator cpu)."
        ) from error


def _logits_in(answer: Any, network: nn.Module) -> Tensor:
    found = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    if isinstance(answer, Mapping) and found is None:
        found = answer.get("logits", next(iter(answer.values())) if len(answer) == 1 else None)
    elif isinstance(answer, tuple | list) and found is None:
        found = next(iter(answer), None)
    if isinstance(found, Tensor):
        return found
    keys = f" with {', '.join(map(repr, answer))}" if isinstance(answer, Mapping) else ""
    raise UserError(
        f"Expected logits (B, L) of the teacher {type(network).__name__}, alone, as `logits` or first in a tuple, got "
        f"{type(answer).__name__}{keys}. Wrap it in a module that returns the logits."
    )


class AdaptedTeacher(nn.Module):
    """Adapts a teacher with another normalisation, resolution or kind of output to the x of the students.

    Loading weights leaves the normalisation as it was given here.

    Args:
        network: maps its own inputs to logits (B, L).
        mean: mean per channel in the normalisation of the network's training data; by default that of a timm network.
        std: standard deviation per channel, likewise.
        data_mean: mean per channel in the normalisation of x; 0 if x is not normalised.
        data_std: standard deviation per channel, likewise; 1 if x is not normalised.
        size: (H, W), or the side, to which images (B, C, H, W) are scaled; None keeps their size.
        axis: axis of the channels in a batch.
        probabilities: whether the network returns probabilities; their logarithm is taken, of at least 1e-7, as a
            forest answers with zeros.

    Raises:
        UserError: a standard deviation or a size that is not positive.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
        data_mean: float | list[float] = 0.0,
        data_std: float | list[float] = 1.0,
        size: int | tuple[int, int] | None = None,
        axis: int = 1,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.axis, self.probabilities = network, axis, probabilities
        expected = expectation_of(network)
        own_mean = per_channel(mean if mean is not None else expected.mean if expected else 0.0)
        own_std = per_channel(std if std is not None else expected.std if expected else 1.0)
        self.data_mean, self.data_std = per_channel(data_mean), per_channel(data_std)
        self.size = (size, size) if isinstance(size, int) else size
        if min(own_std.min(), self.data_std.min()) <= 0 or (self.size and min(self.size) < 1):
            raise UserError(f"Expected `std`, `data_std` and `size` > 0, got {std}, {data_std} and {size}.")
        self.register_buffer("scale", self.data_std / own_std)
        self.register_buffer("shift", (self.data_mean - own_mean) / own_std)
        self.trained = comes_trained(network)
        self.identity = f"{self.size} {axis} {probabilities}"  # settings that affect the logits besides the weights
        self.register_load_state_dict_pre_hook(_keep_normalisation)  # type: ignore[no-untyped-call]

    @property
    def rescales(self) -> bool:
        """Whether the normalisations of the data and of the network differ."""
        return not bool((self.scale == 1).all() and (self.shift == 0).all())

    def normalised(self, x: Tensor) -> Tensor:
        """Converts x (B, C, ...) to the network's normalisation; its size is unchanged."""
        after = [1] * (x.ndim - 1 - self.axis % x.ndim)
        return x * self.scale.reshape(-1, *after) + self.shift.reshape(-1, *after)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of x (B, C, ...), normalised and sized as the data."""
        x = self.normalised(x)
        if self.size is not None and tuple(x.shape[-2:]) != tuple(self.size):
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        answers = run_teacher(self.network, x)
        if not self.probabilities:
            return answers
        return at_least_float32(answers).clamp_min(SMALLEST_PROBABILITY).log()


def _keep_normalisation(teacher: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Scale and shift stay as given: those in a file belong to the data on which its network was trained."""
    state.update({prefix + name: value for name, value in teacher.named_buffers(recurse=False)})


def per_channel(values: Any) -> Tensor:
    """Numbers, or one number, as a vector of float32."""
    return torch.as_tensor(values, dtype=torch.float32).reshape(-1)


class AveragedTeacher(nn.Module):
    """The mean of several teachers.

    Args:
        networks: each maps x to logits (B, L).
        of: `probabilities` returns the logarithm of the mean of the softmax probabilities; `logits` the mean of the
            logits, as regression needs.

    Raises:
        UserError: no network, or an unknown `of`.
    """

    def __init__(self, networks: list[nn.Module], of: Literal["probabilities", "logits"] = "probabilities") -> None:
        super().__init__()
        if not networks or of not in ("probabilities", "logits"):
            raise UserError(
                "Expected one network or more and `of` to be 'probabilities' or 'logits', "
                f"got {len(networks)} and {of!r}."
            )
        self.networks, self.of = nn.ModuleList(networks), of
        self.trained, self.identity = all(map(comes_trained, networks)), of

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L); those of `probabilities` are log-probabilities, which the ledger centres."""
        answers = torch.stack([run_teacher(network, x).float() for network in self.networks])  # (K, B, L)
        if self.of == "logits":
            return answers.mean(0)
        return torch.log_softmax(answers, -1).logsumexp(0) - math.log(len(answers))
