"""Runs an exported ensemble with onnxruntime and numpy alone; a copy of this package lies in every exported folder.

    python FOLDER/runner --input x.npy --confidence 0.9

Nothing that is loaded is executed as code: a folder holds JSON and ONNX graphs. Every graph is held to the size and
sha256 that the manifest gives, and must lie in the folder itself. Who can change the manifest can change the answers.
"""

from .budget import RULES, Array, Budget, Prediction, Stage, confidence_of
from .ensemble import ExportedEnsemble
from .files import ExportError
from .graphs import Graph
from .stage_clock import Clock, Times
from .stages import ALWAYS, ExitRule

__all__ = [
    "ALWAYS",
    "RULES",
    "Array",
    "Budget",
    "Clock",
    "ExitRule",
    "ExportError",
    "ExportedEnsemble",
    "Graph",
    "Prediction",
    "Stage",
    "Times",
    "confidence_of",
]
