"""A boosting run: what is checked before it, and what is built, scored and committed in each round.

It knows nothing of hooks; the RoundController calls it at the right moments. What it knows of the past it reads from
the run directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bdistil import distributed
from bdistil.blueprint import Indescribable, describe
from bdistil.cost import Cost, latency_ms, measure_cost, training_macs
from bdistil.data.indexing import sequential_loader, training_loader
from bdistil.ensemble import ProgressiveEnsemble, build_student, restore_student
from bdistil.errors import UserError
from bdistil.functional import accepts_margin, accepts_progress
from bdistil.ledger import RoundEvidence
from bdistil.preflight import (
    check_augmentation,
    check_outputs,
    check_widths,
    device_of,
    first_of,
    loaders_of,
    only,
    to_device,
)
from bdistil.rounds import BoostingRound
from bdistil.run_directory import RunDirectory
from bdistil.scoring import Part, prefix_accuracies
from bdistil.seeding import reseed, seed_of
from bdistil.settings import BoostingSettings
from bdistil.students import Rung, Student, linkable, linked_features, links_of
from bdistil.teachers import FrozenTeacher

# Keys of a configuration that may differ between two starts of one run: where it runs and what it shows, not what it
# computes.
FREE_KEYS = (
    "run_dir", "config", "tracking", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.logger", "trainer.enable_", "trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.profiler",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of a trained student, and the figures behind it; accuracy and loss are the prefix's on validation."""

    accepted: bool
    reason: str
    training: RoundEvidence
    validation: RoundEvidence
    accuracy: float
    loss: float


