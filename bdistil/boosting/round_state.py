"""Where the round under way is: what a checkpoint keeps of it, as plain numbers, for it is read with weights_only."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from bdistil.errors import RunError


@dataclass
class RoundState:
    """Progress of one try of one round.

    Attributes:
        number: the round, from 0.
        attempt: the rung of the ladder that is tried, from 0.
        done: the last epoch is over, only the verdict is missing.
        epochs: finished ones.
        samples_seen: by all processes.
        seconds: wall time before this start.
    """

    number: int = 0
    attempt: int = 0
    done: bool = False
    epochs: int = 0
    samples_seen: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Wall seconds of this round, those before a restart included."""
        return self.seconds + time.perf_counter() - self._started

    def plain(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self) | {"seconds": self.elapsed()}

    def load(self, kept: dict[str, Any]) -> None:
        """Goes on where a checkpoint of this try was written.

        Raises:
            RunError: the checkpoint is of another one.
        """
        found, wanted = (kept["number"], kept["attempt"]), (self.number, self.attempt)
        if found != wanted:
            raise RunError(
                f"A checkpoint of (round, try) {found} was offered to {wanted}. Fit with "
                "ckpt_path=controller.ckpt_path; under SLURM give each round's Trainer a default_root_dir of its own."
            )
        for field in fields(self):
            setattr(self, field.name, kept[field.name])
