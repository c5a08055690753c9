"""Cost of a module: multiply-adds, parameters, bytes of activations, milliseconds.

A multiply-add counts as 1, and only in matmul-like work (convolutions, linear layers, recurrent layers, attention);
norms, pools and elementwise operators are free. Any other operator is an error, so that no network looks cheaper than
it is.
"""

from __future__ import annotations

import re
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bdistil.errors import UserError
from bdistil.utils.trees import leaves_of, map_tensors

# Operators without matmul-like work, besides the views and pointwise ones that torch marks as such.
FREE = re.compile(
    r"""aten::_*(
    ((log|safe)_)?softmax|bernoulli|embedding(_bag)?|\w*norm\w*|((native|feature|alpha|fused)_)*dropout|grid_sampler_[23]d|glu|
    (adaptive_)?(avg|max)_pool[123]d(_with_indices)?|upsample_\w+|sum|mean|prod|any|all|(std|var)(_mean)?|logsumexp|
    cum(sum|prod)|topk|(arg)?(sort|max|min)|a(min|max|minmax)|(to_)?copy|(unsafe_)?(view|split(_with_sizes)?)|cat|
    stack|im2col|col2im|repeat(_interleave)?|roll|flip|rot90|constant_pad_nd|(reflection|replication)_pad\dd|
    pixel_(un)?shuffle|channel_shuffle|scatter(_add)?|index\w*|gather|masked_(select|scatter|fill)|take|nonzero|tri[lu]|
    diag_embed|(new_)?(empty|full|zeros|ones)\w*|rand\w*|normal|arange|linspace|scalar_tensor|eye|fill|zero|resize|
    local_scalar_dense|lift_fresh|assert\w*|pack_padded_sequence|nested_tensor_from_mask_left_aligned|reshape\w*|
    hardswish|gelu|mish|abs|threshold|floor_divide|rsub|eq|ne|[gl][et]|t|transpose|(un)?squeeze|detach|as_strided)_*""",
    re.VERBOSE,
)  # last line: variants of pointwise and view operators that torch does not mark


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Size, weights: Any, second: Any = None, *_: Any, **__: Any) -> int:
    """FLOPs of a recurrent layer: each matrix is applied once per input row, padded or packed."""
    matrices = (weights, second) if isinstance(weights, Size) else weights
    return 2 * prod(x[:-1]) * sum(prod(matrix) for matrix in matrices if len(matrix) == 2)


# FLOPs from argument shapes, for operators without a formula in torch. As in torch, a multiply-add counts as 2.
_BY_NAME: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("mv", "dot", "vdot"), lambda matrix, *_, **__: 2 * prod(matrix)),
    "addmv": lambda _, matrix, *__, **___: 2 * prod(matrix),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    **dict.fromkeys(("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"), _recurrent),
    "_lstm_mps": lambda x, _, weights, *__, **___: _recurrent(x, weights),
}
# Older versions of torch lack some of them.
FORMULAS = {getattr(torch.ops.aten, name): count for name, count in _BY_NAME.items() if hasattr(torch.ops.aten, name)}


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass.

    Attributes:
        macs: multiply-adds of matmul-like work.
        params: number of parameters; shared ones count once.
        weight_bytes: bytes of those parameters.
        activation_bytes: peak bytes of live tensors in a pass without autograd, excluding inputs and scratch memory
            inside operators.
        uncounted: number of calls of each operator that is neither counted in `macs` nor known to be free.
        by_module: `macs` of each submodule by dotted name, "" for the whole.
    """

    macs: int
    params: int
    weight_bytes: int
    activation_bytes: int
    uncounted: dict[str, int]
    by_module: dict[str, int]


@dataclass(frozen=True)
class OutsideCost:
    """Cost of a pass that runs outside torch; a module's method `outside_cost` returns that of its last pass.

    Attributes as for `Cost`.
    """

    macs: int
    params: int
    weight_bytes: int
    uncounted: dict[str, int]


def measure_cost(
    module: nn.Module, inputs: tuple[Any, ...], *, uncounted: Literal["error", "record"] = "error"
) -> Cost:
    """Cost of ONE forward pass on these inputs; a batch of one gives figures per sample.

    The module runs twice in eval mode; its state and the random states are restored. Causal attention counts in full.
    Only branches taken by these inputs are counted. A scripted module is counted as a whole.

    Args:
        module: any module on any device.
        inputs: its positional arguments: tensors, None, or lists of them; they are not modified.
        uncounted: "error" refuses operators that cannot be counted, "record" names them in `Cost.uncounted`.

    Raises:
        UserError: an operator cannot be counted, or the inputs are not a tuple.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> cost = measure_cost(net, (torch.zeros(1, 4),))
        >>> cost.macs, cost.params, cost.by_module["2"]
        (42, 51, 18)
    """
    with _as_found(module, inputs), torch.inference_mode(False):
        with torch.no_grad(), BaseTorchFunctionMode():  # under such a mode, transformers avoid their fused path
            by_module, missed = _count(module, _cloned(inputs))
            copies = _cloned(inputs)
            with _LiveBytes(_tensors(module, copies)) as live:
                module(*copies)
        counted: list[Any] = [m for m in module.modules() if hasattr(m, "outside_cost")]
        outside: list[OutsideCost] = [m.outside_cost() for m in counted]
    by_module[""] += sum(part.macs for part in outside)
    missed = sum((Counter(part.uncounted) for part in outside), missed)
    if missed and uncounted != "record":
        names = ", ".join(f"{name} x{times}" for name, times in sorted(missed.items()))
        raise UserError(
            f"{type(module).__name__} runs operators whose multiply-adds are not counted: {names}. "
            'Its cost would look smaller than it is; pass uncounted="record" to count the rest and keep these names.'
        )
    parameters = list(module.parameters())
    return Cost(
        macs=by_module[""],
        params=sum(p.numel() for p in parameters) + sum(part.params for part in outside),
        weight_bytes=sum(p.nbytes for p in parameters) + sum(part.weight_bytes for part in outside),
        activation_bytes=live.peak,
        uncounted=dict(missed),
        by_module=by_module,
    )


def latency_ms(module: nn.Module, inputs: tuple[Any, ...], *, repeats: int = 30, warmup: int = 5) -> float:
    """Median wall-clock milliseconds of a forward pass in eval and inference mode, including device work.

    Example:
        >>> latency_ms(nn.Linear(4, 6), (torch.zeros(1, 4),), repeats=3) > 0
        True
    """
    times, inputs = [], _cloned(inputs)
    with _as_found(module, inputs) as devices, torch.inference_mode():
        for _ in range(warmup + repeats):
            start = time.perf_counter()
            module(*inputs)
            for device in devices:
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[warmup:])


def training_macs(
    *, student: int, links: int = 0, samples_seen: int, teacher: int = 0, teacher_samples: int = 0
) -> int:
    """Multiply-adds of a training run, from the forward MACs per sample of the student, its links and the teacher.

    Convention: a step costs 3 forward passes of the student (one forward, two matching products backward); 2.92 was
    measured on a small conv net, whose first layer needs no input gradient. Frozen links and teacher cost 1.

    Example:
        >>> training_macs(student=10, samples_seen=7, teacher=100, teacher_samples=5)
        710
    """
    return (3 * student + links) * samples_seen + teacher * teacher_samples


def _tensors(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    given = [leaf if isinstance(leaf, Tensor) else leaf.data for leaf in leaves_of(inputs)]
    return [*module.parameters(), *module.buffers(), *given]


def _cloned(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies that a module may write to and that autograd accepts even if the originals are inference tensors."""
    return tuple(map_tensors(x, lambda tensor: tensor.detach().clone()) for x in inputs)


