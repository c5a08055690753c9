"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from bdistil.errors import UserError
from bdistil.models.student import Rung, Student, links_of
from bdistil.storage.blueprint import rebuild
from bdistil.storage.run_directory import RunDirectory


def restore_student(
    run: RunDirectory, number: int, earlier: Sequence[nn.Module], make: Callable[..., nn.Module] | None
) -> nn.Module:
    """A committed student, in eval mode.

    Args:
        run: the run directory.
        number: the round.
        earlier: the students before it, in order.
        make: `make_student`; without it the student is built from what round.json says of it.

    Raises:
        UserError: the classes cannot be imported and `make` was not given.
        RunError: a file is missing or torn.
    """
    record, tensors = run.record(number), run.weights(number)
    if make is None:
        if record["blueprint"] is None:
            raise UserError(
                f"The student of round {number} cannot be built from its files ({record['indescribable']}). "
                "Give ProgressiveEnsemble.load(run_dir, student=make_student)."
            )
        student = rebuild(record["blueprint"], tensors)
    else:
        with torch.random.fork_rng():
            student = build_student(make, number, earlier, Rung(**record["rung"]))
        try:
            student.load_state_dict({name: tensors[name] for name in student.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"The student of round {number + 1} in {run.root} is another than `student` makes now ({error}). "
                "Give the function that the run was started with, or choose another `run_dir`."
            ) from error
    return student.requires_grad_(False).train(False)


def build_student(make: Callable[..., nn.Module], number: int, earlier: Sequence[nn.Module], rung: Rung) -> nn.Module:
    """A new student of a class: made by the user's function, then linked.

    Raises:
        UserError: the function gave no module.
    """
    student = make(number) if rung.width == 1 else make(number, width=rung.width)
    if not isinstance(student, nn.Module):
        raise UserError(f"Expected `student` to return a torch.nn.Module, got {type(student).__name__}.")
    if isinstance(student, Student) and not links_of(student):
        student.link(earlier, rung)
    return student
