"""Teachers from exported files, which are not trained further: TorchScript and ONNX."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.metrics.cost import OutsideCost
from bdistil.utils.paths import user_path

Array = np.ndarray[Any, np.dtype[Any]]


class TorchScriptTeacher(nn.Module):
    """A file of `torch.jit.save` as a teacher. Such a file is code: load only files from people you trust.

    Args:
        path: TorchScript file.

    Raises:
        UserError: there is no such file, or it is not TorchScript.
    """

    trained = True

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path = _file(path)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*torch.jit.* is deprecated")  # the user's file exists all the same
                self.network: nn.Module = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError as error:
            raise UserError(f"Expected `path` to be a file of torch.jit.save, got {path!r}: {error}") from error

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L)."""
        try:
            logits: Tensor = self.network(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"The TorchScript file {self.path} does not take {_describe(x)}: {reason}") from error
        return logits


class OnnxTeacher(nn.Module):
    """An ONNX file as a teacher, run by onnxruntime; on the CPU unless `providers` names another device.

    Args:
        path: ONNX file; its only input is x (B, ...), with a dynamic batch dimension. An integer input accepts only
            integer x.
        output: name of the output (B, L) to use; by default the first one of real numbers.
        providers: onnxruntime providers, best first, for example ``["CUDAExecutionProvider", "CPUExecutionProvider"]``.

    Raises:
        UserError: onnxruntime is not installed; the file is missing or not ONNX; more than one input, or one that is
            not a numeric tensor; a fixed batch size; an output that is missing or not a numeric tensor.
    """

    trained = True

    def __init__(self, path: str, output: str | None = None, providers: list[str] | None = None) -> None:
        super().__init__()
        self.path = path = _file(path)
        self.providers = list(providers or ["CPUExecutionProvider"])
        self.session = _session(path, self.providers)
        inputs, outputs = self.session.get_inputs(), {o.name: o.type for o in self.session.get_outputs()}
        if len(inputs) != 1 or inputs[0].type not in _DTYPES:
            got = ", ".join(f"{i.name!r} of type {i.type}" for i in inputs)
            raise UserError(f"Expected a graph with one input, a tensor of numbers, got {got} in {path}.")
        self.input, self.output = inputs[0], _choose_output(outputs, output, path)
        if self.input.shape and isinstance(self.input.shape[0], int):  # no shape at all where the rank is unknown
            raise UserError(
                f"The graph in {path} takes batches of exactly {self.input.shape[0]} (input {self.input.name!r}: "
                f"{self.input.shape}), and a run needs batches of any size. Export it with a dynamic batch dimension: "
                "dynamic_shapes of torch.onnx.export, or onnx.tools.update_model_dims."
            )
        self._shape: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the session, which cannot be copied."""
        return {key: value for key, value in vars(self).items() if key not in ("session", "input")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens the file again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.session = _session(self.path, self.providers)
        self.input = self.session.get_inputs()[0]

    @property
    def identity(self) -> str:
        """Sha256 of the file and its external weight files, and the output's name."""
        import onnx

        path = Path(self.path)
        digest = hashlib.sha256(path.read_bytes())
        graph = onnx.load(path, load_external_data=False).graph
        for name in sorted({e.value for t in graph.initializer for e in t.external_data if e.key == "location"}):
            digest.update((path.parent / name).read_bytes())
        return f"{digest.hexdigest()} {self.output}"

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L), on the device of x (B, ...)."""
        self._shape = tuple(x.shape)
        given = self._converted(x)
        try:
            (answer,) = self.session.run([self.output], {self.input.name: given})
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise UserError(
                f"The graph in {self.path} takes {self.input.name!r} of shape {self.input.shape} and type "
                f"{self.input.type}, got x of shape {self._shape}: {error}"
            ) from error
        return torch.from_numpy(np.array(answer, np.float32)).to(x.device)

    def _converted(self, x: Tensor) -> Array:
        """Converts x to the dtype of the input; real numbers never become integers, and integers never wrap around.

        Raises:
            UserError: x has real numbers for an integer input, or integers out of range.
        """
        kind = np.dtype(_DTYPES[self.input.type])
        if kind.kind == "f":
            return (x.float() if x.dtype is torch.bfloat16 else x).detach().cpu().numpy().astype(kind, copy=False)
        if x.is_floating_point() or x.is_complex():
            raise UserError(
                f"The graph in {self.path} takes integers ({self.input.type}) as {self.input.name!r}, got x of "
                f"{x.dtype}. Give data whose x are integers, or export the graph with an input of real numbers."
            )
        given: Array = x.detach().cpu().numpy()
        low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
        if given.size and not (low <= int(given.min()) and int(given.max()) <= high):
            raise UserError(
                f"The graph in {self.path} takes {self.input.name!r} in {low} … {high} ({self.input.type}), got x in "
                f"{given.min()} … {given.max()}."
            )
        return given.astype(kind, copy=False)

    def outside_cost(self) -> OutsideCost:
        """Cost of the last batch."""
        from bdistil.metrics.onnx_cost import graph_cost

        return graph_cost(Path(self.path), {self.input.name: self._shape})


_REAL: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_DTYPES: dict[str, Any] = {
    **_REAL, "tensor(bool)": np.bool_,
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip


def _choose_output(types: Mapping[str, str], name: str | None, path: str) -> str:
    """Name of the output of a graph that holds the logits.

    Args:
        types: ONNX types of the outputs by name.
        name: name given by the user; None for the first output of real numbers.
        path: ONNX file, for messages.
    """
    if name is not None and name not in types:
        raise UserError(f"Expected `output` to be one of {list(types)} in {path}, got {name!r}.")
    real = [output for output, kind in types.items() if kind in _REAL]
    chosen = name or next(iter(real), None)
    if chosen is not None and types[chosen] in _DTYPES:
        return chosen
    odd = chosen or next((output for output, kind in types.items() if kind not in _DTYPES), next(iter(types)))
    cure = "Export it with an output of logits or probabilities."
    if "map(" in types[odd]:
        cure = "It is a ZipMap of scikit-learn: convert_sklearn(model, ..., options={'zipmap': False}) leaves it out."
    others = f" Or give `output`, one of {real}." if real else ""
    raise UserError(f"Expected an output of numbers (B, L) in {path}, got {odd!r} of type {types[odd]}. {cure}{others}")


def _describe(x: Any) -> str:
    return f"x of shape {tuple(x.shape)} and type {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _file(path: str) -> str:
    found = user_path(path, "path")
    if not found.is_file():
        raise UserError(f"Expected `path` of the teacher to be a file, got {path!r}, which is not there.")
    return str(found)


def _session(path: str, providers: list[str]) -> Any:
    try:
        import onnx  # noqa: F401  (for the cost of the graph)
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"An ONNX teacher needs more ({error}). Install it with: pip install 'bdistil[onnx]'"
        ) from error
    try:
        return onnxruntime.InferenceSession(path, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common class
        raise UserError(f"Expected `path` to be an ONNX file, got {path!r}: {error}") from error
