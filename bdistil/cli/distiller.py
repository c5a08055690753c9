"""The model of a recipe: teacher, students and boosting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from bdistil.boosting.settings import BoostingSettings
from bdistil.distillation.mekd.run import Mekd
from bdistil.errors import UserError
from bdistil.teachers.training import TeacherSpec
from bdistil.utils.optimizers import Interval


class Distiller(LightningModule):
    """Teacher, students and boosting of a recipe. It is not trained itself: each round trains its own module.

    Args:
        teacher: the network and its weights.
        student: makes one student; a class path with its arguments.
        boosting: settings of the run.
        mekd: settings for a teacher behind an API. The data are local unlabelled samples; the rounds are trained on
            samples that a generator, trained on them, produces.
        channels_last: memory format of images in convolutions, faster on most hardware.
        optimizer: optimizer of the students, instead of AdamW with `lr` and `weight_decay` of `boosting`; a class path
            of torch.optim with its arguments. Its rate is constant unless `lr_scheduler` is given.
        lr_scheduler: schedule of the students' learning rate; a class path of torch.optim.lr_scheduler with its
            arguments.
        lr_interval: whether `lr_scheduler` advances after every epoch or step.
        compile: backend of `torch.compile` for the teacher and the students, `inductor` on most machines.

    Raises:
        UserError: the backend does not exist.
    """

    def __init__(
        self,
        teacher: TeacherSpec,
        student: Callable[[], nn.Module],
        boosting: BoostingSettings = BoostingSettings(),  # noqa: B008 (frozen)
        mekd: Mekd | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        channels_last: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if compile is not None and compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise UserError(f"Expected `model.compile` to be one of {', '.join(known)}, got {compile!r}.")
        self.teacher, self.make, self.boosting, self.mekd = teacher, student, boosting, mekd
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.backend = compile
        teacher.network.to(memory_format=self.layout)
        # A teacher trained here keeps what it comes with frozen; the controller freezes all of it.
        self.trainable = [parameter for parameter in teacher.network.parameters() if parameter.requires_grad]

    def make_student(self, number: int, width: float = 1.0) -> nn.Module:
        """Builds the student of a round.

        Args:
            number: index of the round, from 0.
            width: factor on the width of the recipe's students; passed on unless it is 1.
        """
        make: Callable[..., nn.Module] = self.make
        own = make.keywords.get("width", 1.0) if isinstance(make, partial) else 1.0
        student = make() if width == 1 else make(width=own * width)
        return student.to(memory_format=self.layout)

    def speed_up(self, module: nn.Module) -> None:
        """Compiles a module in place at its first call, if the recipe sets `compile`; its weights keep their names."""
        if self.backend is not None:
            torch.compiler.reset()  # otherwise a few rounds would reach the recompilation limit per class
            module.compile(backend=self.backend)
