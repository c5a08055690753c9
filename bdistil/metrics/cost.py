"""What a module costs: multiply-adds, parameters, bytes of activations, milliseconds.

A multiply-add counts 1, and only in matmul-like work (convolutions, linear layers, recurrent nets, attention); norms,
pools and elementwise operators are free. Any other operator is an error, so that no net looks cheaper than it is.
"""

from __future__ import annotations

import statistics
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bdistil.errors import UserError
from bdistil.metrics.mac_rules import FREE_OPERATORS, FREE_WHEN_RUN, RULES, not_free


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass."""

    macs: int  # multiply-adds of matmul-like work
    params: int  # a shared one counts once
    weight_bytes: int  # of those parameters
    activation_bytes: int  # peak of the live bytes made without autograd; no inputs, no scratch inside an operator
    uncounted: dict[str, int]  # operators that `macs` leaves out and that are not known to be free: how often each ran
    by_module: dict[str, int]  # macs of each submodule by dotted name, "" for the whole


@dataclass(frozen=True)
class OutsideCost:
    """Cost of a pass outside of torch, as the method `outside_cost` of a module tells it of its last one."""

    macs: int
    params: int
    weight_bytes: int
    uncounted: dict[str, int]


def measure_cost(
    module: nn.Module, inputs: tuple[Any, ...], *, uncounted: Literal["error", "record"] = "error"
) -> Cost:
    """Cost of ONE forward pass on these inputs: give a batch of one for figures per sample.

    Limits: a `torch.autograd.Function` is one uncounted operator, causal attention counts in full, and of branches only
    those that these inputs take. The module runs twice in eval mode and is left, like the random states, as found. With
    a scripted part, or one that runs outside of torch, only the whole is counted, not each submodule.

    Args:
        module: any module on any device.
        inputs: its positional arguments: tensors, None, lists of them. They are not modified.
        uncounted: "error" refuses operators that cannot be counted, "record" names them in `Cost.uncounted`.

    Raises:
        UserError: for such an operator, or inputs that are not a tuple.
    """
    with _as_found(module, inputs), torch.inference_mode(False):
        outside: list[Any] = [m for m in module.modules() if hasattr(m, "outside_cost")]
        scripted = any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())
        by_module, missed = (_count_running if outside or scripted else _count)(module, _cloned(inputs))
        copies = _cloned(inputs)
        with torch.no_grad(), BaseTorchFunctionMode(), _LiveBytes(_tensors(module, copies)) as live:
            module(*copies)
        told: list[OutsideCost] = [m.outside_cost() for m in outside]
    by_module[""] += sum(part.macs for part in told)
    missed = dict(sum((Counter(part.uncounted) for part in told), Counter(missed)))
    if missed and uncounted != "record":
        names = ", ".join(f"{name} x{times}" for name, times in sorted(missed.items()))
        raise UserError(
            f"{type(module).__name__} runs operators whose multiply-adds are not counted: {names}. "
            'Its cost would look smaller than it is; pass uncounted="record" to count the rest and keep these names.'
        )
    params, weight_bytes = sum(p.numel() for p in module.parameters()), sum(p.nbytes for p in module.parameters())
    params, weight_bytes = params + sum(p.params for p in told), weight_bytes + sum(p.weight_bytes for p in told)
    return Cost(by_module[""], params, weight_bytes, live.peak, missed, by_module)


def latency_ms(module: nn.Module, inputs: tuple[Any, ...], *, repeats: int = 30, warmup: int = 5) -> float:
    """Median wall milliseconds of a forward pass in eval and inference mode, until the device is done."""
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
    """Multiply-adds of a training run, from forward macs a sample of the student, its links and the teacher.

    Convention: a step costs the student 3 forward passes (one forward, two products of its size backward); 2.92 was
    measured on a small conv net, whose first layer needs no gradient to its input. Links and teacher are frozen: 1.
    """
    return (3 * student + links) * samples_seen + teacher * teacher_samples


def _tensors(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    leaves = (*module.parameters(), *module.buffers(), *tree_leaves(inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _cloned(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies that a module may write to, and that autograd takes even where the originals are inference tensors."""
    return tuple(tree_map_only(Tensor, lambda x: x.detach().clone(), inputs))


@contextmanager
def as_written(*modules: nn.Module) -> Iterator[None]:
    """While open, what ``module.compile()`` made is out of use: it cannot be traced, and is not worth a single pass."""
    inside = [m for module in modules for m in module.modules()]
    compiled = [(m, made) for m in inside if (made := vars(m).pop("_compiled_call_impl", None)) is not None]
    try:
        yield
    finally:
        for m, made in compiled:
            vars(m)["_compiled_call_impl"] = made


@contextmanager
def _as_found(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[set[torch.device]]:
    """Eval mode inside; afterwards attributes, modes, hooks, buffers and random states are as before. Yields GPUs."""
    if not isinstance(inputs, tuple):
        raise UserError(f"Expected `inputs` to be a tuple of positional arguments, such as (x,), got {type(inputs)}.")
    tables = [(t, dict(t)) for m in module.modules() for t in (vars(m), *vars(m).values()) if isinstance(t, dict)]
    buffers = [(b, b._version, b.detach().clone()) for b in module.buffers() if not b.is_inference()]
    devices = {t.device for t in _tensors(module, inputs)} - {torch.device("cpu"), torch.device("meta")}
    mps = torch.mps.get_rng_state() if any(d.type == "mps" for d in devices) else None
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]), as_written(module):
            for m in module.modules():
                m.training = False  # not eval(): where a module overrides it, its effects would stay
            yield devices
    finally:
        for table, items in tables:  # in place: hook handles hold on to these dictionaries
            table.clear()
            table.update(items)
        for buffer, version, value in buffers:
            if buffer._version != version:
                buffer.detach().copy_(value)
        if mps is not None:
            torch.mps.set_rng_state(mps)


class _Keep(TorchFunctionMode):
    """Keeps every tensor that is made. While such a mode is on, transformers do not take their fused paths."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


def _all_outputs(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """All that a pass makes: tracing drops work that no output depends on, and knows few types of output."""
    keep = _Keep()
    with keep:
        module(*inputs)
    return keep.made


def _count(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds by submodule, and how often each operator ran that was not counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing fvcore scripts a function, which torch deprecates
        from fvcore.nn import FlopCountAnalysis
    wrapper = nn.Module()
    wrapper.module, wrapper.forward = module, partial(_all_outputs, module, inputs)
    # Cleared first: a handle of None would not switch off fvcore's own for norms and pools.
    analysis = FlopCountAnalysis(wrapper, ()).clear_op_handles().set_op_handle(**RULES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.enable_grad():
        by_module = analysis.by_module()
    # "module.conv" of the wrapper is "conv" of the module
    macs = {k.removeprefix("module").removeprefix("."): int(v) for k, v in by_module.items()}
    return macs, not_free(analysis.unsupported_ops(), FREE_OPERATORS)


class _Ran(TorchDispatchMode):
    """Counts operators that torch's flop counter does not know."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in flop_registry:
            self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _count_running(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """The same for a module that cannot be traced: what its operators come down to, seen as they run."""
    with FlopCounterMode(display=False) as counter, _Ran() as ran:  # the former counts 2 a multiply-add
        module(*inputs)
    return {"": int(counter.get_total_flops()) // 2}, not_free(ran.names, f"{FREE_OPERATORS}|{FREE_WHEN_RUN}")


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make until each is freed."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = {t.untyped_storage()._cdata: 0 for t in given}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata).atexit = False
        self.peak = max(self.peak, sum(self.live.values()))
        return out
