"""The two kinds of failure a user can meet; everything else is a bug."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Invalid input. The message names the argument, the expected and given values, and the fix; exit status 2."""


class RunError(RuntimeError):
    """A failure after a run has started. Committed rounds stay intact; exit status 1."""


def listed(names: Iterable[Any], shown: int = 3) -> str:
    """Text for an error message: the first `shown` names and the number of the others.

    >>> listed(["a", "b", "c", "d"], shown=2)
    'a, b and 2 more'
    """
    every = [str(name) for name in names]
    return ", ".join(every[:shown]) + (f" and {len(every) - shown:,} more" if len(every) > shown else "")
