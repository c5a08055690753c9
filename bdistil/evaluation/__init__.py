"""Evaluation of finished runs: accuracy within budgets, calibration, exit thresholds, early classification."""

from bdistil.evaluation.calibrate import ExitTarget, fit_anytime, fit_figures
from bdistil.evaluation.early import early_figures
from bdistil.evaluation.evaluate import evaluate_budgets, evaluate_outputs, sweep_budgets
from bdistil.evaluation.profile import profile_run

__all__ = [
    "ExitTarget",
    "early_figures",
    "evaluate_budgets",
    "evaluate_outputs",
    "fit_anytime",
    "fit_figures",
    "profile_run",
    "sweep_budgets",
]
