"""Reads third-party checkpoint files as plain values and tensors, without executing anything that a file names."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bdistil.errors import UserError, listed

# Keys under which scripts store weights; averaged ones first, as timm and torchvision evaluate those.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")
PLAIN = ("state_dict", "model", "model_state_dict", "network", "net", "module", "weights", "params", "teacher")
LEGACY_PICKLES = 4  # in the torch.save format before zip: magic number, version, system, content

State = dict[str, Any]


def read_state(path: Path, argument: str) -> State:
    """The weights in a safetensors or `torch.save` file by name; the format is detected from the content.

    Checkpoints of timm, torchvision, Lightning and training scripts store them under one of several keys, among other
    entries. Objects other than tensors and plain values (settings, NumPy numbers, paths) are read as empty stand-ins.

    Args:
        path: checkpoint file.
        argument: name of the argument with the path, for messages.

    Raises:
        UserError: there is no such file, or it holds no weights.
    """
    if not path.is_file():
        found = "which is a folder" if path.is_dir() else "which is not there"
        raise UserError(f"Expected `{argument}` to be a file, got {str(path)!r}, {found}.")
    try:
        content = load_file(path) if _is_safetensors(path) else _load(path)
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError,
            TypeError, AttributeError, LookupError) as error:  # fmt: skip
        reason = _reason(error)
        script = " TorchScript is a teacher by itself: TorchScriptTeacher." if "script" in reason.lower() else ""
        raise UserError(
            f"Expected `{argument}` to hold weights (safetensors, or a state_dict of torch.save), but {path} cannot be "
            f"read without executing it: {reason}.{script}"
        ) from error
    state = _find(content, path)
    if state is None:
        raise UserError(f"Expected `{argument}` to hold a state_dict, got {_describe(content)} in {path}.")
    return state


def _reason(error: Exception) -> str:
    """The message of an error without torch's advice to execute the file."""
    lines = (re.sub(r"^.*WeightsUnpickler error: | Please use .*", "", line) for line in str(error).splitlines())
    kept = " ".join(line for line in lines if not re.search(r"(?i)weights[_ ]only|torch\.load", line))
    return " ".join(kept.split()).strip(".")[:200]


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a JSON header and the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


class _Ignored(list[Any]):
    """Stand-in for any class or function that a file names: accepts all arguments and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)  # it may be a dictionary key

    def __setstate__(self, state: Any) -> None:
        """Discards the state."""


class _IgnoredMapping:
    """Stand-in for mappings: torch sets items of exact types only."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _load(path: Path) -> Any:
    """Content of a `torch.save` file; every global that torch does not consider safe becomes a stand-in."""
    names, mappings = _globals_of(path), set[str]()
    while True:
        stand_ins = {name: _stand_in(name, _IgnoredMapping if name in mappings else _Ignored) for name in names}
        try:
            with torch.serialization.safe_globals([*stand_ins.values()]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # names the class of a mapping that is not exactly a dict
            found = {name for name, kind in stand_ins.items() if repr(kind) in str(error)} - mappings
            if not found:
                raise
            mappings |= found


def _stand_in(name: str, kind: type) -> Any:
    module, _, qualified = name.rpartition(".")
    return type(qualified, (kind,), {"__module__": module, "__qualname__": qualified})


def _globals_of(path: Path) -> list[str]:
    """Dotted names in a file that torch would refuse, found without running it."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with open(path, "rb") as file:
        operations = (found for _ in range(LEGACY_PICKLES) for found in pickletools.genops(file))
        names = {str(value).replace(" ", ".") for operation, value, _ in operations if operation.name == "GLOBAL"}
    # The names of Python 2, which torch.save writes and torch.load translates.
    modern = (name.replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg.") for name in names)
    return sorted(name for name in modern if not name.startswith(("torch.", "collections.OrderedDict")))


def _find(content: Any, path: Path) -> State | None:
    """The weights in the content of a file: the content itself, or an entry of it."""
    if not isinstance(content, Mapping):
        return None
    found = dict(_entries(content))
    known = [name for name in (*AVERAGED, *PLAIN) if name in found]
    if not known:
        most = max(found.values(), key=_tensors, default={})
        return dict(content) if _tensors(content) > _tensors(most) else most if len(found) == 1 else None
    if known[0] in AVERAGED and len(known) > 1:
        rank_zero_info(f"Reading the averaged weights `{known[0]}` of {path}; it also has `{'`, `'.join(known[1:])}`.")
    return found[known[0]]


def _entries(content: Mapping[Any, Any]) -> Iterator[tuple[str, State]]:
    """Entries that hold weights, directly or one level deeper, as averaged models in checkpoints do."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Mapping):
            continue
        inner = [value, *(value[key] for key in PLAIN if isinstance(value.get(key), Mapping))]
        if state := next(filter(_is_state, inner), None):
            yield name, dict(state)


def _tensors(values: Mapping[Any, Any]) -> int:
    return sum(isinstance(value, Tensor) for value in values.values())


def _is_state(values: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a state dict; quantised and other modules add entries that are not tensors."""
    return _tensors(values) > 0 and all(isinstance(key, str) for key in values)


def _describe(content: Any) -> str:
    if isinstance(content, _Ignored):
        name = f"{type(content).__module__}.{type(content).__qualname__}"
        return f"a pickled {name} (save its weights alone: torch.save(model.state_dict(), path))"
    if isinstance(content, Mapping) and (several := dict(_entries(content))):
        return f"weights under several names ({listed(several, 5)}; save those of the network alone)"
    if isinstance(content, Mapping):
        return f"no tensors by name, but the entries {listed(content, 5)}" if content else "an empty dict"
    return f"a {type(content).__name__}"
