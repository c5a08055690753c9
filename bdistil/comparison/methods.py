"""The methods of a comparison, as options of `bdistil fit`, and the cells of its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bdistil.boosting.settings import BoostingSettings
from bdistil.comparison.students import PlannedStudents
from bdistil.errors import UserError
from bdistil.models.student import Rung

Method = Literal["bdistil", "no_resched", "resched", "links_only", "residual", "joint", "teacher"]
METHODS: tuple[Method, ...] = get_args(Method)[:-1]  # the teacher is in every table
# Description of each method in the report.
MEANING: dict[str, str] = {
    "bdistil": "the recipe",
    "no_resched": "for each prefix one student of as many MACs, trained for as many epochs as one of its students "
    "(the oracle); of the recipe's loss and the game the one that is better on the validation part, "
    "with the training costs of both",
    "resched": "students of the first one's form, distilled independently of each other, and averaged",
    "links_only": "the recipe's students and links without correction: the game with kappa = 0",
    "residual": "the recipe's students and links, each trained on the squared error to g - S",
    "joint": "all students of the recipe at once, on the sum of the losses of their prefixes (a multi-exit network)",
    "teacher": "the teacher",
}
# Baselines are never rejected, so that each of them has all prefixes.
ACCEPTED = {"accept": "margin", "margin_share": 0.0}

Kind = Literal["teacher", "rounds", "joint"]


@dataclass(frozen=True)
class Cell:
    """One training of a comparison, with its own run directory and process.

    Attributes:
        method: method that it belongs to.
        seed: seed of the run.
        prefix: number of the prefix whose MACs its single student matches; 0 for an ensemble.
        name: prefix of the folder name.
        kind: kind of the process.
        boosting: settings that differ from the recipe's.
    """

    method: str
    seed: int
    name: str
    prefix: int = 0
    kind: Kind = "rounds"
    boosting: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, output: Path) -> Path:
        """The run directory."""
        return output / "runs" / f"{self.name}-seed{self.seed}"

    def options(self, output: Path) -> list[str]:
        """Options of `bdistil fit` after those of the recipe."""
        run = {"run_dir": str(self.folder(output)), "seed_everything": self.seed, "tracking.job_type": "compare"}
        run |= {"tracking.group": output.resolve().name, "tracking.name": self.folder(output).name}
        settings = {f"model.boosting.{key}": value for key, value in self.boosting.items()}
        return [f"--{key}={json.dumps(v) if not isinstance(v, str) else v}" for key, v in {**run, **settings}.items()]


TEACHER = Cell("teacher", 0, "teacher", kind="teacher")  # all methods and seeds share it


def check_methods(methods: Sequence[str]) -> list[Method]:
    """Returns the methods to train besides the teacher, without duplicates.

    Raises:
        UserError: a method is unknown, or there is none.
    """
    given = [method for method in dict.fromkeys(methods) if method != "teacher"]
    known = [method for method in METHODS if method in given]
    if len(known) != len(given) or not given:
        raise UserError(f"Expected `methods` to be some of {', '.join(METHODS)}, got {', '.join(methods) or 'none'}.")
    return sorted(known, key=given.index)


def cells_of(method: Method, seed: int, settings: BoostingSettings, planned: PlannedStudents) -> list[Cell]:
    """The cells of a method and a seed.

    Args:
        method: method of the comparison.
        seed: seed of the runs.
        settings: settings of the recipe.
        planned: the students.
    """
    if method == "no_resched":
        return _single_students(seed, settings, planned)
    changed: dict[str, dict[str, Any]] = {
        "bdistil": {},
        "resched": {"independent": True, "ladder": [asdict(planned.first)], "start": 0, **ACCEPTED},
        "links_only": {"loss": "game", "kappa": 0.0, "gamma": None, **ACCEPTED},
        "residual": {"loss": "residual", **ACCEPTED},
        "joint": {},
    }
    return [Cell(method, seed, method, kind="joint" if method == "joint" else "rounds", boosting=changed[method])]


def _single_students(seed: int, settings: BoostingSettings, planned: PlannedStudents) -> list[Cell]:
    """One student per prefix, or two if the loss of the recipe is not the game."""
    losses = dict.fromkeys((settings.loss, "game"))
    return [
        Cell(
            "no_resched", seed, f"no_resched-{prefix}" + ("" if loss == settings.loss else f"-{loss}"), prefix,
            boosting={"rounds": 1, "loss": loss, "ladder": [asdict(Rung(0, width=width))], **ACCEPTED},
        )
        for loss in losses
        for prefix, width in enumerate(planned.single_widths, 1)
    ]  # fmt: skip
