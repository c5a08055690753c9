"""A module's structure as plain JSON, so that an ensemble loads without the code that configured it.

Weights go to safetensors; this is the rest: classes by dotted path, plain attributes, submodules, which tensors are
one and the same. Rebuilding imports those classes and sets their attributes. It calls no constructor, replaces no
method, and takes no function but those of torch.nn, timm, math and the class's own package. A file that names classes
is code all the same, as importing runs them: load runs of people you trust.
"""

from __future__ import annotations

import functools
import importlib
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.errors import UserError

Plan = dict[str, Any]

# Made anew by every nn.Module, by recurrent nets from their parameters, by torch.compile.
_MACHINERY = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_compiled_call_impl"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class IndescribableError(ValueError):
    """A module holds something that plain JSON cannot say; the message names it."""


def describe(module: nn.Module) -> tuple[Plan, dict[str, Tensor]]:
    """The structure of a module, and all its tensors by dotted name.

    Raises:
        IndescribableError: a hook, or an attribute that is neither plain data nor a named function or class.
    """
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    return _module(module, "", seen, tensors), tensors


def _module(module: nn.Module, name: str, seen: dict[int, str], tensors: dict[str, Tensor]) -> Plan:
    if id(module) in seen:
        return {"same": seen[id(module)]}
    seen[id(module)] = name
    if hooked := [hook for hook in _HOOKS if getattr(module, hook)]:
        raise IndescribableError(f"{name or 'the module'} has {hooked[0]}")
    plan: Plan = {"class": _path_of(type(module)), "training": module.training}
    for kind, group in (("parameters", module._parameters), ("buffers", module._buffers)):
        plan[kind] = {key: _tensor(value, _join(name, key), seen, tensors) for key, value in group.items()}
    plan["transient"] = sorted(module._non_persistent_buffers_set)
    plan["modules"] = {
        key: None if child is None else _module(child, _join(name, key), seen, tensors)
        for key, child in module._modules.items()
    }
    plain = {key: value for key, value in vars(module).items() if key not in _MACHINERY}
    if replaced := [key for key in plain if _is_method(type(module), key)]:
        raise IndescribableError(f"{_join(name, replaced[0])} replaces a method")
    read = functools.partial(_value, home=_home(type(module)), seen=seen, tensors=tensors)
    plan["attributes"] = {key: read(value, _join(name, key)) for key, value in plain.items()}
    return plan


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _tensor(value: Tensor | None, name: str, seen: dict[int, str], tensors: dict[str, Tensor]) -> Any:
    if value is None:
        return None
    tensors[name] = value.detach().clone()  # a copy: safetensors refuses two names of one memory
    first = seen.setdefault(id(value), name)
    return {"tensor": name, "grad": value.requires_grad} if first == name else {"same": first}


def _is_method(kind: type, key: str) -> bool:
    return key.startswith("__") or callable(getattr(kind, key, None))


def _home(kind: type) -> str:
    """The package of a class, whose functions its instances may name."""
    return kind.__module__.partition(".")[0]


def _value(value: Any, name: str, *, home: str, seen: dict[int, str], tensors: dict[str, Tensor]) -> Any:
    """An attribute as JSON: plain values as they are, everything else tagged. Only exact types: no subclass is lost."""
    inner = functools.partial(_value, home=home, seen=seen, tensors=tensors)
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return _tensor(value, name, seen, tensors)
    if kind in (list, tuple, torch.Size):
        items = [inner(v, f"{name}.{i}") for i, v in enumerate(value)]
        return items if kind is list else {kind.__name__.lower(): items}
    if kind in (set, frozenset):
        return {kind.__name__: sorted((inner(v, name) for v in value), key=repr)}
    if kind in (dict, OrderedDict) and all(isinstance(key, str) for key in value):
        return {kind.__name__.lower(): {key: inner(v, _join(name, key)) for key, v in value.items()}}
    if isinstance(value, Enum):
        return {"enum": [_path_of(kind), value.name]}
    if kind in (torch.dtype, torch.device):
        return {kind.__name__: str(value)}
    if kind is functools.partial:
        parts = (value.func, list(value.args), dict(value.keywords))
        return {"partial": [inner(part, name) for part in parts]}
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return {"name": _path_of(value, home)}
    raise IndescribableError(f"attribute {name} is a {kind.__name__}")


