"""One ExecuTorch program with a method a stage, for XNNPACK where that has the operators; it reads one sample a call.

One sample is what a device has at a time. A batch of open size is left to ONNX: lowering has narrowed its range without
a word where a stage reads what another gave.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdistil.export.graphs import Segment
from bdistil.export.parity import Run, Values


def method_name(number: int) -> str:
    """Of a stage, from 0."""
    return f"stage_{number + 1:02d}"


def write_program(segments: Sequence[Segment], values: Values, path: Path) -> None:
    """Writes a `.pte` file.

    Args:
        segments: the stages.
        values: an example of all tensors, of which the first sample is taken.
        path: of the file.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and ExecuTorch to themselves
        programs = {
            method_name(number): torch.export.export(segment, tuple(values[name][:1] for name in segment.reads))
            for number, segment in enumerate(segments)
        }
        lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)


def program_run(path: Path, segments: Sequence[Segment]) -> Run:
    """Stages run by ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(path))
    methods = [program.load_method(method_name(number)) for number in range(len(segments))]

    def run(number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The closure keeps `program`: its methods crash without it.
        assert program.method_names
        given: Sequence[Any] = methods[number].execute([values[name].contiguous() for name in segments[number].reads])
        # The runtime gives views of memory that the next call overwrites.
        return {name: tensor.clone() for name, tensor in zip(segments[number].gives, given, strict=True)}

    return run
