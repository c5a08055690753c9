"""Provenance of a run: where it was started, and whether its configuration is still the same."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from bdistil.utils.packages import installed_versions

PACKAGES = ("bdistil", "torch", "lightning", "numpy", "safetensors", "timm", "torchmetrics", "wandb")
# Environment variables by which a launcher is recognised, and others that are recorded.
LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "SLURM_STEP_ID": "srun"}
RECORDED = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "CUDA_VISIBLE_DEVICES")


def describe_start() -> dict[str, Any]:
    """Describes this start of a run as plain values: versions, host, launcher, processes, revision of the code."""
    environ = os.environ
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
        "launcher": next((name for key, name in LAUNCHERS.items() if key in environ), "none"),
        "processes": int(environ.get("WORLD_SIZE") or environ.get("SLURM_NTASKS") or 1),
        "variables": {key: environ[key] for key in RECORDED if key in environ},
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": installed_versions(PACKAGES),
        "revision": _revision(),
    }


def _revision() -> str | None:
    """Git commit of the working directory, with a + for uncommitted changes; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested mapping into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(there: Mapping[str, Any], now: Mapping[str, Any], ignore: Sequence[str] = ()) -> str:
    """Lists the differences between two nested configurations, one line per key; "" if they agree.

    The dotted keys in `ignore`, and all below them, may differ.

    >>> differences({"tracking": {"tags": 1}}, {"tracking": {"tags": 2}, "tracking_loss": 3}, ["tracking"])
    "  tracking_loss: '(absent)' there, 3 now"
    """
    old, new, sections = flatten(there), flatten(now), tuple(f"{key}." for key in ignore)
    keys = sorted(key for key in old | new if not f"{key}.".startswith(sections) and old.get(key) != new.get(key))
    lines = (f"  {key}: {old.get(key, '(absent)')!r} there, {new.get(key, '(absent)')!r} now" for key in keys)
    return "\n".join(lines)


def updated(config: dict[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Copies dotted keys from a new nested configuration into `config`; returns whether any value has changed.

    >>> config = {"boosting": {"rounds": 2}}
    >>> updated(config, {"boosting": {"rounds": 3}}, ["boosting.rounds", "model.boosting.rounds"]), config
    (True, {'boosting': {'rounds': 3}})
    """
    values, changed = flatten(new), False
    for key in keys:
        *sections, name = key.split(".")
        place: Any = config
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if key in values and isinstance(place, dict) and place.get(name) != values[key]:
            place[name], changed = values[key], True
    return changed
