"""Quality of predictions, accuracy against cost, and the cost of a model."""

from bdistil.metrics.cost import Cost, OutsideCost, as_written, latency_ms, measure_cost, training_macs
from bdistil.metrics.curve import area_under_curve, curve_figures, violations_of_monotony
from bdistil.metrics.quality import (
    PrefixErrors,
    PrefixMetric,
    PrefixScores,
    Task,
    as_columns,
    loss_name,
    output_figures,
    output_sums,
    prefix_metric,
    score_name,
)

__all__ = [
    "Cost",
    "OutsideCost",
    "PrefixErrors",
    "PrefixMetric",
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
    "prefix_metric",
    "score_name",
    "training_macs",
    "violations_of_monotony",
]
