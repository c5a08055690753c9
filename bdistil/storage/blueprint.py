"""The structure of a module as plain JSON, from which it is rebuilt without the code that configured it.

The weights go to a safetensors file; everything else is here: classes by dotted path, plain attributes, submodules,
shared tensors. `rebuild` imports the classes and sets their attributes. It calls no constructor, replaces no method,
and accepts no functions but those of torch.nn, timm, math and the package of the class. Importing a class still runs
its module, so load only runs of people you trust.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.errors import UserError

Plan = dict[str, Any]

# Attributes that nn.Module, recurrent networks and torch.compile create again by themselves.
_INTERNAL = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_compiled_call_impl"}
# Containers by their tags.
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "size": torch.Size, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, Any] = {"dict": dict, "ordereddict": OrderedDict}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class IndescribableError(ValueError):
    """A module holds something that cannot be written as plain JSON; the message names it."""


def describe(module: nn.Module) -> tuple[Plan, dict[str, Tensor]]:
    """Describes a module: its structure as plain values, and copies of all its tensors by dotted name.

    Raises:
        IndescribableError: a hook, or an attribute that is neither plain data nor a named function or class.
    """
    writer = _Writer()
    return writer.module(module, ""), writer.tensors


def reason_indescribable(module: nn.Module) -> str | None:
    """Reason why a module cannot be rebuilt from a description; None if it can."""
    try:
        describe(module)
    except IndescribableError as error:
        return str(error)
    return None


def rebuild(plan: Plan, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Builds the module that `describe` described, with its weights.

    Raises:
        UserError: a class of the plan cannot be imported or is not a module; it is named.
    """
    return _Reader(tensors).module(plan, "")


class _Writer:
    """Describes a module and its submodules; each module and tensor once, by the first of its names."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def module(self, module: nn.Module, name: str) -> Plan:
        if id(module) in self._names:
            return {"same": self._names[id(module)]}
        self._names[id(module)] = name
        if hooked := [hook for hook in _HOOKS if getattr(module, hook)]:
            raise IndescribableError(f"{name or 'the module'} has {hooked[0]}")
        plain = {key: value for key, value in vars(module).items() if key not in _INTERNAL}
        if replaced := [key for key in plain if _is_method(type(module), key)]:
            raise IndescribableError(f"{_join(name, replaced[0])} replaces a method")
        home, children = _home(type(module)), module._modules.items()
        return {
            "class": _path_of(type(module)),
            "training": module.training,
            "parameters": self.values(module._parameters, name, home),
            "buffers": self.values(module._buffers, name, home),
            "transient": sorted(module._non_persistent_buffers_set),
            "modules": {
                key: None if child is None else self.module(child, _join(name, key)) for key, child in children
            },
            "attributes": self.values(plain, name, home),
        }

    def values(self, values: Mapping[str, Any], name: str, home: str) -> Plan:
        return {key: self.value(value, _join(name, key), home) for key, value in values.items()}

    def tensor(self, value: Tensor, name: str) -> Any:
        self.tensors[name] = value.detach().clone()  # a copy: safetensors refuses tensors that share memory
        first = self._names.setdefault(id(value), name)
        return {"tensor": name, "grad": value.requires_grad} if first == name else {"same": first}

    def value(self, value: Any, name: str, home: str) -> Any:
        """Returns plain values unchanged and tags others. Exact types only: a subclass would lose its class."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return self.tensor(value, name)
        tag = kind.__name__.lower()
        if kind is list or kind is _SEQUENCES.get(tag):
            items = [self.value(v, f"{name}.{i}", home) for i, v in enumerate(value)]
            if kind in (set, frozenset):
                items.sort(key=repr)
            return items if kind is list else {tag: items}
        if kind is _MAPPINGS.get(tag) and all(isinstance(key, str) for key in value):
            return {tag: self.values(value, name, home)}
        if isinstance(value, Enum):
            return {"enum": [_path_of(kind), value.name]}
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value)}
        if kind is functools.partial:
            parts = (value.func, list(value.args), dict(value.keywords))
            return {"partial": [self.value(part, name, home) for part in parts]}
        if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
            return {"name": _allowed_path(value, home)}
        raise IndescribableError(f"attribute {name} is a {kind.__name__}")


