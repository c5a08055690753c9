"""The ensemble of an exported folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .budget import Array, Budget, Prediction, Stage
from .files import ExportError, read_manifest
from .graphs import Chains, Graph, require_order
from .inputs import check_input
from .stage_clock import Clock, Deadline, Times
from .stages import ALWAYS, ExitRule, StageRunner
from .timing import example, stage_times


def _factor(value: float | list[float]) -> float | Array:
    return value if isinstance(value, float) else np.asarray(value, np.float32)


class ExportedEnsemble:
    """An ordered ensemble in an exported folder; `load` opens one.

    Attributes:
        manifest: of the folder.
        macs: cumulative multiply-adds a sample, one number a stage.
        clock: measured stage times, where there are any.
    """

    def __init__(self, root: str | os.PathLike[str], manifest: Mapping[str, Any], threads: int) -> None:
        self.manifest, stages = manifest, manifest["stages"]
        self.graphs = [Graph(Path(root), entry, threads) for entry in stages]
        self.macs: list[int] = [entry["macs"] for entry in stages]
        self.factors: list[float | Array] = [_factor(entry["factor"]) for entry in stages]
        self.offset = None if manifest["offset"] is None else np.float32(manifest["offset"])
        self.clock = Clock([Times(**times) for times in manifest["times"]]) if manifest["times"] else None
        self._shape, self._dtype = tuple(manifest["input"]["shape"]), np.dtype(manifest["input"]["dtype"])
        fused = manifest["fused"] or {"faster": False, "graphs": [], "kind": None}
        graphs = [Graph(Path(root), entry, threads) for entry in fused["graphs"]] if fused["faster"] else []
        self._exits = Chains(graphs) if graphs and fused["kind"] == "exits" else None
        spans = {} if self._exits else {graph.first: graph for graph in graphs}
        self._stages = Chains(self.graphs)
        self._whole = [Chains(self._planned(allowed, spans)) for allowed in range(1, len(self) + 1)]
        for chains in (self._stages, *self._whole):
            require_order(chains.graphs)

    def plan(self, allowed: int) -> Sequence[Graph]:
        """The graphs that run the first `allowed` stages where nobody leaves between them."""
        return self._whole[allowed - 1].graphs

    def _planned(self, allowed: int, spans: Mapping[int, Graph]) -> list[Graph]:
        """Graphs of several stages where they end in time, single ones elsewhere."""
        plan: list[Graph] = []
        while (number := plan[-1].last if plan else 0) < allowed:
            span = spans.get(number + 1)
            plan.append(span if span and span.last <= allowed else self.graphs[number])
        return plan

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, threads: int = 1) -> ExportedEnsemble:
        """Opens an exported folder.

        Args:
            folder: that `bdistil export` wrote.
            threads: of onnxruntime; small students are fastest with one.

        Raises:
            ExportError: the folder is no export, or a file of it is missing, truncated, another one or elsewhere.
        """
        manifest = read_manifest(Path(folder))
        if manifest["kind"] != "onnx":
            raise ExportError(f"Expected an export of format onnx, got {manifest['kind']!r} in {folder}.")
        try:
            return cls(folder, manifest, threads)
        except (KeyError, TypeError) as error:
            raise ExportError(f"{folder}/manifest.json is not whole ({error!r}). Export again.") from error

    def __len__(self) -> int:
        return len(self.graphs)

    def check(self, x: Array) -> None:
        """Is x (B, ...) a batch as in training, without NaN or infinity?

        Raises:
            ExportError: names what is wrong with x, and what was expected.
        """
        check_input(x, self._shape, self._dtype)

    def _answer(self, number: int, total: Array) -> Stage:
        return Stage(total, self.factors[number], number + 1, self.macs[number], self.offset)

    def stages(self, x: Array) -> Iterator[Stage]:
        """The answers of the prefixes, lazily: a student runs when its stage is asked for."""
        self.check(x)
        chain = self._stages.take(len(x))
        chain.values["x"][...] = x
        for number, step in enumerate(chain.steps):
            step()
            yield self._answer(number, chain.values[f"total_{number + 1}"].copy())
        self._stages.put(len(x), chain)

    def predict(self, x: Array, budget: Budget | None = None) -> Prediction:
        """Answers within a budget; work beyond it is not done. Decided samples leave the batch where that pays.

        Args:
            x: a batch (B, ...).
            budget: limits; none runs all students.

        Raises:
            ExportError: x or the budget cannot be used.
        """
        self.check(x)
        allowed = budget.stages_within(self.macs) if budget else len(self)
        if budget and (budget.confidence is not None or budget.seconds is not None):
            exits = self._exit_rule(budget)
            one_sample = len(x) == 1 and budget.seconds is None
            if self._exits and exits and one_sample and exits.rule == self.manifest["fused"]["rule"]:
                return self.leave(x, exits.thresholds, allowed)
            return self.decide(x, exits, allowed, budget.seconds)
        chains, count = self._whole[allowed - 1], len(x)
        chain = chains.take(count)
        chain.values["x"][...] = x
        for step in chain.steps:
            step()
        logits = self._answer(allowed - 1, chain.values[f"total_{allowed}"]).logits
        chains.put(count, chain)
        return Prediction(logits, np.full(count, allowed), np.full(count, self.macs[allowed - 1]))

    def _exit_rule(self, budget: Budget) -> ExitRule | None:
        """How samples are decided, where they are."""
        if budget.confidence is None:
            return None
        if self.manifest["task"] == "regression":
            raise ExportError("Expected no `confidence` for real outputs, which have none. Limit stages or macs.")
        fitted, temperatures = self.manifest["exits"], self.manifest["temperatures"] or [1.0] * len(self)
        if budget.confidence != "fitted":
            return ExitRule(budget.rule or "max_prob", [float(budget.confidence)] * len(self), temperatures)
        if fitted is None or budget.rule not in (None, fitted["rule"]):
            have = f"those of the rule {fitted['rule']!r}" if fitted else "none"
            raise ExportError(f"Expected fitted thresholds of rule {budget.rule!r} in the manifest, found {have}.")
        return ExitRule(fitted["rule"], fitted["thresholds"], temperatures, fitted["decided_share"])

    def decide(self, x: Array, exits: ExitRule | None, allowed: int, seconds: float | None = None) -> Prediction:
        """Answers stage by stage, where samples may be decided or time may run out.

        Args:
            x: a batch (B, ...), which was checked.
            exits: how samples are decided; None: nobody is.
            allowed: how many stages may run.
            seconds: for all of it.
        """
        clock, asked = self.clock, 0
        deadline = Deadline(seconds, clock)
        if exits:
            asked = clock.stages_to_ask(len(x), allowed, exits.shares) if clock else allowed - 1
        chain = self._stages.take(len(x))
        walk, stages = StageRunner(self.graphs, chain, x), np.zeros(len(x), np.int64)
        logits: Array | None = None
        for number in range(allowed):
            if not deadline.allows(number, len(walk.rows)):
                break
            answer = self._answer(number, walk.run(number)).logits
            deadline.done(number, len(walk.rows))
            logits = answer if logits is None else logits
            logits[walk.rows], stages[walk.rows] = answer, number + 1
            if exits and number < asked:
                left = np.flatnonzero(~exits.decides(number, answer, walk))
                if not len(left):
                    break
                if len(left) < len(walk.rows) and (
                    clock is None or clock.leaving_pays(number, len(walk.rows), len(left), allowed)
                ):
                    walk.keep(left)
        assert logits is not None
        self._stages.put(len(x), chain)
        return Prediction(logits, stages, np.asarray(self.macs)[stages - 1])

    def leave(self, x: Array, thresholds: Sequence[float], allowed: int) -> Prediction:
        """All stages and exits in one call of the graph with exits.

        Args:
            x: one sample (1, ...), which was checked.
            thresholds: one a stage.
            allowed: how many stages may run.
        """
        assert self._exits is not None
        chain = self._exits.take(1)
        chain.values["x"][...] = x
        chain.values["thresholds"][:] = thresholds
        chain.values["thresholds"][allowed - 1 :] = ALWAYS
        chain.steps[0]()
        logits, number = chain.values["logits"].copy(), int(chain.values["stages"])
        self._exits.put(1, chain)
        return Prediction(logits, np.full(1, number), np.full(1, self.macs[number - 1]))

    def measure(self, batches: Sequence[int] = (1, 16, 128), repeats: int = 30) -> list[dict[str, Any]]:
        """Times of this machine, as they stand in the manifest; `clock` takes them from now on.

        Args:
            batches: sizes.
            repeats: of each.
        """
        entries = []
        for batch in batches:
            x = example(batch, self._shape, self._dtype)
            entries.append(stage_times(self.graphs, self._stages.take(batch), x, repeats))
        self.clock = Clock([Times(**entry) for entry in entries])
        return entries
