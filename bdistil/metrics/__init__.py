"""Quality of predictions, accuracy against cost, and the cost of a model."""

from bdistil.metrics.cost import Cost, OutsideCost, latency_ms, measure_cost, training_macs
from bdistil.metrics.curve import area_under_curve, violations_of_monotony
from bdistil.metrics.quality import PrefixErrors, PrefixScores

__all__ = [
    "Cost",
    "OutsideCost",
    "PrefixErrors",
    "PrefixScores",
    "area_under_curve",
    "latency_ms",
    "measure_cost",
    "training_macs",
    "violations_of_monotony",
]