class _Reader:
    """Rebuilds modules; `made` holds the modules and parameters rebuilt so far, by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.made: dict[str, Any] = {}

    def module(self, plan: Plan, name: str) -> nn.Module:
        if "same" in plan:
            shared: nn.Module = self.made[plan["same"]]
            return shared
        kind = _module_class(plan["class"])
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        self.made[name] = module
        home = _home(kind)
        for key, value in plan["parameters"].items():
            if value is not None and "tensor" in value:
                parameter = nn.Parameter(self.tensors[value["tensor"]], requires_grad=value["grad"])
                self.made[value["tensor"]] = parameter
            module.register_parameter(key, self.value(value, home))
        for key, value in plan["buffers"].items():
            module.register_buffer(key, self.value(value, home), persistent=key not in plan["transient"])
        for key, child in plan["modules"].items():
            module.add_module(key, None if child is None else self.module(child, _join(name, key)))
        for key, value in plan["attributes"].items():
            if key in _INTERNAL or _is_method(kind, key):
                raise UserError(f"The file replaces {plan['class']}.{key}, which no student does: do not trust it.")
            vars(module)[key] = self.value(value, home)
        if isinstance(module, nn.RNNBase):
            module.to("cpu")  # collects its weights again
        if not plan["training"]:
            module.eval()
        return module

    def value(self, value: Any, home: str) -> Any:
        if isinstance(value, list):
            return [self.value(v, home) for v in value]
        if not isinstance(value, dict):
            return value
        tag, content = next(iter(value.items()))
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](self.value(content, home))
        if tag in _MAPPINGS:
            return _MAPPINGS[tag]((key, self.value(v, home)) for key, v in content.items())
        makers: dict[str, Any] = {
            "tensor": lambda: self.made.setdefault(content, self.tensors[content]),
            "same": lambda: self.made[content],
            "dtype": lambda: getattr(torch, content.removeprefix("torch.")),
            "device": lambda: torch.device(content),
            "partial": lambda: _partial(*self.value(content, home)),
            "name": lambda: _named(content, home),
            "enum": lambda: _member(*content),
        }
        return makers[tag]()


def _module_class(path: str) -> type[nn.Module]:
    kind = _resolve(path)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    raise UserError(
        f"The student is a {path}, which cannot be imported as a torch module here. "
        "Put it into a module on PYTHONPATH, or give ProgressiveEnsemble.load(run_dir, student=make_student)."
    )


def _partial(function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
    return functools.partial(function, *args, **keywords)


def _named(path: str, home: str) -> Any:
    thing = _resolve(path)
    if not _is_allowed(thing, home):
        raise UserError(f"The file names {path}, which no network calls: do not trust it.")
    return thing


def _member(path: str, name: str) -> Enum:
    kind = _resolve(path)
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise UserError(f"The file names {path}, which is no Enum: do not trust it.")
    return kind[name]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_method(kind: type, key: str) -> bool:
    return key.startswith("__") or callable(getattr(kind, key, None))


def _home(kind: type) -> str:
    """The package of a class; its instances may name functions of the same package."""
    return kind.__module__.partition(".")[0]


def _is_allowed(thing: Any, home: str) -> bool:
    """Whether an attribute may name `thing`: a forward pass calls attributes, so only modules and network functions."""
    if isinstance(thing, type):
        return issubclass(thing, nn.Module)
    where = str(getattr(thing, "__module__", ""))
    networks = where.startswith(("torch.nn.functional", "torch._C._nn", "timm.layers", "timm.models"))
    own = home not in ("torch", "timm", "builtins") and where.partition(".")[0] == home
    return networks or own or where == "math"


def _path_of(thing: Any) -> str:
    """Shortest public dotted path of a class or function, which survives a move of its file."""
    parts, name = str(thing.__module__).split("."), thing.__qualname__
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for prefix in [*filter(lambda prefix: _is_public(prefix, name), prefixes), prefixes[-1]]:
        if _resolve(f"{prefix}.{name}") is thing:
            return f"{prefix}.{name}"
    raise IndescribableError(f"{prefixes[-1]}.{name} cannot be imported by name")


def _allowed_path(value: Any, home: str) -> str:
    path = _path_of(value)
    if not _is_allowed(value, home):
        raise IndescribableError(f"{path} is no function of torch.nn, timm or the package of the student")
    return path


def _is_public(module: str, name: str) -> bool:
    """Whether a module is public and exports the name: in `__all__` or, without one, by no leading underscore."""
    listed = getattr(sys.modules.get(module), "__all__", None)
    exported = not name.startswith("_") if listed is None else name.partition(".")[0] in listed
    return exported and not any(part.startswith("_") for part in module.split("."))


def _resolve(path: str) -> Any:
    """The object at a dotted path, or None."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None
