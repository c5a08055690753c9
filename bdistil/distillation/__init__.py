"""Distillation of a single student, per-sample loss mixing and measurement of the gradient noise."""

from bdistil.distillation.last_layer import Distilling
from bdistil.distillation.module import Distillation, WeightSetter, generations
from bdistil.functional.loss_mixing import MixingSettings

__all__ = [
    "Distillation",
    "Distilling",
    "MixingSettings",
    "WeightSetter",
    "generations",
]
