"""Distillation of a single student, without rounds; diagnostics and per-sample loss mixing."""

from bdistil.distillation.gradient_noise import noise_figures
from bdistil.distillation.last_layer import Distilling
from bdistil.distillation.loss_mixing import MixingSettings
from bdistil.distillation.mixing_store import MixingStore
from bdistil.distillation.module import Distillation, generations

__all__ = [
    "Distillation",
    "Distilling",
    "MixingSettings",
    "MixingStore",
    "generations",
    "noise_figures",
]
