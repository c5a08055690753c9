"""A run of MEKD: from local samples and an API to a student, and to the training data of a boosting run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from bdistil.boosting.checks.data import check_outputs, loaders_of
from bdistil.boosting.ledger.samples import check_stored, store_samples
from bdistil.data.loaders import LOADERS, single_loader
from bdistil.distillation.mekd.deprivatization import Deprivatization
from bdistil.distillation.mekd.mapping_emulation import MappingEmulation, Optimizer
from bdistil.distillation.mekd.networks import Discriminator, Generator
from bdistil.distillation.mekd.samples import (
    Answered,
    AnsweredSamples,
    GeneratedSamples,
    answers_of,
    distinct_local,
    generate,
    repeated,
    samples_of,
    save_answers,
)
from bdistil.distillation.mekd.stage import MakeTrainer, run_stage
from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies
from bdistil.errors import UserError
from bdistil.functional.mekd import statistics
from bdistil.storage.files import write_atomically
from bdistil.teachers.api import ApiTeacher
from bdistil.utils.seeding import reseed, seed_of


@dataclass(frozen=True)
class Mekd:
    """Settings of MEKD. The defaults of networks, losses and optimizers are the paper's.

    Those of `queries`, `first_queries` and `epochs` are not: the paper trains stage 2 for 240 epochs of 500 steps, and
    queries new samples in each of them.

    Attributes:
        queries: query budget in samples, for stage 1, the local samples and, with the rest, generated samples.
        first_queries: queries of stage 1.
        width: channels of the generator.
        critic_width: channels of the discriminator's first convolution.
        share: weight of the teacher's term in the generator's loss.
        gan_epochs: epochs of stage 1.
        gan_batch_size: batch size of stage 1.
        gan_lr: learning rate of stage 1.
        average: decay per step of the running mean of the generator's weights, such as 0.99; 0 uses the last weights.
        shift: random shift of the discriminator's inputs, in pixels or steps; helps with few local samples.
        epochs: epochs of stage 2.
        batch_size: batch size of stage 2, and of a boosting run on its samples.
        optimizer: optimizer of stage 2, `sgd` or `adamw`; see `MappingEmulation`.
        lr: learning rate of stage 2.
        tau: temperature of stage 2, for soft answers.
        kl: weight of the answers relative to the images in stage 2.
        local_share: share of local samples in the training samples of stage 2 and of the rounds; they also cost
            queries, and are repeated, or chosen at random, to reach the share. 0 uses generated samples alone.
        student: whether to train one student by stage 2, before the boosting run.

    Raises:
        UserError: a value is out of its range.
    """

    queries: int = 10_000
    first_queries: int = 500
    width: int = 128
    critic_width: int = 16
    share: float = 0.5
    gan_epochs: int = 200
    gan_batch_size: int = 64
    gan_lr: float = 2e-4
    average: float = 0.0
    shift: int = 0
    epochs: int = 60
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    lr: float = 0.1
    tau: float = 5.0
    kl: float = 1.0
    local_share: float = 0.0
    student: bool = True

    def __post_init__(self) -> None:
        for name in ("queries", "first_queries", "gan_epochs", "epochs", "gan_batch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"Expected `{name}` of MEKD to be >= 1, got {getattr(self, name)}.")
        for name in ("gan_lr", "lr", "tau"):
            if not getattr(self, name) > 0:
                raise UserError(f"Expected `{name}` of MEKD to be > 0, got {getattr(self, name)}.")
        if self.optimizer not in get_args(Optimizer):
            raise UserError(f"Expected `optimizer` of MEKD to be 'sgd' or 'adamw', got {self.optimizer!r}.")
        if self.width < 2 or self.critic_width < 1 or self.shift < 0:
            raise UserError(
                "Expected `width` >= 2, `critic_width` >= 1 and `shift` >= 0 of MEKD, got "
                f"{self.width}, {self.critic_width} and {self.shift}."
            )
        if not (self.share >= 0 and self.kl >= 0 and 0 <= self.average < 1):
            raise UserError(
                "Expected `share` >= 0, `kl` >= 0 and `average` in [0, 1) of MEKD, got "
                f"{self.share}, {self.kl} and {self.average}."
            )
        if not 0 <= self.local_share < 1:
            raise UserError(f"Expected `local_share` of MEKD in [0, 1), got {self.local_share}.")
        if self.first_queries >= self.queries:
            raise UserError(
                f"Expected `first_queries` < `queries` of MEKD, got {self.first_queries} and {self.queries}: the "
                "second stage needs answers as well."
            )


class Emulation:
    """One run of MEKD in a folder; a restart resumes it without repeating finished parts or queries.

    Args:
        settings: settings of the run.
        teacher: the API.
        local: data module with local samples, x or (x, y) with y ignored; its validation part is held out.
        folder: folder of the run.
        seed: determines all randomness.
        make_trainer: returns a Trainer with the given keyword arguments, such as max_epochs and callbacks.

    Raises:
        UserError: the teacher is not an ApiTeacher, the samples are random or neither images nor sequences, the query
            budget or that of the teacher is too small, or the folder holds a run with other settings or other local
            samples.
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
        self.samples, self.held_out = map(samples_of, loaders_of(local), LOADERS)
        if len(self.held_out) < 2:
            raise UserError(
                f"Expected `{LOADERS[1]}()` to give two held-out samples or more, as a distance to them chooses the "
                f"epoch of stage 1, got {len(self.held_out)}."
            )
        left = settings.queries - settings.first_queries - len(self.held_out)
        self.distinct = distinct_local(left, len(self.samples), settings.local_share)
        self.pool = left - self.distinct  # generated samples
        if self.pool < 2:
            raise UserError(
                f"Expected `queries` of MEKD to be more than those of stage 1 ({settings.first_queries}) and of the "
                f"local samples ({len(self.held_out) + self.distinct}), got {settings.queries}."
            )
        if teacher.budget is not None and teacher.budget < settings.queries:
            raise UserError(
                f"Expected `budget` of the ApiTeacher to be at least `queries` of MEKD ({settings.queries}), got "
                f"{teacher.budget}, which would be spent in the middle of the run. Give fewer `queries`, or a larger "
                "`budget`."
            )
        self._freeze_settings()
        self._freeze_samples()

    def _freeze_settings(self) -> None:
        """Writes the settings of a new run, or compares them with those of the run in the folder."""
        counts = {"local": len(self.samples), "held_out": len(self.held_out), "shape": list(self.samples.shape[1:])}
        now = {**asdict(self.settings), "seed": self.seed, "teacher": self.teacher.identity, **counts}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        if not path.exists():
            write_atomically(path, json.dumps(now, indent=1))
        then = json.loads(path.read_text())
        differing = [f"{k}: {then.get(k)!r} there, {now[k]!r} now" for k in now if then.get(k) != now[k]]
        if differing:
            raise UserError(
                f"{self.folder} holds a run of MEKD with other settings ({'; '.join(differing)}). Give those, or "
                "choose another `run_dir`."
            )

    def _freeze_samples(self) -> None:
        """Keeps digests of some local samples of a new run, or compares them: other samples cost queries again."""
        for name, x in zip(LOADERS, (self.samples, self.held_out), strict=True):
            check_stored(folder := self.folder / "local" / name, name, x)
            store_samples(folder, x)

    def run(self, make_student: Callable[[int], nn.Module]) -> GeneratedSamples:
        """Runs both stages; returns the training data of a boosting run.

        Args:
            make_student: builds the students of the boosting run; stage 2 trains one like the first.

        Raises:
            UserError: the outputs of the student do not match the teacher's answers.
        """
        reseed(self.seed, "student of stage 2")
        student = make_student(0)
        with isolate_rng(include_cuda=False):
            check_outputs(self.teacher, make_student(0), self.held_out[[0, -1]])
        generator = self.generator()
        train, val = self.answered(generator)
        if self.settings.student:
            self.student(student, generator, train, val)
        return GeneratedSamples(train, val, self.settings.batch_size, self.local)

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
        train, val = ((x, torch.zeros(len(x), 1)) for x in (self.samples, self.held_out))
        data, folder = AnsweredSamples(train, val, settings.gan_batch_size), self.folder / "stage1"
        best = run_stage(
            stage, data, folder, epochs=settings.gan_epochs, seed=self.seed, make_trainer=self.make_trainer
        )
        rank_zero_info(f"MEKD, stage 1: distance to held-out samples {best['score']:.4g} in epoch {best['epoch']}.")
        return stage.trained

    def answered(self, generator: Generator) -> tuple[Answered, Answered]:
        """Training samples (generated, and local ones if `local_share` > 0) and held-out samples, with answers."""
        held_out = self.held_out, answers_of(self.teacher, self.held_out)
        order = torch.Generator().manual_seed(seed_of(self.seed, "local samples"))
        chosen = self.samples[torch.randperm(len(self.samples), generator=order)[: self.distinct]]
        local = repeated(chosen, self.pool, self.settings.local_share)
        samples = generate(generator, self.pool, local, self.folder, self.seed)
        rank_zero_info(f"MEKD: querying the teacher on {self.pool:,} generated samples …")
        answers = answers_of(self.teacher, samples)
        save_answers(self.folder, answers, held_out)
        rank_zero_info(f"MEKD: {self.teacher.queries:,} queries so far.")
        return (samples, answers), held_out

    def student(self, student: nn.Module, generator: Generator, train: Answered, val: Answered) -> dict[str, Any]:
        """Stage 2: trains a student in place; returns its best epoch, and its test accuracy if there is a test part."""
        settings = self.settings
        mean, sd = statistics(train[1])
        stage = MappingEmulation(
            student, generator, hard=self.teacher.hard, mean=mean, sd=sd, tau=settings.tau, kl=settings.kl,
            optimizer=settings.optimizer, lr=settings.lr, seed=self.seed,
        )  # fmt: skip
        data, folder = AnsweredSamples(train, val, settings.batch_size), self.folder / "stage2"
        best = run_stage(stage, data, folder, epochs=settings.epochs, seed=self.seed, make_trainer=self.make_trainer)
        figures = {"epoch": best["epoch"], "queries": self.teacher.queries, **self._test(student)}
        write_atomically(self.folder / "student.json", json.dumps(figures, indent=1))
        rank_zero_info(f"MEKD, stage 2: {figures}.")
        return figures

    def _test(self, student: nn.Module) -> dict[str, float]:
        """Test accuracy of the student; the test part is read once."""
        path = self.folder / "student.json"
        if path.exists():
            return {k: v for k, v in json.loads(path.read_text()).items() if k == "test_accuracy"}
        if not is_overridden("test_dataloader", self.local, pl.LightningDataModule):
            return {}
        self.local.setup("test")
        loader = single_loader(self.local.test_dataloader())
        return {"test_accuracy": prefix_accuracies(ProgressiveEnsemble([student]), loader, torch.device("cpu"))[0]}
