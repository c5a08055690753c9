"""Reproducible figures, independent of a notebook's matplotlib backend and of the user's matplotlibrc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def drop_missing_backend() -> None:
    """Unsets MPLBACKEND if it names a module that is not installed.

    A notebook kernel exports its own backend to the programs it starts, even those of another environment, where
    importing matplotlib, and with it torchmetrics, would then fail.
    """
    name = os.environ.get("MPLBACKEND", "")
    if name.startswith("module://") and not _is_installed(name.removeprefix("module://")):
        del os.environ["MPLBACKEND"]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # not even its package
        return False


@contextmanager
def default_style() -> Iterator[None]:
    """Context or decorator for matplotlib's own defaults; those of the user may require LaTeX or other fonts."""
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield
