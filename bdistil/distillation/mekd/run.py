"""MEKD from local samples and an API to a student, and to the training set of a boosting run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from bdistil.boosting.checks import check_outputs, loaders_of
from bdistil.data.loaders.attach import single_loader
from bdistil.distillation.mekd import Deprivatization, MappingEmulation
from bdistil.distillation.mekd.networks import Discriminator, Generator
from bdistil.distillation.mekd.samples import (
    Answered,
    AnsweredSamples,
    GeneratedSamples,
    answers_of,
    generate,
    keep_answers,
    repeated,
    samples_of,
)
from bdistil.distillation.mekd.settings import Mekd
from bdistil.distillation.mekd.stage import MakeTrainer, run_stage
from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies
from bdistil.errors import UserError
from bdistil.functional.mekd import statistics
from bdistil.storage.files import write_atomically
from bdistil.teachers.api import ApiTeacher
from bdistil.utils.seeding import reseed


class Emulation:
    """One run of MEKD in a folder; every part of it is made once, and found by a restart.

    Args:
        settings: of the run.
        teacher: the API.
        local: data module with local samples, whose y is not read; the validation part is held out.
        folder: of the run.
        seed: all randomness is a function of it.
        make_trainer: takes arguments of a Trainer, such as max_epochs and callbacks.

    Raises:
        UserError: the teacher is no API, the samples are no images or sequences, the queries do not suffice, or the
            folder holds a run of other settings.
    """

    def __init__(
        self,
        settings: Mekd,
        teacher: nn.Module,
        local: pl.LightningDataModule,
        folder: Path,
        *,
        seed: int = 0,
        make_trainer: MakeTrainer,
    ) -> None:
        if not isinstance(teacher, ApiTeacher):
            raise UserError(f"Expected the teacher of MEKD to be an ApiTeacher, got {type(teacher).__name__}.")
        self.settings, self.teacher, self.local, self.seed = settings, teacher, local, seed
        self.folder, self.make_trainer = folder, make_trainer
        self.loaders = loaders_of(local)
        self.samples, self.held_out = map(samples_of, self.loaders)
        asked = len(self.held_out) + (len(self.samples) if settings.local_share else 0)
        self.pool = settings.queries - settings.first_queries - asked
        if self.pool < 2:
            raise UserError(
                f"Expected `queries` of MEKD to be more than those of stage 1 ({settings.first_queries}) and of the "
                f"local samples that are asked about ({asked}), got {settings.queries}."
            )
        self._freeze()

    def _freeze(self) -> None:
        """Keeps the settings of a new run, or proves that the one found here is the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, now = self.folder / "settings.json", self._plain()
        if not path.exists():
            write_atomically(path, json.dumps(now, indent=1))
        then = json.loads(path.read_text())
        differing = [f"{k}: {then.get(k)!r} there, {now.get(k)!r} now" for k in now if then.get(k) != now.get(k)]
        if differing:
            raise UserError(
                f"{self.folder} holds a run of MEKD with other settings ({'; '.join(differing)}). Give those, or "
                "choose another `run_dir`."
            )

    def _plain(self) -> dict[str, Any]:
        counts = {"local": len(self.samples), "held_out": len(self.held_out), "shape": list(self.samples.shape[1:])}
        return {**asdict(self.settings), "seed": self.seed, "teacher": self.teacher.identity, **counts}

    def check(self, student: nn.Module) -> None:
        """Asks the teacher about two held-out samples: does a student fit it?

        Raises:
            UserError: it does not.
        """
        check_outputs(self.teacher, student, self.held_out[[0, -1]])

    def generator(self) -> Generator:
        """Stage 1: the generator of its best epoch."""
        settings, shape = self.settings, self.samples.shape[1:]
        reseed(self.seed, "networks of stage 1")
        generator = Generator(self.teacher.outputs, shape, settings.width)
        generator.fit_range(self.samples)
        low, high = float(self.samples.min()), float(self.samples.max())
        stage = Deprivatization(
            generator, Discriminator(shape, settings.critic_width, low, high, settings.shift), self.teacher,
            queries=settings.first_queries, share=settings.share, lr=settings.gan_lr, average=settings.average,
            seed=self.seed,
        )  # fmt: skip
        blank = [torch.zeros(len(x), 1) for x in (self.samples, self.held_out)]
        data = AnsweredSamples((self.samples, blank[0]), (self.held_out, blank[1]), settings.gan_batch_size)
        found = run_stage(
            stage, data, self.folder / "stage1", epochs=settings.gan_epochs, seed=self.seed,
            score=lambda figures: figures["mekd/distance"], make_trainer=self.make_trainer,
        )  # fmt: skip
        rank_zero_info(f"MEKD, stage 1: distance to held-out samples {found['score']:.4g} in epoch {found['epoch']}.")
        return stage.kept

    def answered(self, generator: Generator) -> tuple[Answered, Answered]:
        """Training samples, generated and perhaps local, and held-out local ones, with the teacher's answers."""
        held_out = self.held_out, answers_of(self.teacher, self.held_out)
        local = repeated(self.samples, self.pool, self.settings.local_share)
        samples = generate(generator, self.pool, local, self.folder, self.seed)
        rank_zero_info(f"MEKD: asking the teacher about {self.pool:,} generated samples …")
        answers = answers_of(self.teacher, samples)
        keep_answers(self.folder, answers, held_out)
        rank_zero_info(f"MEKD: {self.teacher.queries:,} queries so far.")
        return (samples, answers), held_out

    def student(self, student: nn.Module, generator: Generator, train: Answered, val: Answered) -> dict[str, Any]:
        """Stage 2: trains a student in place; its best epoch, and its test accuracy where there is a test part."""
        settings = self.settings
        mean, sd = statistics(train[1])
        stage = MappingEmulation(
            student, generator, hard=self.teacher.hard, mean=mean, sd=sd, tau=settings.tau, kl=settings.kl,
            optimizer=settings.optimizer, lr=settings.lr, seed=self.seed,
        )  # fmt: skip
        data, folder = AnsweredSamples(train, val, settings.batch_size), self.folder / "stage2"
        best = run_stage(
            stage, data, folder, epochs=settings.epochs, seed=self.seed, score=agreement_score,
            make_trainer=self.make_trainer,
        )  # fmt: skip
        figures = {"epoch": best["epoch"], "queries": self.teacher.queries, **self._tested(student)}
        write_atomically(self.folder / "student.json", json.dumps(figures, indent=1))
        rank_zero_info(f"MEKD, stage 2: {figures}.")
        return figures

    def _tested(self, student: nn.Module) -> dict[str, float]:
        """Test accuracy of a student: read once, then found."""
        path = self.folder / "student.json"
        if path.exists():
            return {k: v for k, v in json.loads(path.read_text()).items() if k == "test_accuracy"}
        if not is_overridden("test_dataloader", self.local, pl.LightningDataModule):
            return {}
        self.local.setup("test")
        loader = single_loader(self.local.test_dataloader())
        return {"test_accuracy": prefix_accuracies(ProgressiveEnsemble([student]), loader, torch.device("cpu"))[0]}

    def run(self, make_student: Callable[[int], nn.Module]) -> AnsweredSamples:
        """Both stages; gives the training set of a boosting run.

        Args:
            make_student: of the boosting run; its first student is the kind that stage 2 trains.
        """
        reseed(self.seed, "student of stage 2")
        student = make_student(0)
        with torch.random.fork_rng():
            self.check(make_student(0))
        generator = self.generator()
        train, val = self.answered(generator)
        if self.settings.student:
            self.student(student, generator, train, val)
        if is_overridden("test_dataloader", self.local, pl.LightningDataModule):
            return GeneratedSamples(train, val, self.settings.batch_size, self.local)
        return AnsweredSamples(train, val, self.settings.batch_size)


def agreement_score(figures: dict[str, float]) -> float:
    """Of stage 2: most answers alike; among equals the smaller cross entropy, squeezed under one answer's share."""
    entropy = figures["mekd/val_loss"]
    return -figures["mekd/agreement"] + 1e-6 * entropy / (1 + entropy)
