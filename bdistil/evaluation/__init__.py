"""Evaluation of finished runs: accuracy within budgets, costs, calibration, exit thresholds, early classification."""

from bdistil.evaluation.calibrate import fit_anytime
from bdistil.evaluation.early import early_figures
from bdistil.evaluation.evaluate import evaluate_budgets, profile_run, sweep_budgets
from bdistil.evaluation.thresholds import ExitTarget

__all__ = [
    "ExitTarget",
    "early_figures",
    "evaluate_budgets",
    "fit_anytime",
    "profile_run",
    "sweep_budgets",
]
