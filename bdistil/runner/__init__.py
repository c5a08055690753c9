"""Runs an exported ensemble with onnxruntime and numpy alone; every exported folder holds a copy of this package.

Its modules `exits` and `stage_clock` also serve the ensembles in torch. It imports nothing else of bdistil.

    python FOLDER/runner --input x.npy --confidence 0.9

A folder holds JSON and ONNX graphs; nothing that is loaded is executed as code. Every graph must match the size and
sha256 in the manifest and lie in the folder itself. The manifest is not signed: changing it can change the answers.
"""

from .budget import Budget, ExportError, Prediction, Stage
from .confidence import RULES, Array, confidence_of
from .ensemble import ExportedEnsemble
from .exits import ALWAYS, Exits
from .graphs import Graph
from .stage_clock import BatchTimes, StageClock

__all__ = [
    "ALWAYS",
    "RULES",
    "Array",
    "BatchTimes",
    "Budget",
    "Exits",
    "ExportError",
    "ExportedEnsemble",
    "Graph",
    "Prediction",
    "Stage",
    "StageClock",
    "confidence_of",
]
