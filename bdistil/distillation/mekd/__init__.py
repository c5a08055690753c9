"""MEKD: distillation from an API through a generator that emulates the inverse of the teacher, in two stages.

Stage 1, `Deprivatization`, trains a GAN on local unlabelled samples. Stage 2, `MappingEmulation`, freezes the generator
and trains a student so that its answers and the teacher's become the same samples when they are put through it.
"""

from bdistil.distillation.mekd.deprivatization import Deprivatization
from bdistil.distillation.mekd.mapping_emulation import MappingEmulation

__all__ = ["Deprivatization", "MappingEmulation"]
