"""Reproducible figures, independent of a notebook's matplotlib backend and of the user's matplotlibrc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def drop_missing_backend() -> None:
    """Unsets MPLBACKEND if it names a module that is not installed or a backend unknown to matplotlib.

    A notebook kernel exports its own backend to the programs it starts, even those of another environment, where
    importing matplotlib, and with it torchmetrics, would then fail.
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
    """Whether matplotlib knows a backend, which it then selects; it cannot be imported while MPLBACKEND is unknown."""
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
    """Context or decorator for matplotlib's own defaults; those of the user may require LaTeX or other fonts."""
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield
