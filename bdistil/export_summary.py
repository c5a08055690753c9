"""What was exported, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def export_summary(manifest: Mapping[str, Any], output: Path) -> str:
    """What was exported, as a table: a stage a row."""
    parity = manifest["parity"]
    lines = [f"{'stage':>5} {'macs':>12} {'bytes':>10} {'difference':>11}"]
    for number, (stage, found) in enumerate(zip(manifest["stages"], parity["differences"], strict=True), 1):
        lines.append(f"{number:>5} {stage['macs']:>12,} {stage['bytes']:>10,} {found:>11.1e}")
    lines.append(f"\nDifferences to PyTorch on {parity['samples']} samples of {parity['source']}.")
    if manifest["kind"] == "executorch":
        lines.append("The bytes are those of the one file in which each stage is a method; it reads one sample a call.")
    if int8 := manifest["quantised"]:
        lines.append("Accuracy of the prefixes on the validation part, and bytes of all stages:")
        for name in ("float", "int8"):
            figures = "  ".join(f"{accuracy:.4f}" for accuracy in int8[name]["accuracy"])
            lines.append(f"  {name:<6} {figures}  {int8[name]['bytes']:>12,}")
    if fused := manifest["fused"]:
        lines += _fused_lines(fused)
    return "\n".join([*lines, f"{output}"])


def _fused_lines(fused: Mapping[str, Any]) -> list[str]:
    """Latency of the stages and of the graphs of several."""
    lines = []
    for batch, found in fused["latency"].items():
        plain, together = (" ".join(f"{v:.3f}" for v in np.atleast_1d(found[k])) for k in ("stages_ms", "fused_ms"))
        lines.append(f"Batch {batch}: {plain} ms by stages, {together} ms by --fuse {fused['kind']}.")
    when = "one sample that may leave" if fused["kind"] == "exits" else "a whole run"
    return [*lines, f"For {when} the runner takes {fused['kind'] if fused['faster'] else 'stages'}."]
