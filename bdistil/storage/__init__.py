"""Run directories and the files in them: atomic writes, weights, checkpoints, module descriptions, provenance."""

from bdistil.storage.blueprint import describe, rebuild
from bdistil.storage.checkpoint import save_epoch
from bdistil.storage.files import atomic, disk_errors, write_atomically
from bdistil.storage.provenance import describe_start, differences
from bdistil.storage.run_directory import RunDirectory
from bdistil.storage.weights import load_weights, read_weights, save_weights

__all__ = [
    "RunDirectory",
    "atomic",
    "describe",
    "describe_start",
    "differences",
    "disk_errors",
    "load_weights",
    "read_weights",
    "rebuild",
    "save_epoch",
    "save_weights",
    "write_atomically",
]
