"""Run directories and the files in them: atomic writes, weights, checkpoints, module descriptions, provenance."""

from bdistil.storage.run_directory import RunDirectory
from bdistil.storage.weights import load_weights, save_weights

__all__ = ["RunDirectory", "load_weights", "save_weights"]
