"""Runs an exported ensemble with onnxruntime and numpy alone; one file, of which a copy lies in every exported folder.

    python runner.py FOLDER --input x.npy --confidence 0.9

Nothing that is loaded is executed as code: a folder holds JSON and ONNX graphs. Every graph is held to the size and
sha256 that the manifest gives, and must lie in the folder itself. Who can change the manifest can change the answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Array = np.ndarray[Any, Any]

FORMAT = "bdistil-export"
RULES = ("max_prob", "margin", "entropy", "agreement")
ALLOWANCE = 0.02  # of all stages: what asking an exit rule may cost where the share of decided samples is not known


class ExportError(ValueError):
    """The folder, the input or the budget cannot be used; the message says what was expected, what came, the cure."""


# ---- budgets and answers


@dataclass(frozen=True)
class Budget:
    """What a prediction may cost. Limits combine: the first to bind wins. At least one stage always answers.

    Attributes:
        stages: at most this many students.
        macs: at most this many multiply-adds a sample.
        seconds: no student is started that would end later than this after the call, by the measured stage times.
        confidence: a sample is decided as soon as its sureness reaches this; "fitted" takes the manifest's thresholds.
        rule: how sureness is read: max_prob (the default), margin, entropy or agreement.
    """

    stages: int | None = None
    macs: int | None = None
    seconds: float | None = None
    confidence: float | str | None = None
    rule: str | None = None

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise ExportError(f"Expected `stages` of a budget to be >= 1, got {self.stages}.")
        for name in ("macs", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ExportError(f"Expected `{name}` of a budget to be > 0, got {value}.")
        sure = self.confidence
        if sure is not None and sure != "fitted" and (isinstance(sure, str) or not 0 < sure <= 1):
            raise ExportError(f"Expected `confidence` of a budget to be in (0, 1] or 'fitted', got {sure!r}.")
        if self.rule is not None and (self.rule not in RULES or sure is None):
            raise ExportError(
                f"Expected `rule` of a budget to be one of {', '.join(RULES)}, beside a confidence, got {self.rule!r} "
                f"with confidence={sure!r}."
            )

    def stages_within(self, macs: Sequence[int]) -> int:
        """How many stages the limits on stages and MACs allow, at least 1, by cumulative MACs."""
        allowed = len(macs) if self.stages is None else min(self.stages, len(macs))
        if self.macs is not None:
            allowed = min(allowed, sum(cost <= self.macs for cost in macs))
        return max(allowed, 1)


NO_LIMITS = Budget()


@dataclass(frozen=True)
class Stage:
    """The answer after a number of students: logits (B, L), how many have answered, multiply-adds a sample so far."""

    total: Array
    factor: float | Array
    index: int
    macs: int
    offset: Array | None = None

    @property
    def logits(self) -> Array:
        """(B, L), in the teacher's units; worked out when it is read."""
        logits: Array = self.total * self.factor
        return logits if self.offset is None else logits + self.offset


@dataclass(frozen=True)
class Prediction:
    """Logits (B, L), how many students answered each sample (B,), and the multiply-adds that each cost (B,)."""

    logits: Array
    stages: Array
    macs: Array


def sureness(logits: Array, rule: str, temperature: float = 1.0, votes: Array | None = None) -> Array:
    """How sure answers (B, L) are, (B,) in 0 … 1; `votes` (B, L) counts the students that answer each class."""
    if rule == "agreement":
        assert votes is not None
        count = votes.sum(1)
        chosen = votes[np.arange(len(votes)), logits.argmax(1)]
        return np.where(count > 1, chosen / np.maximum(count, 1), 0)
    scaled = logits / np.float32(temperature)
    exponentials = np.exp(scaled - scaled.max(1, keepdims=True))
    probability = exponentials / exponentials.sum(1, keepdims=True)
    if rule == "max_prob":
        return np.asarray(probability.max(1))
    if rule == "margin":
        two = np.partition(probability, -2, axis=1)[:, -2:]
        return np.asarray(two[:, 1] - two[:, 0])
    terms = probability * np.log(np.where(probability > 0, probability, 1))
    return np.asarray(1 + terms.sum(1) / math.log(logits.shape[1]))