class Boosting:
    """One run on the disk.

    Args:
        run_dir: the run directory.
        teacher: any module (x -> logits).
        student: ``make_student(round)``, or ``make_student(round, width)`` where the ladder asks for wider students.
        settings: of the run.
        seed: all randomness of the run is a function of it, the round, the epoch and the rank.
        config: what config.yaml keeps; the settings and the seed by default.
        uncounted: an operator whose cost is unknown is an ``error`` before training, or recorded with a warning.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        teacher: nn.Module,
        student: Callable[..., nn.Module],
        settings: BoostingSettings,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        uncounted: Literal["error", "record"] = "record",
    ) -> None:
        self.run = RunDirectory(run_dir)
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        self.make, self.settings, self.seed, self.uncounted = student, settings, seed, uncounted
        self.config = dict(config) if config else {"boosting": settings.plain(), "seed": seed}
        self.students: list[nn.Module] = []
        self.attempt = 0

    # ---- before training

    def check(self, datamodule: pl.LightningDataModule) -> None:
        """Everything that can be known to be wrong before an hour is spent on training.

        Raises:
            UserError: names the argument, what was allowed, what came, and the way out.
            RunError: a committed round is torn.
        """
        if rank_zero_only.rank == 0:
            self.run.prepare()
            self.run.freeze(self.config, FREE_KEYS)
        for number in range(self.run.committed()):
            self.run.weights(number)
        train, val = loaders_of(datamodule)
        self.train = Part("train", train, self.run.ledger, self.seed)
        self.val = Part("val", val, self.run.ledger, self.seed)
        check_augmentation(train.dataset, self.settings.state)
        check_widths(self.make, self.settings.ladder)
        self.example = train.collate_fn([train.dataset[0], train.dataset[self.train.samples - 1]])[0]
        with torch.random.fork_rng():
            student = build_student(self.make, 0, [], Rung(0))
        self.outputs = check_outputs(self.teacher, student, self.example)
        self.takes_links = isinstance(student, Student)
        if not self.takes_links:
            rank_zero_info(f"{type(student).__name__} is no bdistil.Student: it takes no links, so all rounds are of class F0.")
        self.fingerprint = self.teacher.fingerprint
        for part in (self.train, self.val):
            if part.ledger.exists:
                part.ledger.open(part.samples, self.fingerprint)

    # ---- a round

    def build(self) -> BoostingRound | None:
        """The module of the next round, or None when the run is finished."""
        number = self.run.committed()
        if number >= self.settings.rounds or self.run.stopped is not None:
            return None
        while len(self.students) < number:
            self.students.append(restore_student(self.run, len(self.students), self.students, self.make))
        self.attempt = len(self.run.tries(number))
        self.rung = self.settings.rungs(number, links=self.takes_links)[self.attempt]
        reseed(self.seed, number, self.attempt, "build")
        student = build_student(self.make, number, self.students, self.rung)
        self.cost = self._cost(student)
        return BoostingRound(
            student,
            number=number,
            settings=self.settings,
            earlier=self.students,
            ledger=self.train.ledger,
            validation=self.val.ledger,
            teacher=self.teacher if self.settings.state == "recompute" else None,
        )

    def _inputs(self, student: nn.Module, device: torch.device) -> tuple[Any, ...]:
        """What a student is given for one sample: x, and the features that it reads of earlier ones."""
        x = to_device(first_of(self.example), device)
        return (x, linked_features(student, self.students, x)) if links_of(student) else (x,)

    def _cost(self, student: nn.Module) -> Cost:
        for earlier in self.students:
            earlier.cpu()
        cost = measure_cost(student, self._inputs(student, torch.device("cpu")), uncounted=self.uncounted)
        if cost.uncounted:
            rank_zero_warn(f"The MACs of {type(student).__name__} lack operators that could not be counted: {cost.uncounted}.")
        return cost

    def loaders(self, datamodule: pl.LightningDataModule) -> Any:
        """While this context is open, the data module's training and validation loaders carry the index."""
        train = partial(self._train_loader, datamodule.train_dataloader, datamodule)
        return _replaced(datamodule, train_dataloader=train, val_dataloader=partial(_val_loader, datamodule.val_dataloader))

    def _train_loader(self, original: Callable[[], Any], datamodule: pl.LightningDataModule) -> DataLoader[Any]:
        trainer = datamodule.trainer
        assert trainer is not None
        return training_loader(
            only(original()),
            seed=seed_of(self.seed, len(self.students), self.attempt),
            epoch=trainer.fit_loop.epoch_progress.current.processed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def open(self, module: BoostingRound) -> None:
        """Brings the ledgers up to date on the devices of this round; asks the teacher where it has not been asked.

        Raises:
            RunError: NaN or infinity among the teacher's logits.
        """
        if not (self.train.ledger.exists and self.val.ledger.exists and self.run.teacher_figures()):
            self._ask_teacher(module.device)
        for part in (self.train, self.val):
            part.catch_up(self.students, module.device, self.fingerprint)
        module.prepare()
        module.student.eval()
        self.latency = latency_ms(module.student, self._inputs(module.student, module.device))
        module.student.train()

    def _ask_teacher(self, device: torch.device) -> None:
        cost = measure_cost(self.teacher.cpu(), (first_of(self.example),), uncounted=self.uncounted)
        teacher, known = self.teacher.to(device), {"outputs": self.outputs, "fingerprint": self.fingerprint}
        rank_zero_info(f"Asking the teacher about {self.train.samples} training and {self.val.samples} validation samples …")
        self.train.ask(teacher, device, **known)  # type: ignore[arg-type]
        accuracy, loss = self.val.ask(teacher, device, scale=self.train.ledger.scale, **known)  # type: ignore[arg-type]
        row = {
            "stage": "teacher", "macs": cost.macs, "link_macs": 0, "params": cost.params,
            "train_macs": cost.macs * (self.train.samples + self.val.samples),
            "val_accuracy": accuracy, "val_loss": loss, "activation_bytes": cost.activation_bytes,
            "latency_ms": latency_ms(teacher, (to_device(first_of(self.example), device),)),
        }  # fmt: skip
        self.teacher.cpu()
        if distributed.rank() == 0:
            self.run.keep_teacher(row)
        distributed.barrier()
        rank_zero_info(f"Teacher: accuracy {accuracy:.4f} on validation, {cost.macs:,} MACs, {cost.params:,} parameters.")

    # ---- the end of a round

    def judge(self, module: BoostingRound, device: torch.device) -> Verdict:
        """One pass over the training part and one over the validation part: is the student accepted?

        Raises:
            RunError: NaN or infinity among the student's logits.
        """
        validation, accuracy, loss = self.val.score(module.student, self.students, device, self.settings)
        training, _, _ = self.train.score(module.student, self.students, device, self.settings)
        accepted, reason = self.decide(module.number, training, validation)
        return Verdict(accepted, reason, training, validation, accuracy, loss)

    def decide(self, number: int, training: RoundEvidence, validation: RoundEvidence) -> tuple[bool, str]:
        """Accept the student? The decision and its reason; the same on all ranks, as the evidence is."""
        if number == 0:
            return True, "the first round is always accepted"
        if self.settings.accept == "margin":
            return accepts_margin(training.margin_share, self.settings.margin_share)
        return accepts_progress(validation.rms_before, validation.rms_after, self.settings.min_progress)

    def row(self, module: BoostingRound, verdict: Verdict, *, samples_seen: int, seconds: float) -> dict[str, Any]:
        """The prefix's row of the curve; MACs and parameters are cumulative, the other costs are this round's."""
        before = self.run.rows()[-1] if module.number else {"macs": 0, "params": 0}
        cost = self.cost
        return {
            "stage": module.number + 1,
            "macs": before["macs"] + cost.macs,
            "link_macs": cost.by_module.get("join", 0),
            "params": before["params"] + cost.params,
            "train_macs": self._training_macs(module, samples_seen),
            "val_accuracy": verdict.accuracy,
            "val_loss": verdict.loss,
            "latency_ms": self.latency,
            "seconds": seconds,
            "accepted_class": self.rung.name if links_of(module.student) else Rung(0, width=self.rung.width).name,
            "margin_share": verdict.training.margin_share,
            "reason": verdict.reason,
            "margin_min": verdict.training.margin_min,
            "rms_error": verdict.validation.rms_after,
            "sup_error": verdict.validation.sup_after,
            "activation_bytes": cost.activation_bytes,
        }

    def _training_macs(self, module: BoostingRound, samples_seen: int) -> int:
        """MACs of this round: the student's training, what it reads of earlier students, and the teacher if asked."""
        read = linkable(self.students)[: links_of(module.student)]
        earlier = self.students if self.settings.state == "recompute" else read
        x = first_of(self.example)
        links = sum(measure_cost(s.body if s in read else s, (x,), uncounted="record").macs for s in earlier)  # type: ignore[union-attr,arg-type]
        teacher = (self.run.teacher_figures() or {})["macs"] if self.settings.state == "recompute" else 0
        return training_macs(
            student=self.cost.macs, links=links, samples_seen=samples_seen, teacher=teacher, teacher_samples=samples_seen
        )

    def commit(self, module: BoostingRound, verdict: Verdict, row: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Student, S and metrics: all of it, or nothing.

        Raises:
            RunError: the disk refused.
        """
        self.train.ledger.keep()
        self.val.ledger.keep()
        if distributed.rank() == 0:
            plan, tensors, why = _described(module.student)
            record = {
                "round": module.number,
                "reason": verdict.reason,
                "tries": self.run.tries(module.number),
                "rung": asdict(self.rung),
                "scale": self.train.ledger.scale,
                "input_shape": list(self.example.shape[1:]) if isinstance(self.example, Tensor) else None,
                "curve": dict(row),
                "evidence": {"training": asdict(verdict.training), "validation": asdict(verdict.validation)},
                "uncounted": self.cost.uncounted,
                **extra,
                "indescribable": why,
                "blueprint": plan,
            }
            self.run.commit(module.number, tensors, record)
            self.run.write_curve(self.run.rows())
        distributed.barrier()

    def reject(self, module: BoostingRound, verdict: Verdict) -> bool:
        """Records a rejected try; stops the run when the ladder has no rung left. Says whether it goes on."""
        last = self.attempt + 1 >= len(self.settings.rungs(module.number, links=self.takes_links))
        if distributed.rank() == 0:
            self.run.reject(module.number, f"{self.rung.name}: {verdict.reason}")
            if last:
                self.run.stop(module.number, f"no class of students made progress in round {module.number}: {verdict.reason}")
        distributed.barrier()
        return not last

    # ---- the end of the run

    @property
    def ensemble(self) -> ProgressiveEnsemble:
        """The ensemble of the committed rounds."""
        return ProgressiveEnsemble.load(self.run.root, student=self.make)

    def finish(self, datamodule: pl.LightningDataModule, device: torch.device) -> None:
        """Reads the test part, once; the curve gets its test accuracies."""
        done = self.run.test_figures() is not None or not self.run.committed()
        if rank_zero_only.rank != 0 or done or not is_overridden("test_dataloader", datamodule, pl.LightningDataModule):
            return
        datamodule.setup("test")
        loader = only(datamodule.test_dataloader())
        teacher = prefix_accuracies(ProgressiveEnsemble([self.teacher]).to(device), loader, device)
        self.run.keep_test(teacher + prefix_accuracies(self.ensemble.to(device), loader, device))
        self.run.write_curve(self.run.rows())


def _val_loader(original: Callable[[], Any]) -> DataLoader[Any]:
    return sequential_loader(only(original()))


def _described(student: nn.Module) -> tuple[dict[str, Any] | None, dict[str, Tensor], str | None]:
    """Structure and tensors of a student; without the structure, and why, where JSON cannot say it."""
    try:
        plan, tensors = describe(student)
    except Indescribable as error:
        return None, {name: value.clone() for name, value in student.state_dict().items()}, str(error)
    return plan, tensors, None


@contextmanager
def _replaced(thing: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Methods of one object replaced, and put back."""
    before = {name: vars(thing)[name] for name in methods if name in vars(thing)}
    vars(thing).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(thing).pop(name, None)
        vars(thing).update(before)
