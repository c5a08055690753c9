"""Pickled NumPy arrays of published data sets, read without executing what the file says."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from bdistil.errors import UserError


def _latin1(text: str, encoding: str) -> bytes:
    """Text as bytes, in the one encoding that pickled arrays use."""
    if encoding != "latin1":
        raise UserError(f"it asks for the encoding {encoding!r}, which no file of arrays does")
    return text.encode("latin1")


# All that a pickled array needs. `numpy.core` is what old files name; NumPy 2 has it as `numpy._core`.
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes in a form that Python 2 can read
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core", 1)
        if (module, name) not in _ALLOWED:
            raise UserError(f"it names {module}.{name}, which no file of arrays does, so it is not to be trusted")
        return _ALLOWED[module, name]


def load_arrays(file: IO[bytes]) -> Any:
    """What a pickle holds: plain values and NumPy arrays, strings of Python 2 as latin1. It can name nothing else.

    Raises:
        UserError: it names something else, or it is damaged; the message says why and not which file.
    """
    try:
        return _ArrayUnpickler(file, encoding="latin1").load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"it is no whole pickle ({type(error).__name__}: {error})") from error