# ---- decisions from measured times


@dataclass(frozen=True)
class Times:
    """Seconds measured with a batch of one size: median and 95th percentile of each stage, an exit rule, a compaction.

    The arguments are those of an entry of `times` in the manifest.
    """

    batch: int
    stages: list[float]
    late: list[float]
    check: float
    compact: float


class Clock:
    """Measured times at any batch size: straight lines between the sizes that were measured."""

    def __init__(self, times: Sequence[Times]) -> None:
        self.times, self.sizes = times, [t.batch for t in times]

    def at(self, batch: float, read: Callable[[Times], float]) -> float:
        """A time in seconds; below the smallest batch, a part of it stands for how often there is one."""
        place = bisect_left(self.sizes, batch)
        if place == 0:
            return read(self.times[0]) * min(1.0, batch / self.sizes[0] if batch < 1 else 1.0)
        if place == len(self.sizes):
            return read(self.times[-1]) * batch / self.sizes[-1]
        low, high = self.times[place - 1], self.times[place]
        part = (batch - low.batch) / (high.batch - low.batch)
        return read(low) * (1 - part) + read(high) * part

    def stage(self, number: int, batch: float) -> float:
        """Median of a stage, from 0."""
        return self.at(batch, lambda t: t.stages[number])

    def stages_to_ask(self, batch: int, allowed: int, shares: Sequence[float] | None) -> int:
        """After how many of the first stages to ask the exit rule: none where that costs more than it saves."""
        check = self.at(batch, lambda t: t.check)
        whole = sum(self.stage(number, batch) for number in range(allowed))
        if shares is None:
            return min(allowed - 1, int(ALLOWANCE * whole / check)) if check else allowed - 1
        extra = check + (self.at(batch, lambda t: t.compact) if batch > 1 else 0.0)
        left, expected = 1.0, 0.0
        for number in range(allowed):
            expected += self.stage(number, batch * left)
            expected += extra * min(1.0, batch * left) if number + 1 < allowed else 0.0
            left = max(left - shares[number], 0.0)
        return allowed - 1 if expected < whole else 0

    def leaving_pays(self, number: int, batch: int, left: int, allowed: int) -> bool:
        """Do the stages after `number` save more on the samples that are left than taking the others out costs?"""
        saved = sum(self.stage(n, batch) - self.stage(n, left) for n in range(number + 1, allowed))
        return saved > self.at(batch, lambda t: t.compact)


class _Deadline:
    """Says whether one more stage would end in time, also where this machine is slower than the one that measured."""

    def __init__(self, seconds: float | None, clock: Clock | None) -> None:
        self.seconds, self.clock = seconds, clock
        self.started = self.begun = time.perf_counter()
        self.longest = self.spent = self.expected = 0.0

    def allows(self, number: int, batch: int) -> bool:
        if self.seconds is None:
            return True
        self.begun = time.perf_counter()
        if number == 0:
            return True
        need = self.longest
        if self.clock is not None:
            need = self.clock.at(batch, lambda t: t.late[number]) * max(1.0, self.spent / self.expected)
        return self.begun - self.started + need <= self.seconds

    def done(self, number: int, batch: int) -> None:
        if self.seconds is None:
            return
        taken = time.perf_counter() - self.begun
        self.longest, self.spent = max(self.longest, taken), self.spent + taken
        if self.clock is not None:
            self.expected += self.clock.at(batch, lambda t: t.late[number])


