"""The ensemble of an exported folder: every prefix of its stages is a predictor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .budget import Array, Budget, ExportError, Prediction, Stage
from .graphs import Graph, PipelinePool, read_manifest
from .stage_clock import BatchTimes, Deadline, StageClock
from .stages import ALWAYS, Exits, StageRunner, measure_stages


class ExportedEnsemble:
    """Students in the order of their rounds, run by onnxruntime; open a folder with `load`.

    Example::

        ensemble = ExportedEnsemble.load("exported")
        for stage in ensemble.stages(x):  # lazy: stop after any stage
            print(stage.index, stage.logits.argmax(1))
        prediction = ensemble.predict(x, Budget(macs=50_000))

    Attributes:
        manifest: of the folder.
        macs: cumulative multiply-adds per sample, one value per stage.
        clock: measured stage times, or None.
    """

    def __init__(self, root: str | os.PathLike[str], manifest: Mapping[str, Any], threads: int) -> None:
        self.manifest, stages = manifest, manifest["stages"]
        self.graphs = [Graph(Path(root), entry, threads) for entry in stages]
        self.macs: list[int] = [entry["macs"] for entry in stages]
        factors = [entry["factor"] for entry in stages]
        self.factors = [np.asarray(factor, np.float32) if isinstance(factor, list) else factor for factor in factors]
        self.offset = None if manifest["offset"] is None else np.float32(manifest["offset"])
        self.clock = StageClock([BatchTimes(**times) for times in manifest["times"]]) if manifest["times"] else None
        self._shape, self._dtype = tuple(manifest["input"]["shape"]), np.dtype(manifest["input"]["dtype"])
        self._stages = PipelinePool(self.graphs)
        self._all = self._exits = None
        fused = manifest["fused"]
        if fused and fused["faster"]:
            graphs = [Graph(Path(root), entry, threads) for entry in fused["graphs"]]
            if fused["kind"] == "exits":
                self._exits = PipelinePool(graphs, ("x", "thresholds"))
            else:
                self._all = PipelinePool(graphs)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, threads: int = 1) -> ExportedEnsemble:
        """Opens an exported folder.

        Args:
            folder: written by `bdistil export`.
            threads: of onnxruntime; small students are fastest with one.

        Raises:
            ExportError: the folder is no export, or a file in it is missing, truncated, changed or outside of it.
        """
        manifest = read_manifest(Path(folder))
        if manifest["kind"] != "onnx":
            raise ExportError(f"Expected an export of format onnx, got {manifest['kind']!r} in {folder}.")
        try:
            return cls(folder, manifest, threads)
        except (KeyError, TypeError) as error:
            raise ExportError(f"{folder}/manifest.json is incomplete ({error!r}). Export again.") from error

    def __len__(self) -> int:
        return len(self.graphs)

    def check(self, x: Array) -> None:
        """Checks that x is a batch (B, ...) as in training, without NaN or infinity.

        Raises:
            ExportError: it is not.
        """
        if not isinstance(x, np.ndarray) or x.ndim == 0 or x.shape[1:] != self._shape or not len(x):
            expected = ", ".join(map(str, ("B", *self._shape)))
            got = x.shape if isinstance(x, np.ndarray) else type(x).__name__
            raise ExportError(f"Expected `x` to be an array of shape ({expected}) with B >= 1, got {got}.")
        if x.dtype != self._dtype:
            raise ExportError(
                f"Expected `x` of dtype {self._dtype}, got {x.dtype}. Convert it: x.astype('{self._dtype}')."
            )
        if self._dtype.kind == "f" and not np.isfinite(x).all():
            wrong = ~np.isfinite(x).reshape(len(x), -1).all(1)
            raise ExportError(
                f"Expected `x` without NaN or infinity, got {wrong.sum()} such samples of {len(x)}, the first at "
                f"index {wrong.argmax()}."
            )

    def _stage(self, number: int, total: Array) -> Stage:
        return Stage(total, self.factors[number], number + 1, self.macs[number], self.offset)

    def stages(self, x: Array) -> Iterator[Stage]:
        """Yields the answers of the prefixes; a student runs when its stage is requested.

        Args:
            x: a batch (B, ...).
        """
        self.check(x)
        pipeline = self._stages.acquire(x)
        for number, step in enumerate(pipeline.steps):
            step()
            yield self._stage(number, pipeline.values[f"total_{number + 1}"].copy())
        self._stages.release(pipeline)

    def predict(self, x: Array, budget: Budget | None = None) -> Prediction:
        """Predicts within a budget. Decided samples are removed from the batch where that saves time.

        Args:
            x: a batch (B, ...).
            budget: limits; None runs all students.

        Raises:
            ExportError: x is no batch as in training, or the budget needs confidences or thresholds that do not exist.
        """
        self.check(x)
        allowed = budget.stages_within(self.macs) if budget else len(self)
        if budget and (budget.confidence is not None or budget.seconds is not None):
            exits = self._exits_of(budget)
            one_sample = len(x) == 1 and budget.seconds is None
            if self._exits and exits and one_sample and exits.rule == self.manifest["fused"]["rule"]:
                return self.run_exits(x, exits.thresholds, allowed)
            return self.run_stages(x, exits, allowed, budget.seconds)
        pool = self._all if self._all and allowed == len(self) else self._stages
        pipeline = pool.acquire(x)
        for step in pipeline.steps[:allowed]:
            step()
        logits = self._stage(allowed - 1, pipeline.values[f"total_{allowed}"]).logits
        pool.release(pipeline)
        return Prediction(logits, np.full(len(x), allowed), np.full(len(x), self.macs[allowed - 1]))

    def _exits_of(self, budget: Budget) -> Exits | None:
        """The exits of a budget; None without a confidence."""
        if budget.confidence is None:
            return None
        if self.manifest["task"] == "regression":
            raise ExportError("Expected no `confidence` for real outputs, which have none. Limit stages or macs.")
        fitted, temperatures = self.manifest["exits"], self.manifest["temperatures"] or [1.0] * len(self)
        if budget.confidence != "fitted":
            return Exits(budget.rule or "max_prob", [float(budget.confidence)] * len(self), temperatures)
        if fitted is None or budget.rule not in (None, fitted["rule"]):
            found = f"those of the rule {fitted['rule']!r}" if fitted else "none"
            raise ExportError(f"Expected fitted thresholds of rule {budget.rule!r} in the manifest, found {found}.")
        return Exits(fitted["rule"], fitted["thresholds"], temperatures, fitted["decided_share"])

    def run_stages(self, x: Array, exits: Exits | None, allowed: int, seconds: float | None = None) -> Prediction:
        """Runs stage by stage, with exits and a time limit.

        Args:
            x: a batch (B, ...), checked before.
            exits: None keeps all samples in the batch.
            allowed: maximum number of stages.
            seconds: maximum time.
        """
        clock, checked = self.clock, 0
        deadline = None if seconds is None else Deadline(seconds, clock)
        if exits:
            checked = clock.stages_to_check(len(x), allowed, exits.shares) if clock else allowed - 1
        pipeline = self._stages.acquire(x)
        runner, stages = StageRunner(self.graphs, pipeline), np.zeros(len(x), np.int64)
        logits: Array | None = None
        for number in range(allowed):
            samples = len(runner.rows)
            if deadline and not deadline.allows(number, samples):
                break
            answer = self._stage(number, runner.run(number)).logits
            if deadline:
                deadline.done(number, samples)
            logits = answer if logits is None else logits
            logits[runner.rows], stages[runner.rows] = answer, number + 1
            if exits and number < checked:
                left = np.flatnonzero(~exits.decided(number, answer, runner))
                if not len(left):
                    break
                if len(left) < samples and (clock is None or clock.removal_pays(number, samples, len(left), allowed)):
                    runner.keep(left)
        assert logits is not None
        self._stages.release(pipeline)
        return Prediction(logits, stages, np.asarray(self.macs)[stages - 1])

    def run_exits(self, x: Array, thresholds: Sequence[float], allowed: int) -> Prediction:
        """Runs the fused graph with exits.

        Args:
            x: one sample (1, ...), checked before.
            thresholds: one per stage.
            allowed: maximum number of stages.
        """
        assert self._exits is not None
        pipeline = self._exits.acquire(x)
        pipeline.values["thresholds"][:] = thresholds
        pipeline.values["thresholds"][allowed - 1 :] = ALWAYS
        pipeline.steps[0]()
        logits, number = pipeline.values["logits"].copy(), int(pipeline.values["stages"])
        self._exits.release(pipeline)
        return Prediction(logits, np.full(1, number), np.full(1, self.macs[number - 1]))

    def measure(self, batches: Sequence[int] = (1, 16, 128), repeats: int = 30) -> list[dict[str, Any]]:
        """Measures the stage times on this machine and uses them from now on.

        Args:
            batches: sizes, smallest first.
            repeats: of each.

        Returns:
            The entry `times` of a manifest.
        """
        entries = []
        for batch in batches:
            size = (batch, *self._shape)
            x = np.random.default_rng(0).standard_normal(size) if self._dtype.kind == "f" else np.zeros(size)
            entries.append(measure_stages(self.graphs, self._stages.acquire(x.astype(self._dtype)), repeats))
        self.clock = StageClock([BatchTimes(**entry) for entry in entries])
        return entries
