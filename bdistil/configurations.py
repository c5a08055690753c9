"""Two configurations side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(there: Mapping[str, Any], now: Mapping[str, Any], ignore: Sequence[str] = ()) -> str:
    """A line for each key whose values differ, or that only one of two configurations has; "" where they are the same.

    Args:
        there: nested plain values.
        now: likewise.
        ignore: dotted prefixes of keys that may differ.
    """
    old, new = flatten(there), flatten(now)
    keys = sorted(key for key in old | new if not key.startswith(tuple(ignore)) and old.get(key) != new.get(key))
    lines = (f"  {key}: {old.get(key, '(absent)')!r} there, {new.get(key, '(absent)')!r} now" for key in keys)
    return "\n".join(lines)
