"""Committed students, restored from their files or by `make_student`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.inputs import InputSpec
from bdistil.models.student import Rung, build_student
from bdistil.storage.blueprint import rebuild
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils.modules import first_difference, shares_tensors, structure_of


def restore_student(
    run: RunDirectory, number: int, earlier: Sequence[nn.Module], make: Callable[..., nn.Module] | None
) -> nn.Module:
    """Loads the student of a committed round, numbered from 0, in eval mode.

    `make` is the user's `make_student`, and `earlier` are the students before it; None builds the student from the
    description in its files.

    Raises:
        UserError: the classes cannot be imported and `make` is None, or `make` builds a different student.
        RunError: a file is missing or torn.
    """
    record, tensors = run.record(number), run.weights(number)
    if make is not None:
        student = _made_again(run, number, earlier, make, tensors)
    elif record["blueprint"] is not None:
        student = rebuild(record["blueprint"], tensors)
    else:
        raise UserError(
            f"The student of round {number + 1} cannot be built from its files ({record['indescribable']}). "
            "Give ProgressiveEnsemble.load(run_dir, student=make_student)."
        )
    return student.requires_grad_(False).train(False)


def _made_again(
    run: RunDirectory, number: int, earlier: Sequence[nn.Module], make: Callable[..., nn.Module],
    tensors: Mapping[str, Tensor],
) -> nn.Module:  # fmt: skip
    """Builds a committed student with `make_student` and loads its weights. Raises UserError if they do not match."""
    record = run.record(number)
    rung, example = Rung(**record["rung"]), _example(record)
    with isolate_rng(include_cuda=False):
        student, other = (build_student(make, number, earlier, rung, example) for _ in range(2))
    if shares_tensors(student, other):  # such as a frozen backbone of all rounds, whose buffers move in training
        student = deepcopy(student)
    try:
        student.load_state_dict(_once(student, tensors), strict=False)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"The student of round {number + 1} in {run.root} differs from what `student` makes now ({error}). "
            "Give the function that the run was started with, or choose another `run_dir`."
        ) from error
    if found := first_difference(record.get("structure"), structure_of(student)):
        raise UserError(
            f"The student of round {number + 1} in {run.root} differs from what `student` makes now: {found}. "
            "Give the function that the run was started with, or choose another `run_dir`."
        )
    if record["blueprint"] is not None:
        _restore_drawn(student, record["blueprint"], tensors)
    else:
        restore_buffers(student, tensors)
    return student


def restore_buffers(student: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restores the saved buffers outside the state dict of a student whose classes cannot be imported."""
    beyond = tensors.keys() - student.state_dict().keys()
    for name in [name for name, _ in student.named_buffers() if name in beyond]:
        place, _, key = name.rpartition(".")
        setattr(student.get_submodule(place), key, tensors[name])


def _restore_drawn(student: nn.Module, blueprint: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Restores the saved tensors and numbers outside the state dict.

    `make_student` may have drawn them at random again, and training may have changed them.
    """
    try:
        described = rebuild(blueprint, tensors)
    except (UserError, ImportError, AttributeError, KeyError):  # the classes cannot be imported here
        return
    for name, module in described.named_modules():
        own = student.get_submodule(name)
        buffers = dict(module.named_buffers(recurse=False))
        plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor | int | float)}
        for key, value in {**buffers, **plain}.items():
            setattr(own, key, value)


def _example(record: Mapping[str, Any]) -> Any:
    """Two random samples with the structure of a run's x; None if the structure is unknown."""
    spec = InputSpec.of(record)
    return spec.random(2) if spec.known else None


def _once(student: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved tensors of a student, each under the first of its names: a module that is used twice is saved once.

    Raises:
        KeyError: a tensor is missing.
    """
    names = {id(value): name for name, value in reversed(student.state_dict(keep_vars=True).items())}
    return {name: tensors[name] for name in names.values()}
