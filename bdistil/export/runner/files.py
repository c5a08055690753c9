"""The files of an exported folder, held to its manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "bdistil-export"


class ExportError(ValueError):
    """The folder, the input or the budget cannot be used; the message says what was expected, what came, the cure."""


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        ExportError: there is none, or it is torn, or of another format.
    """
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = (manifest["format"], manifest["version"]) == (FORMAT, 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"Expected {path} to be the manifest of an export, got {type(error).__name__}: {error}. Give the folder "
            "that `bdistil export` wrote, or export again."
        ) from error
    if not known:
        raise ExportError(f"Expected {path} of format {FORMAT} 1, got {manifest['format']} {manifest['version']}.")
    return dict(manifest)


def read_file(root: Path, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file that the manifest names, held to its size and sha256.

    Raises:
        ExportError: it lies elsewhere than in the folder, is missing, truncated or another file.
    """
    name, cure = entry["file"], "Copy the exported folder again, or export again."
    path = root / name
    if name != os.path.basename(name) or "\\" in name or name in ("", ".", "..") or path.is_symlink():
        raise ExportError(
            f"Expected a file of {root} itself in its manifest, got {name!r}: no path may leave it. {cure}"
        )
    if not path.is_file():
        raise ExportError(f"{path} is missing; expected {entry['bytes']} bytes, sha256 {entry['sha256']}. {cure}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        state = f"{len(data)} of {entry['bytes']} bytes" if len(data) < entry["bytes"] else "another file"
        raise ExportError(f"{path} is {state}: sha256 {found}, expected {entry['sha256']}. {cure}")
    return bytes(data)
