"""A module's structure as plain JSON, so that an ensemble loads without the code that configured it.

Weights go to safetensors; this is the rest: classes by dotted path, plain attributes, submodules, which tensors are
one and the same. Rebuilding imports those classes and sets their attributes; it calls no constructor and nothing else
that the file names. A file that names classes is code all the same: load runs of people you trust.
"""

from __future__ import annotations

import functools
import importlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.errors import UserError

Plan = dict[str, Any]

# Made anew by every nn.Module, or by recurrent nets from their parameters.
_MACHINERY = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}
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
    plan["attributes"] = {key: _value(value, _join(name, key), seen, tensors) for key, value in plain.items()}
    return plan


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _tensor(value: Tensor | None, name: str, seen: dict[int, str], tensors: dict[str, Tensor]) -> Any:
    if value is None:
        return None
    tensors[name] = value.detach().clone()  # a copy: safetensors refuses two names of one memory
    first = seen.setdefault(id(value), name)
    return {"tensor": name, "grad": value.requires_grad} if first == name else {"same": first}


def _value(value: Any, name: str, seen: dict[int, str], tensors: dict[str, Tensor]) -> Any:
    """An attribute as JSON: plain values as they are, everything else tagged."""
    inner = functools.partial(_value, name=name, seen=seen, tensors=tensors)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _tensor(value, name, seen, tensors)
    if isinstance(value, list | tuple):
        items = [_value(v, f"{name}.{i}", seen, tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"size" if isinstance(value, torch.Size) else "tuple": items}
    if isinstance(value, set | frozenset):
        return {type(value).__name__: sorted(map(inner, value), key=repr)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _value(v, _join(name, key), seen, tensors) for key, v in value.items()}}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value)}
    if isinstance(value, functools.partial):
        return {"partial": [inner(value.func), inner(list(value.args)), inner(dict(value.keywords))]}
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return {"name": _path_of(value)}
    raise IndescribableError(f"attribute {name} is a {type(value).__name__}")


def _path_of(thing: Any) -> str:
    """Dotted path of a class or function, once it is sure that the path leads back to it."""
    path = f"{thing.__module__}.{thing.__qualname__}"
    if "<" in path or _resolve(path) is not thing:
        raise IndescribableError(f"{path} cannot be imported by name")
    return path


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
        if key in _MACHINERY or key.startswith("__") or callable(getattr(kind, key, None)):
            raise UserError(
                f"The file would replace {plan['class']}.{key}, which no student does: it is not to be trusted."
            )
        vars(module)[key] = _read(value, made, tensors)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    return module.train(False) if not plan["training"] else module


def _parameter(value: Any, name: str, made: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Parameter | None:
    if value is None:
        return None
    if "same" not in value:
        made[name] = nn.Parameter(tensors[name], requires_grad=value["grad"])
    parameter: nn.Parameter = made[value.get("same", name)]
    return parameter


def _read(value: Any, made: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_read(v, made, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    tag, content = next(iter(value.items()))
    inner = functools.partial(_read, made=made, tensors=tensors)
    makers: dict[str, Any] = {
        "tensor": lambda: made.setdefault(content, tensors[content]),
        "same": lambda: made[content],
        "size": lambda: torch.Size(content),
        "tuple": lambda: tuple(map(inner, content)),
        "set": lambda: set(map(inner, content)),
        "frozenset": lambda: frozenset(map(inner, content)),
        "dict": lambda: OrderedDict((key, inner(v)) for key, v in content.items()),
        "dtype": lambda: getattr(torch, content.removeprefix("torch.")),
        "device": lambda: torch.device(content),
        "partial": lambda: functools.partial(inner(content[0]), *inner(content[1]), **inner(content[2])),
        "name": lambda: _resolve(content),
    }
    return makers[tag]()
