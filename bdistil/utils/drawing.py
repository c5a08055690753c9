"""Pictures are drawn alike everywhere: without the backend of a notebook, and without the user's matplotlibrc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def drop_missing_backend() -> None:
    """Removes MPLBACKEND where it names a module that is not installed.

    The kernel of a notebook exports its own backend to the programs that it starts, also to those of another
    environment. matplotlib, and torchmetrics with it, could not be imported there.
    """
    name = os.environ.get("MPLBACKEND", "")
    module = name.removeprefix("module://")
    if module == name:
        return
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # not even its package
        found = None
    if found is None:
        del os.environ["MPLBACKEND"]


@contextmanager
def default_style() -> Iterator[None]:
    """Matplotlib's own defaults in place of the user's, which may ask for LaTeX or other fonts; also a decorator."""
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield
