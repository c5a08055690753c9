"""What a recipe says under `model:`: the teacher, the student, the boosting; and the training of a missing teacher."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import nn

from bdistil.boosting.settings import BoostingSettings
from bdistil.distillation.mekd.run import Mekd
from bdistil.errors import UserError
from bdistil.teachers.training import TeacherSpec


class Distiller(pl.LightningModule):
    """Teacher, student and boosting of a recipe. It is not trained itself; each round has a module of its own.

    Args:
        teacher: the network, and how to come by its weights.
        student: makes one student; a class path with its arguments.
        boosting: settings of the run.
        mekd: where the teacher is an API: the data are local unlabelled samples, and the rounds are trained on samples
            that a generator makes of them.
        channels_last: convolutions work on images in the order that most hardware is faster with.
        compile: backend of `torch.compile` for the teacher and each round's student, `inductor` on most machines.

    Raises:
        UserError: there is no such backend.
    """

    def __init__(
        self,
        teacher: TeacherSpec,
        student: Callable[[], nn.Module],
        boosting: BoostingSettings = BoostingSettings(),  # noqa: B008 (frozen)
        mekd: Mekd | None = None,
        channels_last: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if compile is not None and compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise UserError(f"Expected `model.compile` to be one of {', '.join(known)}, got {compile!r}.")
        self.teacher, self.make, self.boosting, self.mekd = teacher, student, boosting, mekd
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.backend = compile
        teacher.network.to(memory_format=self.layout)

    def make_student(self, number: int, width: float = 1.0) -> nn.Module:
        """The student of a round, from 0; `width` is given to the class only where a rung asks for it."""
        make: Callable[..., nn.Module] = self.make
        student = make() if width == 1 else make(width=width)
        return student.to(memory_format=self.layout)

    def speed_up(self, module: nn.Module) -> None:
        """Compiles a module in place, at its first call, where the recipe asks for it: no name of a weight changes."""
        if self.backend is not None:
            torch.compiler.reset()  # compiled forms are counted by class, and few are allowed: each round begins anew
            module.compile(backend=self.backend)
