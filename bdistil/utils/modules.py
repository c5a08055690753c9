"""Eval mode and structure of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Context that puts a module into eval mode and then restores the mode of each submodule.

    >>> network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with eval_mode(network):
    ...     [part.training for part in network]
    [False, False]
    >>> [part.training for part in network]
    [True, False]
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode  # not train(mode): it sets the submodules as well


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Context that restores the buffers of a module at its end.

    >>> import torch
    >>> norm = nn.BatchNorm1d(2)
    >>> with kept_buffers(norm):
    ...     _ = norm(torch.ones(4, 2))
    >>> norm.running_mean.tolist()
    [0.0, 0.0]
    """
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])


def module_device(module: nn.Module) -> torch.device:
    """Device of a module's weights; the CPU if it has none."""
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))


def first_shared(module: nn.Module, other: nn.Module) -> str | None:
    """Name of the first trainable parameter of a module that another one holds as well; None if there is none.

    >>> layer = nn.Linear(1, 1)
    >>> first_shared(nn.Sequential(nn.ReLU(), layer), nn.ModuleList([layer])), first_shared(layer, nn.Linear(1, 1))
    ('1.weight', None)
    """
    held = {id(parameter) for parameter in other.parameters()}
    return next((name for name, p in module.named_parameters() if p.requires_grad and id(p) in held), None)


def shares_tensors(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold a parameter or buffer in common."""
    first, second = ({id(t) for t in (*m.parameters(), *m.buffers())} for m in (module, other))
    return not first.isdisjoint(second)


def structure_of(module: nn.Module) -> dict[str, str]:
    """Class and options of each submodule by name, as in its repr; lazy modules are left out.

    It distinguishes modules whose weights have the same shapes, for example by an activation or a stride.

    >>> structure_of(nn.Sequential(nn.ReLU(), nn.Dropout(0.1)))
    {'': 'Sequential()', '0': 'ReLU()', '1': 'Dropout(p=0.1, inplace=False)'}
    """
    parts = [(name, part) for name, part in module.named_modules() if not isinstance(part, LazyModuleMixin)]
    return {name: f"{type(part).__name__}({part.extra_repr()})" for name, part in parts}


def first_difference(there: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """The first difference between two structures, as text; None if they agree or `there` is unknown."""
    for name, value in now.items():
        if there is not None and there.get(name, value) != value:
            return f"{name or 'the module'} is {there[name]} there, {value} now"
    return None