@contextmanager
def as_written(*modules: nn.Module) -> Iterator[None]:
    """Context that undoes torch.compile: compiled code cannot be counted or exported, nor does it pay off for one pass.

    Covers ``module.compile()`` and, inside the given modules, submodules made by ``torch.compile(module)``.

    Example:
        >>> net = nn.Linear(4, 6)
        >>> net.compile()
        >>> with as_written(net):
        ...     net._compiled_call_impl is None
        True
    """
    inside = [m for module in modules for m in module.modules()]
    compiled = [(m, made) for m in inside if (made := vars(m).pop("_compiled_call_impl", None)) is not None]
    wrapped = [(m, name, part) for m in inside for name, part in m.named_children() if is_compiled(part)]
    for m, name, part in wrapped:
        setattr(m, name, part.get_submodule("_orig_mod"))
    try:
        yield
    finally:
        for m, name, part in wrapped:
            setattr(m, name, part)
        for m, made in compiled:
            vars(m)["_compiled_call_impl"] = made


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was made by ``torch.compile(module)``; the original module is its only child."""
    return [name for name, _ in module.named_children()] == ["_orig_mod"]


@contextmanager
def _as_found(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[set[torch.device]]:
    """Eval-mode context that restores attributes, modes, hooks, buffers and random states. Yields the GPUs used."""
    if not isinstance(inputs, tuple):
        raise UserError(f"Expected `inputs` to be a tuple of positional arguments, such as (x,), got {type(inputs)}.")
    tables = [(t, dict(t)) for m in module.modules() for t in (vars(m), *vars(m).values()) if isinstance(t, dict)]
    buffers = [(b, b.detach().clone()) for b in module.buffers() if not (b.is_inference() or b.is_meta)]
    devices = {t.device for t in _tensors(module, inputs)} - {torch.device("cpu"), torch.device("meta")}
    mps = torch.mps.get_rng_state() if any(d.type == "mps" for d in devices) else None
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]), as_written(module):
            for m in module.modules():
                m.training = False  # not eval(): where a module overrides it, its effects would stay
            yield devices
    finally:
        for table, items in tables:  # in place: hook handles refer to these dictionaries
            table.clear()
            table.update(items)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.detach().copy_(value)
        if mps is not None:
            torch.mps.set_rng_state(mps)


class _Uncounted(TorchDispatchMode):
    """Counts the calls of operators that have no formula and are not known to be free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, name = func.overloadpacket, func.name().partition(".")[0]
        free = func.is_view or torch.Tag.pointwise in func.tags or FREE.fullmatch(name)
        if not free and packet not in flop_registry and packet not in FORMULAS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _count(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, int], Counter[str]]:
    """Multiply-adds of submodules by dotted name, and the calls of operators that were not counted."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, _Uncounted() as uncounted:
        module(*inputs)
    counts, root = counter.get_flop_counts(), type(module).__name__  # under the names of the class and the submodule
    macs = {name: sum(counts.get(f"{root}.{name}", {}).values()) // 2 for name, _ in module.named_modules()}
    return macs | {"": int(counter.get_total_flops()) // 2}, uncounted.calls


class _LiveBytes(TorchDispatchMode):
    """Tracks the storages that operators allocate until each is freed."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = {t.untyped_storage()._cdata: 0 for t in given}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in leaves_of(out):
            if leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata).atexit = False
        self.peak = max(self.peak, sum(self.live.values()))
        return out
