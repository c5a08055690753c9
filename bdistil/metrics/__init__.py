"""Quality of predictions, accuracy against cost, and what a model costs."""

from bdistil.metrics.classification import PrefixScores
from bdistil.metrics.cost import Cost, OutsideCost, as_written, latency_ms, measure_cost, training_macs
from bdistil.metrics.curve import area_under_curve, curve_figures, violations_of_monotony
from bdistil.metrics.regression import PrefixErrors, as_columns, output_figures, output_sums
from bdistil.metrics.task import Task, loss_name, score_name

__all__ = [
    "Cost",
    "OutsideCost",
    "PrefixErrors",
    "PrefixScores",
    "Task",
    "area_under_curve",
    "as_columns",
    "as_written",
    "curve_figures",
    "latency_ms",
    "loss_name",
    "measure_cost",
    "output_figures",
    "output_sums",
    "score_name",
    "training_macs",
    "violations_of_monotony",
]
