"""Pictures are drawn alike everywhere: without the backend of a notebook, and without the user's matplotlibrc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def drop_missing_backend() -> None:
    """Removes MPLBACKEND where it names a module that is not installed, or a backend that matplotlib does not know.

    The kernel of a notebook exports its own backend to the programs that it starts, also to those of another
    environment. matplotlib, and torchmetrics with it, could not be imported there.
    """
    name = os.environ.get("MPLBACKEND", "")
    if name and not (_is_installed(name) if name.startswith("module://") else _is_known(name)):
        del os.environ["MPLBACKEND"]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name.removeprefix("module://")) is not None
    except (ImportError, ValueError):  # not even its package
        return False


def _is_known(name: str) -> bool:
    """Whether matplotlib knows a backend, which it then takes; it cannot be imported while MPLBACKEND is unknown."""
    del os.environ["MPLBACKEND"]
    import matplotlib

    try:
        matplotlib.rcParams["backend"] = name
    except ValueError:
        return False
    finally:
        os.environ["MPLBACKEND"] = name
    return True


@contextmanager
def default_style() -> Iterator[None]:
    """Matplotlib's own defaults in place of the user's, which may ask for LaTeX or other fonts; also a decorator."""
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield
