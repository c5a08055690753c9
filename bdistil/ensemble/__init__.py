"""Anytime inference with an ordered ensemble of students."""

from bdistil.ensemble.budget import Budget, Prediction, confidence_of
from bdistil.ensemble.calibration import Calibration, load_calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.stages import Stage

__all__ = ["Budget", "Calibration", "Prediction", "ProgressiveEnsemble", "Stage", "confidence_of", "load_calibration"]
