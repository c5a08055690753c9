"""Teachers from exported files, which are not trained further: TorchScript and ONNX."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.metrics.cost import OutsideCost


class TorchScriptTeacher(nn.Module):
    """A file of `torch.jit.save` as a teacher. Such a file is code: load only files of people you trust.

    Args:
        path: of the file.

    Raises:
        UserError: there is no such file, or it is not TorchScript.
    """

    trained = True

    def __init__(self, path: str) -> None:
        super().__init__()
        _check_file(path)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*torch.jit.* is deprecated")  # the user's file exists all the same
                self.network: nn.Module = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError as error:
            raise UserError(f"Expected `path` to be a file of torch.jit.save, got {path!r}: {error}") from error

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L)."""
        logits: Tensor = self.network(x)
        return logits


class OnnxTeacher(nn.Module):
    """An ONNX file as a teacher, run by onnxruntime; on the CPU unless `providers` names another one.

    Args:
        path: of the file; its only input is x (B, ...), with a dynamic batch dimension.
        output: name of the output (B, L) to take; the first one by default.
        providers: of onnxruntime, best first, for example ``["CUDAExecutionProvider", "CPUExecutionProvider"]``.

    Raises:
        UserError: onnxruntime is not installed; no such file or not ONNX; more than one input; a fixed batch; an
            output that is not there.
    """

    trained = True

    def __init__(self, path: str, output: str | None = None, providers: list[str] | None = None) -> None:
        super().__init__()
        _check_file(path)
        self.path, self.providers = path, list(providers or ["CPUExecutionProvider"])
        self.session = _session(path, self.providers)
        inputs, outputs = self.session.get_inputs(), [o.name for o in self.session.get_outputs()]
        if len(inputs) != 1:
            raise UserError(f"Expected a graph with one input, got {[i.name for i in inputs]} in {path}.")
        if output is not None and output not in outputs:
            raise UserError(f"Expected `output` to be one of {outputs} in {path}, got {output!r}.")
        self.input, self.output = inputs[0], output or outputs[0]
        if isinstance(self.input.shape[0], int):
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
        """Sha256 of the file and of the files beside it that hold its weights, and the output's name."""
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
        given = x.detach().cpu().numpy().astype(_DTYPES.get(self.input.type, np.float32), copy=False)
        try:
            (answer,) = self.session.run([self.output], {self.input.name: given})
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise UserError(
                f"The graph in {self.path} takes {self.input.name!r} of shape {self.input.shape} and type "
                f"{self.input.type}, got x of shape {self._shape}: {error}"
            ) from error
        return torch.from_numpy(np.array(answer, np.float32)).to(x.device)

    def outside_cost(self) -> OutsideCost:
        """Cost of the last batch."""
        from bdistil.metrics.onnx_cost import graph_cost

        return graph_cost(Path(self.path), {self.input.name: self._shape})


_DTYPES: dict[str, Any] = {
    "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}  # fmt: skip


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"Expected `path` of the teacher to be a file, got {path!r}, which is not there.")


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
