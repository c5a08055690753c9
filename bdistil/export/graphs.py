"""One stage, or several whose bodies run together, as a module of tensors, and that module as a graph in a file.

Stage k reads x, the running sum of stage k-1 and the features of the stages that it links to, and gives the new sum and
its own features where a later stage reads them: names are `x`, `total_k` and `features_k`, k from 1.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError
from bdistil.models.student import Student, linked_numbers, links_of

OPSET = 17
Normalisation = tuple[Tensor, Tensor]


def links_by_stage(students: Sequence[nn.Module]) -> list[list[int]]:
    """Numbers, from 0, of the stages whose features each stage reads, the most recent first."""
    return [linked_numbers(students[:number], links_of(student)) for number, student in enumerate(students)]


class Segment(nn.Module):
    """Some stages of an ensemble in a row; their bodies run first, then their heads.

    Args:
        ensemble: all stages.
        numbers: of the stages, from 0, without a gap.
        normalisation: mean and standard deviation that are taken of x before the first body; None: x is as in training.
    """

    def __init__(
        self, ensemble: ProgressiveEnsemble, numbers: Sequence[int], normalisation: Normalisation | None = None
    ) -> None:
        super().__init__()
        links = links_by_stage(list(ensemble.students))
        self.numbers = list(numbers)
        self.students = nn.ModuleList(ensemble.students[number] for number in numbers)
        self.links = [links[number] for number in numbers]
        self.weights = [(ensemble.calibration.weights or (1.0,) * len(ensemble))[number] for number in numbers]
        outside = sorted({n for linked in self.links for n in linked} - set(self.numbers))
        later = {n for linked in links[self.numbers[-1] + 1 :] for n in linked}
        first, last = self.numbers[0], self.numbers[-1]
        self.reads = ["x", *([f"total_{first}"] if first else []), *(f"features_{n + 1}" for n in outside)]
        self.gives = [f"total_{last + 1}", *(f"features_{n + 1}" for n in self.numbers if n in later)]
        self.normalisation = normalisation
        self.requires_grad_(False).train(False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors named in `gives` of those named in `reads`."""
        values = dict(zip(self.reads, tensors, strict=True))
        x = values["x"]
        if self.normalisation is not None:
            x = (x - self.normalisation[0]) / self.normalisation[1]
        rows = list(zip(self.numbers, self.students, self.links, self.weights, strict=True))
        for number, student, links, _ in rows:
            if isinstance(student, Student):
                linked = [values[f"features_{n + 1}"] for n in links]
                values[f"features_{number + 1}"] = student.features(x, linked)
        total = values.get(f"total_{self.numbers[0]}")
        for number, student, links, weight in rows:
            if isinstance(student, Student):
                linked = [values[f"features_{n + 1}"] for n in links]
                own = student.answer(values[f"features_{number + 1}"], linked)
            else:
                own = student(x)
            own = own if weight == 1 else own * weight
            total = own if total is None else total + own
        assert total is not None
        values[self.gives[0]] = total
        return tuple(values[name] for name in self.gives)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Without what C++ code prints: the whole graph, where the exporter meets an operator that it does not know."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


Exporter = Callable[[Segment, Sequence[Tensor], Path], None]


def traced_onnx(segment: Segment, example: Sequence[Tensor], path: Path) -> None:
    """ONNX by torch's TorchScript exporter: small files in a tenth of a second, also for recurrent nets.

    It follows one run, and so keeps what Python decides from the values or the number of the samples: what it gave has
    to be compared at other samples and batch sizes.
    """
    dynamic = {name: {0: "batch"} for name in (*segment.reads, *segment.gives)}
    with warnings.catch_warnings(), _silent_stdout():
        # Its deprecation, and that a trace follows one run.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            segment, tuple(example), str(path), dynamo=False, opset_version=OPSET,
            input_names=segment.reads, output_names=segment.gives, dynamic_axes=dynamic,
        )  # fmt: skip


def exported_program(segment: Segment, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """The module by `torch.export` with dynamic batch."""
    shapes = (tuple({0: torch.export.Dim.DYNAMIC} for _ in example),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch to itself
        return torch.export.export(segment, tuple(example), dynamic_shapes=shapes)


def dynamo_onnx(segment: Segment, example: Sequence[Tensor], path: Path) -> None:
    """ONNX by torch's newer exporter: seconds a graph, for recurrent nets in proportion to their steps."""
    program = exported_program(segment, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, (), str(path), dynamo=True, verbose=False, external_data=False,
            input_names=segment.reads, output_names=segment.gives,
        )  # fmt: skip
    _strip(path)


def _strip(path: Path) -> None:
    """Takes out what the newer exporter says of the source of each node: a kB a node, with paths of this machine."""
    import onnx

    model = onnx.load(str(path))
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def torch_file(segment: Segment, example: Sequence[Tensor], path: Path) -> None:
    """The `.pt2` archive of torch.export, without the example input, which would be a pickle."""
    program = exported_program(segment, example)
    require_symbolic({name: _first_dimension(node) for name, node in zip(segment.reads, _inputs(program), strict=True)})
    program._example_inputs = None
    torch.export.save(program, path)


def _inputs(program: torch.export.ExportedProgram) -> Iterable[Any]:
    names = program.graph_signature.user_inputs
    return [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _first_dimension(value: Tensor) -> Any:
    return value.shape[0]


# TorchScript first: a hundredth of the time for recurrent nets, a third of the size, the same numbers.
EXPORTERS: dict[str, Exporter] = {"torchscript": traced_onnx, "dynamo": dynamo_onnx}


def opset_of(path: Path) -> int:
    """The opset of ONNX that a graph is written in."""
    import onnx

    return int(onnx.load(str(path)).opset_import[0].version)


def require_symbolic(dimensions: Mapping[str, Any]) -> None:
    """Dimension 0 of every input has to be open; a graph may else be fixed at the example's batch without a word.

    Args:
        dimensions: by input; a number is a fixed size.

    Raises:
        RunError: one is fixed.
    """
    fixed = {name: size for name, size in dimensions.items() if isinstance(size, int)}
    if fixed:
        name, size = next(iter(fixed.items()))
        raise RunError(
            f"The exported graph takes `{name}` with a batch of {size} only. Something in the student fixes the batch "
            "size; write its shapes as -1 or flatten(1)."
        )


def quiet_exporters() -> None:
    """The exporters report their progress as if it were a warning."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
