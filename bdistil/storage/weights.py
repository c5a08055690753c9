"""Weights of a module in one file, of safetensors or of `torch.save`, read without executing code."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bdistil.errors import UserError
from bdistil.storage.files import atomic


def load_weights(network: nn.Module, path: Path, argument: str, *, new: Collection[str] = ()) -> None:
    """Loads weights into a module: safetensors by the suffix, else a file of `torch.save` with weights_only.

    Args:
        network: the module.
        path: the file; if it has the key ``state_dict`` (a checkpoint of Lightning or timm), that entry is read.
        argument: name of the argument with the path, for messages.
        new: names of weights that stay where those in the file have another shape, as a classifier of other classes.

    Raises:
        UserError: there is no such file, it contains no weights, or names or shapes differ.
    """
    if not path.is_file():
        raise UserError(f"Expected `{argument}` to be a file, got {str(path)!r}, which is not there.")
    try:
        safe = path.suffix == ".safetensors"
        state: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Expected `{argument}` to hold weights (safetensors, or a state_dict of torch.save), but {path} cannot be "
            f"read without executing it: {error}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UserError(f"Expected `{argument}` to hold a state_dict, got a {type(state).__name__} in {path}.")
    own = network.state_dict()
    state |= {name: own[name] for name in new if name in state and state[name].shape != own[name].shape}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"The weights in {path} are not those that `{argument}` needs: {error}") from error


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes weights as safetensors, atomically."""
    state = network.state_dict()
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with atomic(path) as temporary:
        save_file(plain, temporary)
