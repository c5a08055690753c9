"""MEKD: distillation from a black-box teacher (an API) through a generator, in two stages.

Stage 1, `Deprivatization`, trains a GAN on local unlabelled samples; its generator emulates the inverse of the teacher.
Stage 2, `MappingEmulation`, freezes the generator and trains a student so that its answers and the teacher's map to the
same samples. `Emulation` runs both. "Aligning Logits Generatively for Principled Black-Box Knowledge Distillation",
arXiv 2205.10490.
"""

from bdistil.distillation.mekd.deprivatization import Deprivatization
from bdistil.distillation.mekd.mapping_emulation import MappingEmulation
from bdistil.distillation.mekd.run import Emulation, Mekd

__all__ = ["Deprivatization", "Emulation", "MappingEmulation", "Mekd"]
