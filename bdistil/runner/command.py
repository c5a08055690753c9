"""The command line of an exported folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from .budget import Budget, ExportError
from .confidence import RULES
from .ensemble import ExportedEnsemble


def main(args: Sequence[str] | None = None) -> int:
    """Predicts the samples of a .npy file: prints a line per sample with the class, the stages and the MACs."""
    parser = argparse.ArgumentParser(prog="runner", description=(main.__doc__ or "").split(":")[0])
    parser.add_argument("folder", nargs="?", default=Path(__file__).parent.parent, help="exported folder")
    parser.add_argument(
        "--input",
        required=True,
        help="x (B, ...) as .npy; several arrays as .npz, by name, or in order as np.savez(file, *x)",
    )
    parser.add_argument("--output", help="write the logits (B, L) to this .npy instead of printing classes")
    parser.add_argument("--stages", type=int, help="maximum number of students")
    parser.add_argument("--macs", type=int, help="maximum number of multiply-adds per sample")
    parser.add_argument("--seconds", type=float, help="maximum time")
    parser.add_argument(
        "--confidence", help="a sample is decided at this confidence, in (0, 1], or at the 'fitted' thresholds"
    )
    parser.add_argument("--rule", choices=RULES, help="exit rule; default: max_prob")
    given = parser.parse_args(args)
    try:
        _print_predictions(given)
    except (ExportError, OSError) as error:
        print(f"runner: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parts(arrays: dict[str, Any]) -> Any:
    """x of several arrays: a tuple if `np.savez` was given them without names."""
    names = [f"arr_{number}" for number in range(len(arrays))]
    return tuple(arrays[name] for name in names) if arrays.keys() == set(names) else arrays


def _print_predictions(given: argparse.Namespace) -> None:
    try:
        with open(given.input, "rb") as file:
            x = np.load(file, allow_pickle=False)
            x = x if isinstance(x, np.ndarray) else _parts(dict(x))
        confidence = float(given.confidence) if given.confidence not in (None, "fitted") else given.confidence
    except (ValueError, EOFError, BadZipFile) as error:  # the last two for empty or truncated files
        raise ExportError(
            f"Expected `--input` to be a .npy file of numbers and `--confidence` a number or 'fitted': {error}"
        ) from error
    ensemble = ExportedEnsemble.load(given.folder)
    budget = Budget(given.stages, given.macs, given.seconds, confidence, given.rule)
    prediction = ensemble.predict(x, budget)
    if given.output:
        np.save(given.output, prediction.logits, allow_pickle=False)
        return
    labels, real = ensemble.manifest["labels"], ensemble.manifest["task"] != "classification"
    for logits, stages, macs in zip(prediction.logits, prediction.stages, prediction.macs, strict=True):
        best = int(logits.argmax())
        answer = " ".join(f"{value:.6g}" for value in logits) if real else labels[best] if labels else best
        print(f"{answer}\tstages {stages}\tmacs {macs}")