# ---- the folder


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        ExportError: there is none, or it is torn, or of another format.
    """
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = (manifest["format"], manifest["version"]) == (FORMAT, 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"Expected {path} to be the manifest of an export, got {type(error).__name__}: {error}. Give the folder "
            "that `bdistil export` wrote, or export again."
        ) from error
    if not known:
        raise ExportError(f"Expected {path} of format {FORMAT} 1, got {manifest['format']} {manifest['version']}.")
    return dict(manifest)


def read_file(root: Path, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file that the manifest names, held to its size and sha256.

    Raises:
        ExportError: it lies elsewhere than in the folder, is missing, truncated or another file.
    """
    name, cure = entry["file"], "Copy the exported folder again, or export again."
    path = root / name
    if name != os.path.basename(name) or "\\" in name or name in ("", ".", "..") or path.is_symlink():
        raise ExportError(
            f"Expected a file of {root} itself in its manifest, got {name!r}: no path may leave it. {cure}"
        )
    if not path.is_file():
        raise ExportError(f"{path} is missing; expected {entry['bytes']} bytes, sha256 {entry['sha256']}. {cure}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        state = f"{len(data)} of {entry['bytes']} bytes" if len(data) < entry["bytes"] else "another file"
        raise ExportError(f"{path} is {state}: sha256 {found}, expected {entry['sha256']}. {cure}")
    return bytes(data)


def open_session(data: bytes, name: str, threads: int) -> ort.InferenceSession:
    """A graph ready to run.

    Raises:
        ExportError: it is no graph that onnxruntime can run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common class for its errors
        raise ExportError(f"{name} cannot be run by onnxruntime {ort.__version__}: {error}") from error


class Graph:
    """A session and the names of what it reads and gives."""

    def __init__(self, root: Path, entry: Mapping[str, Any], threads: int) -> None:
        self.session = open_session(read_file(root, entry), entry["file"], threads)
        self.reads = [tensor["name"] for tensor in entry["inputs"]]
        self.gives = [tensor["name"] for tensor in entry["outputs"]]
        found = sorted(tensor.name for tensor in self.session.get_inputs())
        if found != sorted(self.reads):
            raise ExportError(f"{entry['file']} reads {found}, but the manifest says {sorted(self.reads)}.")

    def run(self, values: dict[str, Array]) -> None:
        """Adds what the graph gives to the values."""
        gives = self.session.run(self.gives, {name: values[name] for name in self.reads})
        values.update(zip(self.gives, gives))  # noqa: B905


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
        fused = manifest["fused"]
        pairs = fused["pairs"] if fused and fused["faster"] else []
        self.pairs = {entry["first"] - 1: Graph(Path(root), entry, threads) for entry in pairs}
        self.macs: list[int] = [entry["macs"] for entry in stages]
        self.factors: list[float | Array] = [_factor(entry["factor"]) for entry in stages]
        self.offset = None if manifest["offset"] is None else np.float32(manifest["offset"])
        self.clock = Clock([Times(**times) for times in manifest["times"]]) if manifest["times"] else None
        self._shape, self._dtype = tuple(manifest["input"]["shape"]), np.dtype(manifest["input"]["dtype"])

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
        if not isinstance(x, np.ndarray) or x.shape[1:] != self._shape or x.ndim == 0 or not len(x):
            wanted = ", ".join(map(str, ("B", *self._shape)))
            got = x.shape if isinstance(x, np.ndarray) else type(x).__name__
            raise ExportError(f"Expected `x` to be an array of shape ({wanted}) with B >= 1, got {got}.")
        if x.dtype != self._dtype:
            raise ExportError(
                f"Expected `x` of dtype {self._dtype}, got {x.dtype}. Convert it: x.astype('{self._dtype}')."
            )
        # The dot product with itself is the cheapest pass that NaN and infinity do not survive; what finite numbers
        # overflow is looked at again.
        flat = x.reshape(-1)
        if self._dtype.kind == "f" and not math.isfinite(flat.dot(flat)):
            wrong = ~np.isfinite(x).reshape(len(x), -1).all(1)
            if wrong.any():
                raise ExportError(
                    f"Expected `x` without NaN or infinity, got {wrong.sum()} such samples of {len(x)}, the first at "
                    f"index {wrong.argmax()}."
                )

    def _answer(self, number: int, values: Mapping[str, Array]) -> Stage:
        return Stage(values[f"total_{number + 1}"], self.factors[number], number + 1, self.macs[number], self.offset)

    def stages(self, x: Array) -> Iterator[Stage]:
        """The answers of the prefixes, lazily: a student runs when its stage is asked for."""
        self.check(x)
        values = {"x": x}
        for number, graph in enumerate(self.graphs):
            graph.run(values)
            yield self._answer(number, values)

    def predict(self, x: Array, budget: Budget | None = None) -> Prediction:
        """Answers within a budget; work beyond it is not done. Decided samples leave the batch where that pays.

        Args:
            x: a batch (B, ...).
            budget: limits; none runs all students.

        Raises:
            ExportError: x or the budget cannot be used.
        """
        self.check(x)
        budget = budget or NO_LIMITS
        allowed = budget.stages_within(self.macs)
        if budget.confidence is None and budget.seconds is None:
            logits = self._whole(x, allowed).logits
            stages, macs = np.empty((2, len(x)), np.int64)
            stages[:], macs[:] = allowed, self.macs[allowed - 1]
            return Prediction(logits, stages, macs)
        return self._within(x, budget, allowed)

    def _whole(self, x: Array, allowed: int) -> Stage:
        """All samples through all allowed stages: pairs may run as one graph."""
        values, number = {"x": x}, 0
        while number < allowed:
            pair = self.pairs.get(number) if number + 2 <= allowed else None
            (pair or self.graphs[number]).run(values)
            number += 2 if pair else 1
        return self._answer(allowed - 1, values)

    def _exits(self, budget: Budget) -> tuple[str, Sequence[float], Sequence[float] | None]:
        """Rule, a threshold a stage, and the expected shares of decided samples."""
        if self.manifest["task"] == "regression" and budget.confidence is not None:
            raise ExportError("Expected no `confidence` for real outputs, which have none. Limit stages or macs.")
        fitted = self.manifest["exits"]
        if budget.confidence != "fitted":
            return budget.rule or "max_prob", [float(budget.confidence or 2)] * len(self), None
        if fitted is None or budget.rule not in (None, fitted["rule"]):
            have = f"those of the rule {fitted['rule']!r}" if fitted else "none"
            raise ExportError(f"Expected fitted thresholds of rule {budget.rule!r} in the manifest, found {have}.")
        return fitted["rule"], fitted["thresholds"], fitted["decided_share"]

    def _within(self, x: Array, budget: Budget, allowed: int) -> Prediction:
        rule, thresholds, shares = self._exits(budget)
        deadline, clock = _Deadline(budget.seconds, self.clock), self.clock
        asked = 0 if budget.confidence is None else allowed - 1
        asked = clock.stages_to_ask(len(x), allowed, shares) if asked and clock else asked
        values, rows, stages = {"x": x}, np.arange(len(x)), np.zeros(len(x), np.int64)
        logits: Array | None = None
        for number in range(allowed):
            if not deadline.allows(number, len(rows)):
                break
            self.graphs[number].run(values)
            deadline.done(number, len(rows))
            answer = self._answer(number, values).logits
            logits = answer if logits is None else logits
            logits[rows], stages[rows] = answer, number + 1
            if number < asked:
                self._count_votes(number, values, rule)
                sure = sureness(answer, rule, self._temperature(number), values.get("votes")) >= thresholds[number]
                left = np.flatnonzero(~sure)
                if not len(left):
                    break
                if len(left) < len(rows) and (
                    clock is None or clock.leaving_pays(number, len(rows), len(left), allowed)
                ):
                    rows, values = rows[left], {name: value[left] for name, value in values.items()}
        assert logits is not None
        return Prediction(logits, stages, np.asarray(self.macs)[stages - 1])

    def _temperature(self, number: int) -> float:
        temperatures = self.manifest["temperatures"]
        return float(temperatures[number]) if temperatures else 1.0

    @staticmethod
    def _count_votes(number: int, values: dict[str, Array], rule: str) -> None:
        """Counts the student's own answer, which is what it added to the sum."""
        if rule != "agreement":
            return
        own = values[f"total_{number + 1}"] - (values[f"total_{number}"] if number else 0)
        votes = np.zeros(own.shape, np.float32)
        votes[np.arange(len(own)), own.argmax(1)] = 1
        values["votes"] = votes + values["votes"] if number else votes

    # ---- measuring

    def measure(self, batches: Sequence[int] = (1, 16, 128), repeats: int = 30) -> list[dict[str, Any]]:
        """Times of this machine, as they stand in the manifest; `clock` takes them from now on.

        Args:
            batches: sizes.
            repeats: of each.
        """
        generator = np.random.default_rng(0)
        entries = []
        for batch in batches:
            shape = (batch, *self._shape)
            x = generator.standard_normal(shape) if self._dtype.kind == "f" else np.zeros(shape)
            entries.append(self._measure_one(x.astype(self._dtype), repeats))
        self.clock = Clock([Times(**entry) for entry in entries])
        return entries

    def _measure_one(self, x: Array, repeats: int) -> dict[str, Any]:
        taken = np.zeros((repeats + 3, len(self) + 2))
        half = np.arange(0, len(x), 2)
        for row in taken:
            values = {"x": x}
            for number, graph in enumerate(self.graphs):
                begun = time.perf_counter()
                graph.run(values)
                row[number] = time.perf_counter() - begun
            begun = time.perf_counter()
            sureness(self._answer(number, values).logits, "max_prob")
            row[-2] = time.perf_counter() - begun
            {name: value[half] for name, value in values.items()}
            row[-1] = time.perf_counter() - begun - row[-2]
        median, late = np.median(taken[3:], 0).tolist(), np.quantile(taken[3:, :-2], 0.95, 0).tolist()
        return {"batch": len(x), "stages": median[:-2], "late": late, "check": median[-2], "compact": median[-1]}


# ---- the command line


def main(args: Sequence[str] | None = None) -> int:
    """Predicts the samples of a .npy file: a line each with the class, its probability and the stages that it took."""
    parser = argparse.ArgumentParser(prog="runner.py", description=(main.__doc__ or "").split(":")[0])
    parser.add_argument("folder", nargs="?", default=Path(__file__).parent, help="exported folder")
    parser.add_argument("--input", required=True, help="x (B, ...) as .npy")
    parser.add_argument("--output", help="write the logits (B, L) to this .npy instead of printing classes")
    parser.add_argument("--stages", type=int)
    parser.add_argument("--macs", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--confidence", help="in (0, 1], or 'fitted'")
    parser.add_argument("--rule", choices=RULES)
    given = parser.parse_args(args)
    try:
        _print_predictions(given)
    except (ExportError, OSError) as error:
        print(f"runner.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_predictions(given: argparse.Namespace) -> None:
    try:
        x = np.load(given.input, allow_pickle=False)
        sure = float(given.confidence) if given.confidence not in (None, "fitted") else given.confidence
    except ValueError as error:
        raise ExportError(
            f"Expected --input as .npy of numbers and --confidence as a number or 'fitted': {error}"
        ) from error
    ensemble = ExportedEnsemble.load(given.folder)
    budget = Budget(given.stages, given.macs, given.seconds, sure, given.rule)
    prediction = ensemble.predict(x, budget)
    if given.output:
        np.save(given.output, prediction.logits, allow_pickle=False)
        return
    labels, real = ensemble.manifest["labels"], ensemble.manifest["task"] == "regression"
    for logits, stages, macs in zip(prediction.logits, prediction.stages, prediction.macs, strict=True):
        best = int(logits.argmax())
        answer = " ".join(f"{value:.6g}" for value in logits) if real else labels[best] if labels else best
        print(f"{answer}\tstages {stages}\tmacs {macs}")


if __name__ == "__main__":
    sys.exit(main())