def _path_of(thing: Any, home: str | None = None) -> str:
    """Dotted path of a class or function, once it is sure that the path leads back to it."""
    path = f"{thing.__module__}.{thing.__qualname__}"
    if "<" in path or _resolve(path) is not thing:
        raise IndescribableError(f"{path} cannot be imported by name")
    if home is not None and not _may_be_called(thing, home):
        raise IndescribableError(f"{path} is no function of torch.nn, timm or the package of the student")
    return path


def _may_be_called(thing: Any, home: str) -> bool:
    """Answering calls what attributes name, so a file may name modules, and functions made for networks, no others."""
    if isinstance(thing, type):
        return issubclass(thing, nn.Module)
    where = str(getattr(thing, "__module__", ""))
    networks = where.startswith(("torch.nn.functional", "torch._C._nn", "timm.layers", "timm.models"))
    return (
        networks or where == "math" or (home not in ("torch", "timm", "builtins") and where.partition(".")[0] == home)
    )


def _resolve(path: str) -> Any:
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


def rebuild(plan: Plan, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module that `describe` described, with its weights.

    Raises:
        UserError: a class of the plan can not be imported, or is not a module; it is named.
    """
    made: dict[str, Any] = {}
    return _build(plan, "", made, tensors)


def _build(plan: Plan, name: str, made: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    if "same" in plan:
        shared: nn.Module = made[plan["same"]]
        return shared
    kind = _resolve(plan["class"])
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(
            f"The student is a {plan['class']}, which cannot be imported as a torch module here. "
            "Make it importable, or give ProgressiveEnsemble.load(run_dir, student=make_student)."
        )
    module: nn.Module = kind.__new__(kind)
    nn.Module.__init__(module)
    made[name] = module
    for key, value in plan["parameters"].items():
        module.register_parameter(key, _parameter(value, _join(name, key), made, tensors))
    for key, value in plan["buffers"].items():
        tensor = (
            None
            if value is None
            else made.setdefault(value.get("tensor", value.get("same")), tensors[_join(name, key)])
        )
        module.register_buffer(key, tensor, persistent=key not in plan["transient"])
    for key, child in plan["modules"].items():
        module.add_module(key, None if child is None else _build(child, _join(name, key), made, tensors))
    for key, value in plan["attributes"].items():
        if key in _MACHINERY or _is_method(kind, key):
            raise UserError(
                f"The file would replace {plan['class']}.{key}, which no student does: it is not to be trusted."
            )
        vars(module)[key] = _read(value, made, tensors, _home(kind))
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    if not plan["training"]:
        module.train(False)  # some classes of timm give nothing back
    return module


def _parameter(value: Any, name: str, made: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Parameter | None:
    if value is None:
        return None
    if "same" not in value:
        made[name] = nn.Parameter(tensors[name], requires_grad=value["grad"])
    parameter: nn.Parameter = made[value.get("same", name)]
    return parameter


def _read(value: Any, made: dict[str, Any], tensors: Mapping[str, Tensor], home: str) -> Any:
    if isinstance(value, list):
        return [_read(v, made, tensors, home) for v in value]
    if not isinstance(value, dict):
        return value
    tag, content = next(iter(value.items()))
    inner = functools.partial(_read, made=made, tensors=tensors, home=home)
    makers: dict[str, Any] = {
        "tensor": lambda: made.setdefault(content, tensors[content]),
        "same": lambda: made[content],
        "size": lambda: torch.Size(content),
        "tuple": lambda: tuple(map(inner, content)),
        "set": lambda: set(map(inner, content)),
        "frozenset": lambda: frozenset(map(inner, content)),
        "dict": lambda: {key: inner(v) for key, v in content.items()},
        "ordereddict": lambda: OrderedDict((key, inner(v)) for key, v in content.items()),
        "dtype": lambda: getattr(torch, content.removeprefix("torch.")),
        "device": lambda: torch.device(content),
        "partial": lambda: functools.partial(inner(content[0]), *inner(content[1]), **inner(content[2])),
        "name": lambda: _named(content, home),
        "enum": lambda: _member(*content),
    }
    return makers[tag]()


def _member(path: str, name: str) -> Enum:
    kind = _resolve(path)
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise UserError(f"The file names {path}, which is no Enum: it is not to be trusted.")
    return kind[name]


def _named(path: str, home: str) -> Any:
    thing = _resolve(path)
    if not _may_be_called(thing, home):
        raise UserError(f"The file names {path}, which no network calls: it is not to be trusted.")
    return thing
