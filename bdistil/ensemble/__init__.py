"""Anytime inference with an ordered ensemble of students."""

from bdistil.ensemble.budget import Budget, Prediction
from bdistil.ensemble.calibration import BatchTimes, Calibration, ExitFigures
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.exit_rules import confidence_of
from bdistil.ensemble.restore import build_student, restore_student
from bdistil.ensemble.scores import prefix_accuracies
from bdistil.ensemble.stages import Stage
from bdistil.ensemble.timing import measure_times

__all__ = [
    "BatchTimes",
    "Budget",
    "Calibration",
    "ExitFigures",
    "Prediction",
    "ProgressiveEnsemble",
    "Stage",
    "build_student",
    "confidence_of",
    "measure_times",
    "prefix_accuracies",
    "restore_student",
]
