"""Anytime inference with an ordered ensemble of students."""

from bdistil.ensemble.budget import Budget, Prediction, confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures, load_calibration, save_calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies, restore_student
from bdistil.ensemble.stage_clock import BatchTimes
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
    "confidence_of",
    "load_calibration",
    "measure_times",
    "prefix_accuracies",
    "restore_student",
    "save_calibration",
]
