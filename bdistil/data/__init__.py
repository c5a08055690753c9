"""Data modules of the shipped recipes, each imported from its own file, and two for the user's own files."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdistil.data.arrays import Arrays
    from bdistil.data.folders import ImageFolder

__all__ = ["Arrays", "ImageFolder"]


def __getattr__(name: str) -> Any:
    """Imports a data module on first use, so that the loaders in this folder work without torchvision."""
    homes = {"Arrays": "arrays", "ImageFolder": "folders"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
