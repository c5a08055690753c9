"""Stages of an ensemble as a module with tensor inputs and outputs, and exporters that write it to a file.

Stage k reads x (``x``, or ``x_KEY`` for each of several tensors), the running sum `total_{k-1}`, and the `features_j`
and `activation_j_s` (after stage s inside that student) of the stages that it links to. It returns `total_k` and the
activations that later stages read; all numbers count from 1.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.models.inputs import InputSpec
from bdistil.models.stages import FEATURES
from bdistil.models.student import Student

OPSET = 17
Normalisation = tuple[Tensor, Tensor]


def activation_name(number: int, key: int) -> str:
    """Name of an activation in graphs; stage and key count from 0."""
    return f"features_{number + 1}" if key == FEATURES else f"activation_{number + 1}_{key + 1}"


class Segment(nn.Module):
    """Consecutive stages of an ensemble.

    Args:
        ensemble: ensemble with all stages.
        numbers: consecutive indices of the stages, from 0.
        normalisation: mean and standard deviation to normalise x with before the first body; None if x is already as in
            training.

    Attributes:
        reads: names of the inputs.
        gives: names of the outputs.
        sizes: sizes of one sample by input name of x; a varying size is given by its name.
    """

    def __init__(
        self, ensemble: ProgressiveEnsemble, numbers: Sequence[int], normalisation: Normalisation | None = None
    ) -> None:
        super().__init__()
        self.numbers = list(numbers)
        self.students = nn.ModuleList(ensemble.students[number] for number in numbers)
        wiring = ensemble.wiring
        self.places = [wiring.reads[number] for number in numbers]
        self.weights = [(ensemble.calibration.weights or (1.0,) * len(ensemble))[number] for number in numbers]
        first, last = self.numbers[0], self.numbers[-1]
        outside = sorted({place for places in self.places for place in places if place[0] < first})
        later = sorted({place for places in wiring.reads[last + 1 :] for place in places if place[0] >= first})
        later = [place for place in later if place[0] <= last]
        self.inputs = ensemble.inputs
        self.sizes = {name: _sizes(name, spec) for name, spec in ensemble.inputs.tensors().items()}
        self.reads = [
            *self.sizes,
            *([f"total_{first}"] if first else []),
            *(activation_name(*place) for place in outside),
        ]
        self.gives = [f"total_{last + 1}", *(activation_name(*place) for place in later)]
        self.normalisation = normalisation
        self.requires_grad_(False).train(False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Computes the tensors named in `gives` from those named in `reads`."""
        values = dict(zip(self.reads, tensors, strict=True))
        x = self.inputs.put_together(values)
        if self.normalisation is not None:
            x = (x - self.normalisation[0]) / self.normalisation[1]
        total = values.get(f"total_{self.numbers[0]}")
        for number, student, places, weight in zip(self.numbers, self.students, self.places, self.weights, strict=True):
            if isinstance(student, Student):
                linked = [values[activation_name(*place)] for place in places]
                made = student.activations(x, linked)
                values |= {activation_name(number, key): value for key, value in made.items()}
                own = student.answer(made[FEATURES], linked)
            else:
                own = student(x)
            own = own if weight == 1 else own * weight
            total = own if total is None else total + own
        assert total is not None
        values[self.gives[0]] = total
        return tuple(values[name] for name in self.gives)


def _sizes(name: str, spec: InputSpec) -> list[int | str]:
    return [f"{name}_{axis}" if isinstance(size, tuple) else size for axis, size in enumerate(spec.shape or (), 1)]


def _varying(segment: Segment, name: str) -> list[int]:
    """Axes of an input with varying size; the batch axis is counted but not included."""
    return [axis for axis, size in enumerate(segment.sizes.get(name, ()), 1) if isinstance(size, str)]


class ValueReads(TorchFunctionMode):
    """Notes whether a value of a tensor becomes a Python number, which a traced graph would keep as a constant."""

    READS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist)

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func in self.READS
        return func(*args, **(kwargs or {}))


Exporter = Callable[[Segment, Sequence[Tensor], Path], None]
# Part of torch's warning about Python decisions on tensor values, which become constants of a traced graph.
CONSTANT = "Converting a tensor to a Python"


def traced_onnx(segment: Segment, example: Sequence[Tensor], path: Path, *, constants: bool = True) -> None:
    """Writes ONNX with torch's TorchScript exporter: small files in 0.1 s, also for recurrent nets.

    The exporter traces one run, so Python decisions that depend on values or the number of samples become constants:
    the graph must be compared with PyTorch on other samples and batch sizes. Without `constants` they are an error.
    """
    dynamic = {
        name: {0: "batch", **{axis: f"{name}_{axis}" for axis in _varying(segment, name)}}
        for name in (*segment.reads, *segment.gives)
    }
    with warnings.catch_warnings(record=True) as caught, _silent_stdout():
        warnings.simplefilter("always")  # otherwise a warning raised before would be suppressed
        torch.onnx.export(
            segment, tuple(example), str(path), dynamo=False, opset_version=OPSET,
            input_names=segment.reads, output_names=segment.gives, dynamic_axes=dynamic,
        )  # fmt: skip
    fixed = [str(warning.message) for warning in caught if CONSTANT in str(warning.message)]
    if fixed and not constants:
        raise RuntimeError(fixed[0])


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Hides the output of C++ code: the exporter prints the whole graph if it does not support an operator."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _exported_program(segment: Segment, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """Exports with dynamic batch size and lengths; torch.export raises an error if the module fixes one of them."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = (tuple(dict.fromkeys([0, *_varying(segment, name)], dynamic) for name in segment.reads),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        return torch.export.export(segment, tuple(example), dynamic_shapes=shapes)


def dynamo_onnx(segment: Segment, example: Sequence[Tensor], path: Path) -> None:
    """Writes ONNX with torch's newer exporter, which takes seconds per graph and per time step of recurrent nets."""
    import onnx

    program = _exported_program(segment, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=segment.reads, output_names=segment.gives
        )
    assert exported is not None
    model = exported.model_proto
    # The exporter stores 1 kB of source information per node, with paths of this machine.
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def torch_file(segment: Segment, example: Sequence[Tensor], path: Path) -> None:
    """Writes the `.pt2` archive of torch.export, without the example input, which would be pickled."""
    program = _exported_program(segment, example)
    program.example_inputs = None
    torch.export.save(program, path)


# TorchScript first: a hundredth of the time for recurrent nets and a third of the size, with the same values.
EXPORTERS: dict[str, Exporter] = {"torchscript": traced_onnx, "dynamo": dynamo_onnx}
