"""The ensemble of an exported folder: every prefix of its stages is a predictor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .budget import Budget, ExportError, Prediction, Stage
from .confidence import Array
from .exits import ALWAYS, ExitPlan, Exits, measure_stages, predict_within, runs, shares_at
from .graphs import Graph, PipelinePool, read_manifest
from .inputs import Arrays, Inputs
from .stage_clock import BatchTimes, Deadline, Guard, StageClock
from .stages import StageRunner

PLANS = 64  # budgets whose exit plans are cached
WARM_UP = 3  # measurements that are discarded


class ExportedEnsemble:
    """Students in the order of their rounds, run by onnxruntime; open a folder with `load`.

    Example::

        ensemble = ExportedEnsemble.load("exported")
        for stage in ensemble.stages(x):  # lazy: stop after any stage
            print(stage.index, stage.logits.argmax(1))
        prediction = ensemble.predict(x, Budget(macs=50_000))

    Attributes:
        manifest: manifest of the folder.
        macs: cumulative multiply-adds per sample, one value per stage.
    """

    def __init__(self, root: str | os.PathLike[str], manifest: Mapping[str, Any], threads: int) -> None:
        self.root, self.manifest, self.threads = Path(root).absolute(), manifest, threads
        stages = manifest["stages"]
        self.graphs = [Graph(self.root, entry, threads) for entry in stages]
        self.macs: list[int] = [entry["macs"] for entry in stages]
        self._costs = np.array(self.macs)
        factors = [entry["factor"] for entry in stages]
        self.factors = [np.asarray(factor, np.float32) if isinstance(factor, list) else factor for factor in factors]
        self.offset = None if manifest["offset"] is None else np.float32(manifest["offset"])
        self.inputs = Inputs(manifest["inputs"])
        self.clock = self._clock_of(manifest["times"])
        names = [entry["name"] for entry, _ in self.inputs.entries]
        self._stages = PipelinePool(self.graphs, names)
        self._all = self._exits = None
        fused = manifest["fused"]
        if fused and fused["faster"]:
            graphs = [Graph(self.root, entry, threads) for entry in fused["graphs"]]
            if fused["kind"] == "exits":
                self._exits = PipelinePool(graphs, (*names, "thresholds"))
            else:
                self._all = PipelinePool(graphs, names)

    @staticmethod
    def _clock_of(times: Sequence[Mapping[str, Any]]) -> StageClock | None:
        return StageClock([BatchTimes(**entry) for entry in times]) if times else None

    @property
    def clock(self) -> StageClock | None:
        """Measured stage times, or None."""
        return self._clock

    @clock.setter
    def clock(self, clock: StageClock | None) -> None:
        self._clock = clock
        self._plans: dict[Any, ExitPlan] = {}  # by budget

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies refer to the folder and open it again."""
        times = [vars(entry) for entry in self.clock.times] if self.clock else []
        return type(self), (self.root, {**self.manifest, "times": times}, self.threads)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, threads: int = 1) -> ExportedEnsemble:
        """Opens an exported folder.

        Args:
            folder: written by `bdistil export`.
            threads: threads of onnxruntime; small students are fastest with one.

        Raises:
            ExportError: the folder is not an export, or a file in it is missing, truncated, changed or outside of it.
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

    def check(self, x: Any) -> Arrays:
        """Checks that x is a batch (B, ...) as in training, without NaN or infinity; returns its arrays by name.

        Raises:
            ExportError: it is not.
        """
        return self.inputs.read(x)

    def _runner(self, arrays: Arrays) -> StageRunner:
        return StageRunner(self.graphs, self._stages, arrays)

    def _stage(self, number: int, total: Array) -> Stage:
        return Stage(total, self.factors[number], number + 1, self.macs[number], self.offset)

    def stages(self, x: Any) -> Iterator[Stage]:
        """Yields the answers of the prefixes; a student runs when its stage is requested.

        Args:
            x: a batch (B, ...), or a tuple or dictionary of arrays of that form, as in training.
        """
        runner = self._runner(self.check(x))
        while runs(runner, len(self), None):
            yield self._stage(runner.number - 1, runner.total(runner.number - 1).copy())
        runner.close()

    def predict(self, x: Any, budget: Budget | None = None) -> Prediction:
        """Predicts within a budget.

        With a confidence, a sample gets the answer of the first stage that reaches it, whatever the rest of the batch.

        Args:
            x: a batch (B, ...), or a tuple or dictionary of arrays of that form, as in training.
            budget: limits; None runs all students.

        Raises:
            ExportError: x is not a batch as in training, or the budget needs missing confidences or thresholds.
        """
        started = time.perf_counter()
        arrays, budget = self.check(x), budget or Budget()
        allowed = budget.stages_within(self.macs)
        plan = self._plan(budget, allowed) if budget.confidence is not None else None
        if plan is None and budget.seconds is None:
            return self._run_all(arrays, allowed)
        one = len(next(iter(arrays.values()))) == 1
        if self._exits and plan and one and budget.seconds is None and plan.rule == self._fused_rule:
            return self.run_exits(arrays, plan.exits.thresholds, allowed)
        return self.run_stages(arrays, plan, allowed, budget.seconds, started)

    @property
    def _fused_rule(self) -> str:
        return str(self.manifest["fused"]["rule"])

    def _run_all(self, arrays: Arrays, allowed: int) -> Prediction:
        """Runs the first stages, or the fused graph of all, on the whole batch."""
        pool = self._all if self._all and allowed == len(self) else self._stages
        pipeline = pool.acquire(arrays)
        for step in pipeline.steps[:allowed]:
            step()
        logits = self._stage(allowed - 1, pipeline.values[f"total_{allowed}"]).logits
        pool.release(pipeline)
        return self._uniform(logits, allowed)

    def _uniform(self, logits: Array, number: int) -> Prediction:
        return Prediction(logits, np.full(len(logits), number), np.full(len(logits), self.macs[number - 1]))

    def _plan(self, budget: Budget, allowed: int) -> ExitPlan:
        """The cached exit plan of a budget."""
        key = (budget.confidence, budget.rule, allowed)
        if key not in self._plans:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = self.plan_of(self._exits_of(budget), allowed)
        return self._plans[key]

    def plan_of(self, exits: Exits, allowed: int) -> ExitPlan:
        """Exit plan for predictions of up to `allowed` stages."""
        factors = [float(factor) for factor in self.factors]
        return ExitPlan(exits, factors, Guard(self.clock, allowed, exits.shares))

    def _exits_of(self, budget: Budget) -> Exits:
        """The exits of a budget with a confidence."""
        if self.manifest["task"] != "classification":
            raise ExportError(
                "Expected no `confidence` for real outputs or several labels, which have no class probabilities. Limit "
                "stages or macs."
            )
        fitted, temperatures = self.manifest["exits"], self.manifest["temperatures"] or [1.0] * len(self)
        if budget.confidence != "fitted":
            rule, threshold = budget.rule or "max_prob", float(budget.confidence)  # type: ignore[arg-type]
            shares = shares_at(self.manifest["shares"].get(rule, []), threshold)
            return Exits(rule, [threshold] * len(self), temperatures, shares)
        if fitted is None or budget.rule not in (None, fitted["rule"]):
            found = f"those of the rule {fitted['rule']!r}" if fitted else "none"
            raise ExportError(f"Expected fitted thresholds of rule {budget.rule!r} in the manifest, found {found}.")
        return Exits(fitted["rule"], fitted["thresholds"], temperatures, fitted["decided_share"])

    def run_stages(
        self,
        arrays: Arrays,
        plan: ExitPlan | None,
        allowed: int,
        seconds: float | None = None,
        started: float | None = None,
    ) -> Prediction:
        """Runs stage by stage, with exits and a time limit.

        Args:
            arrays: arrays of a batch, see `check`.
            plan: exits; None keeps all samples in the batch.
            allowed: maximum number of stages.
            seconds: maximum time.
            started: start of `seconds`; None: now.
        """
        deadline = None if seconds is None else Deadline(seconds, self.clock, started=started)
        runner = self._runner(arrays)
        if plan is not None:
            answer = predict_within(runner, allowed, plan, deadline)
            return Prediction(answer.logits, answer.stages, np.full(len(answer.stages), self._costs[answer.ran - 1]))
        while runs(runner, allowed, deadline):
            pass
        logits = self._stage(runner.number - 1, runner.total(runner.number - 1)).logits
        runner.close()
        return self._uniform(logits, runner.number)

    def run_exits(self, arrays: Arrays, thresholds: Sequence[float], allowed: int) -> Prediction:
        """Runs the fused graph with exits.

        Args:
            arrays: arrays of one sample, see `check`.
            thresholds: one per stage.
            allowed: maximum number of stages.
        """
        assert self._exits is not None
        pipeline = self._exits.acquire(arrays)
        pipeline.values["thresholds"][:] = thresholds
        pipeline.values["thresholds"][allowed - 1 :] = ALWAYS
        pipeline.steps[0]()
        logits, number = pipeline.values["logits"].copy(), int(pipeline.values["stages"])
        self._exits.release(pipeline)
        return Prediction(logits, np.full(1, number), np.full(1, self.macs[number - 1]))

    def measure(self, batches: Sequence[int] = (1, 2, 8, 32, 256), repeats: int = 30) -> list[dict[str, Any]]:
        """Measures the stage times on this machine and uses them from now on.

        Args:
            batches: batch sizes.
            repeats: measurements of each.

        Returns:
            The entry `times` of a manifest.
        """
        exits = Exits("max_prob", [0.5] * len(self), [1.0] * len(self))
        plan = ExitPlan(exits, [1.0] * len(self), Guard(None, len(self)))
        entries = []
        for batch in sorted(batches):
            arrays = self.inputs.random(batch)
            rows = [measure_stages(lambda: self._runner(arrays), plan) for _ in range(WARM_UP + repeats)]  # noqa: B023
            taken = np.array(rows[WARM_UP:])
            *stages, check, compact = np.median(taken, 0).tolist()
            late = np.quantile(taken[:, :-2], 0.95, 0).tolist()
            entries.append({"batch": batch, "stages": stages, "late": late, "check": check, "compact": compact})
        self.clock = self._clock_of(entries)
        return entries
