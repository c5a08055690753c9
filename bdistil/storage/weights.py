"""Weights of a module: written as safetensors, read from any checkpoint whose names match up to a prefix."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bdistil.errors import UserError, listed
from bdistil.storage.checkpoint_files import State, read_state
from bdistil.storage.files import atomic

# Components that wrappers insert into weight names: torch.compile, FSDP, activation checkpointing.
INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Attributes under which training scripts keep the network; others are not read.
WRAPPERS = {"module", "model", "network", "net"}


def load_weights(network: nn.Module, path: Path, argument: str, *, new: Collection[str] = ()) -> None:
    """Loads the weights of a checkpoint file into a module, without executing anything in the file.

    Names may differ by a common prefix, such as that of an attribute (`model.`), DDP (`module.`) or torch.compile.

    Args:
        network: the module.
        path: safetensors, or a file of `torch.save`, see `read_state`.
        argument: name of the argument with the path, for messages.
        new: names of weights that are kept if the file lacks them or has another shape, for example those of a
            classifier for other classes.

    Raises:
        UserError: there is no such file, it contains no weights, or names or shapes differ; the message counts the
            names that match.
    """
    state = read_state(path, argument)
    own = network.state_dict()
    found = _choose(_plain_names(own), _plain_names(state), set(new), f"{path} for `{argument}`")
    if not found.fits:
        raise UserError(f"The weights in {path} are not those that `{argument}` needs: {found.difference()}")
    if found.outside:
        rank_zero_info(f"Read {len(found.same)} weights under `{found.prefix}` of {path}; left out {found.outside}.")
    try:
        network.load_state_dict({name: found.same.get(_plain(name), value) for name, value in own.items()})
    except RuntimeError as error:
        raise UserError(f"The weights in {path} are not those that `{argument}` needs: {error}") from error


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes weights as safetensors, atomically."""
    state = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with atomic(path) as temporary:
        save_file(plain, temporary)


def _plain_names(state: Mapping[str, Any]) -> State:
    return {_plain(name): value for name, value in state.items()}


def _plain(name: str) -> str:
    """A name without the components that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in INSIDE)


@dataclass(frozen=True)
class _Match:
    """The weights of a module compared with those in a file whose names begin with `prefix`.

    Attributes:
        prefix: prefix of the names in the file.
        own_prefix: prefix of the names in the module, absent in the file.
        same: values from the file, by name in the module.
        missing: names in the module that the file lacks.
        beyond: names in the file, under the prefix, that the module lacks.
        shapes: names of weights whose shape or kind of dtype differs, with the difference.
        outside: number of names in the file that do not begin with the prefix.
        total: number of names in the module.
    """

    prefix: str
    own_prefix: str
    same: State
    missing: list[str]
    beyond: list[str]
    shapes: list[str]
    outside: int
    total: int

    @property
    def fits(self) -> bool:
        """Whether the module can be loaded; of several attributes in a file, only one with a usual name is accepted."""
        known = not self.outside or self.prefix.partition(".")[0] in WRAPPERS
        return known and not (self.missing or self.beyond or self.shapes)

    def difference(self) -> str:
        """At most five lines: how many names match, the first that do not, and the likely prefix."""
        counted = len(self.same) + len(self.shapes)
        under = f" under `{self.prefix}`" if self.prefix else ""
        lines = [f"{counted} of its {self.total} names are in the file{under}, {len(self.same)} with the same shape."]
        lines += [f"  missing in the file: {listed(self.missing)}"] if self.missing else []
        lines += [f"  only in the file: {listed(self.beyond)}"] if self.beyond else []
        lines += [f"  of another shape: {listed(self.shapes, 2)}"] if self.shapes else []
        if self.prefix and self.outside:
            lines.append(
                f"  likely prefix: `{self.prefix}`, which {self.outside} of the names in the file do not have; save "
                "the weights of that module alone."
            )
        elif self.prefix and counted:
            lines.append(f"  likely prefix: `{self.prefix}`, which was taken off.")
        return "\n".join(lines)


def _choose(own: State, state: State, new: set[str], where: str) -> _Match:
    """The match under the prefix where a file holds the weights of a module, or else the closest match.

    Raises:
        UserError: the file holds them under several prefixes, with different values.
    """
    every = [_match(own, state, new, own_prefix, prefix) for own_prefix, prefix in sorted(set(_prefixes(own, state)))]
    fitting = [match for match in every if match.fits]
    if not fitting:
        return max(every, key=lambda match: (len(match.same), len(match.shapes), -len(match.prefix)))
    first = fitting[0]
    if different := [match.prefix for match in fitting[1:] if not _equal(match.same, first.same)]:
        raise UserError(
            f"Expected weights under one prefix in {where}, got other ones under {listed([first.prefix, *different])}: "
            "save those of the module that you mean alone."
        )
    return first


def _prefixes(own: State, state: State) -> Iterator[tuple[str, str]]:
    """Pairs of a prefix in the module and one in the file that make at least one name the same."""
    yield "", ""
    wrapper = ""
    while True:
        needed = [name.removeprefix(wrapper) for name in own if name.startswith(wrapper)]
        for anchor in {needed[0], needed[len(needed) // 2], needed[-1]} if needed else ():
            for name in state:
                if name.endswith(anchor) and (len(name) == len(anchor) or name[-len(anchor) - 1] == "."):
                    yield wrapper, name.removesuffix(anchor)
        heads = {name.partition(".")[0] for name in needed}
        if len(heads) != 1 or not all("." in name for name in needed):
            return
        wrapper += f"{heads.pop()}."


def _match(own: State, state: State, new: set[str], own_prefix: str, prefix: str) -> _Match:
    under = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    same: State = {}
    missing, shapes = [], []
    for name, value in own.items():
        short = name.removeprefix(own_prefix)
        if short not in under:
            missing += [] if _may_lack(name, value, new) else [short]
        elif (reason := _differs(value, under.pop(short))) is None:
            same[name] = state[prefix + short]
        elif name not in new:
            shapes.append(f"{short} ({reason})")
    beyond = [name for name in under if not _is_bookkeeping(name)]
    outside = sum(not name.startswith(prefix) and not _is_bookkeeping(name) for name in state)
    return _Match(prefix, own_prefix, same, missing, beyond, shapes, outside, len(own))


def _may_lack(name: str, value: Any, new: set[str]) -> bool:
    return name in new or not isinstance(value, Tensor) or name.endswith("num_batches_tracked")


def _is_bookkeeping(name: str) -> bool:
    """Whether a name is that of a counter of `AveragedModel` or of a MAC profiler, not of a weight."""
    return name.rpartition(".")[2] in ("n_averaged", "total_ops", "total_params")


def _differs(own: Any, there: Any) -> str | None:
    """How the entry in the file differs from a weight; None if it can be loaded."""
    if not isinstance(own, Tensor) or is_lazy(own):
        return None
    if not isinstance(there, Tensor):
        return f"a {type(there).__name__} in the file"
    if own.shape != there.shape:
        return f"{tuple(there.shape)} in the file, {tuple(own.shape)} here"
    if own.is_floating_point() and not there.is_floating_point():
        return f"{there.dtype} in the file, {own.dtype} here".replace("torch.", "")
    return None


def _equal(one: State, other: State) -> bool:
    tensors = [(value, other[name]) for name, value in one.items() if isinstance(value, Tensor)]
    return all(torch.equal(value, twin) for value, twin in tensors)
