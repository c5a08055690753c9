"""Settings of a boosting run, validated on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from bdistil.boosting.ledger.rows import Storage
from bdistil.errors import UserError
from bdistil.functional.boosting import gamma_of
from bdistil.metrics.quality import UNLABELLED, Task
from bdistil.models.student import Rung, Student

# Setting that error messages suggest where logits cannot be cached, as written in a script and in a recipe.
RECOMPUTE = "BoostingSettings(state='recompute') (model.boosting.state: recompute)"


def _default_ladder() -> list[Rung]:
    """No link, one link, then two links through a hidden joint layer."""
    return [Rung(0), Rung(1), Rung(2, "hidden")]


@dataclass(frozen=True)
class BoostingSettings:
    """Settings of a boosting run, besides its data, teacher and students.

    Attributes:
        rounds: T, the largest number of students.
        task: with `regression` outputs are real: R² replaces accuracy, rms error replaces cross entropy, and each
            output has its own unit. With `multilabel` a sample may have several labels, each output is the logit of
            one label, and mean average precision replaces accuracy.
        labels: key of the labels in batches that are mappings; None if a batch is x alone, without labels: scores then
            measure the agreement with the teacher.
        ignore_index: class number that marks a sample without a label, for example -1 or 255; such a sample is still
            distilled.
        eta: step size of the multiplicative-weights game; a larger value puts more weight on the samples with the
            largest running error.
        kappa: correction strength: a student aims at g - kappa S. 0 is plain averaging, 1 corrects the whole error.
            1 unless `gamma` is given.
        gamma: weight of the squared error against the barrier, as in the paper; an alternative to `kappa`.
        accept: `progress` requires that the prefix's rms error to the teacher on the validation part falls by more
            than `min_progress`; `margin` (the paper's) that a share `margin_share` of the outputs meets its margin.
        min_progress: relative decrease of the rms error that has to be exceeded.
        margin_share: q, share of the outputs that has to meet its margin.
        margin_tolerance: a margin of at least -margin_tolerance * b counts as met.
        ladder: the classes F_0 … F_R; a rejected round is trained again one rung higher.
        start: index in `ladder` at which every round after the first starts; the first round, which has nothing to
            link to, uses only the rungs without links.
        state: `cached` reads g and S from the ledger; `recompute` evaluates the teacher and all earlier students on
            each batch, for random augmentation.
        views: K: with random augmentation, K fixed views of each sample are cached, and epoch e trains on view
            e mod K. Costs K passes of the teacher, and the space of K - 1 more tables of g and linked features.
        storage: type of g and S on disk. `float16` halves the size of the ledger and rounds each number to 11 bits; the
            weights of the game are then off by up to 1e-3 after one round and 4e-3 after four.
        lr: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        schedule: learning rate schedule over the epochs of a round, or over its steps if `max_steps` ends it.
        keep_epoch: `best` commits the student of the epoch whose prefix had the smallest rms error to the teacher on
            the validation part, instead of that of the `last` epoch.
        loss: loss of a round. `game` is the paper's, squared error to the teacher and a log barrier on the margins.
            `prefix_kl` is the divergence of the whole prefix from the teacher, see `functional.prefix_kl_loss`, for
            classification only. `prefix_kl+game` replaces the squared error in it by the loss of the game, barrier
            included. `residual` is the squared error to g - S alone, as in gradient boosting.
        temperature: temperature of `prefix_kl`.
        residual_weight: weight of the squared error to g - S in `prefix_kl`, or of the game in `prefix_kl+game`.
        independent: train each student as in a first round, independently of the others: the baseline that averages
            independently distilled students. Requires a ladder without links.

    Raises:
        UserError: a value is out of range.

    Example:
        >>> settings = BoostingSettings(rounds=4, kappa=1.5, ladder=[Rung(0), Rung(1)])
        >>> [rung.name for rung in settings.rungs(1, links=True)]
        ['F1']
        >>> BoostingSettings(eta=0.0)
        Traceback (most recent call last):
        bdistil.errors.UserError: Expected `eta` of the boosting settings to be > 0 (0.5 is a good start), got 0.0.
    """

    rounds: int = 6
    task: Task = "classification"
    labels: str | None = "labels"
    ignore_index: int = UNLABELLED
    eta: float = 0.5
    kappa: float | None = None
    gamma: float | None = None
    accept: Literal["progress", "margin"] = "progress"
    min_progress: float = 0.002
    margin_share: float = 0.5
    margin_tolerance: float = 1e-3
    ladder: list[Rung] = field(default_factory=_default_ladder)
    start: int = 1
    state: Literal["cached", "recompute"] = "cached"
    views: int | None = None
    storage: Storage = "float32"
    lr: float = 1e-2
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    keep_epoch: Literal["last", "best"] = "last"
    loss: Literal["game", "prefix_kl", "prefix_kl+game", "residual"] = "game"
    temperature: float = 2.0
    residual_weight: float = 0.1
    independent: bool = False

    def __post_init__(self) -> None:
        if self.kappa is not None and self.gamma is not None:
            raise UserError(
                f"Expected `kappa` or `gamma`, got both ({self.kappa} and {self.gamma}): gamma = eta / (4 b kappa) "
                "is the same setting. Leave one out; `kappa` is the one to tune."
            )
        _require(self, "rounds", self.rounds >= 1, ">= 1")
        _require(self, "task", self.task in get_args(Task), "'classification', 'multilabel' or 'regression'")
        _require(self, "eta", self.eta > 0, "> 0 (0.5 is a good start)")
        _require(self, "kappa", self.kappa is None or self.kappa >= 0, ">= 0 (1 is a good start)")
        _require(self, "gamma", self.gamma is None or self.gamma > 0, "> 0")
        _require(self, "accept", self.accept in ("progress", "margin"), "'progress' or 'margin'")
        _require(self, "min_progress", 0 <= self.min_progress < 1, "in [0, 1)")
        _require(self, "margin_share", 0 <= self.margin_share <= 1, "in [0, 1]")
        _require(self, "margin_tolerance", self.margin_tolerance >= 0, ">= 0")
        _require(self, "ladder", len(self.ladder) > 0, "one rung or more")
        _require(self, "start", self.start >= 0, ">= 0")
        _require(self, "state", self.state in ("cached", "recompute"), "'cached' or 'recompute'")
        _require(self, "views", self.views is None or self.views >= 1, ">= 1, or left out")
        if self.views is not None and self.state == "recompute":
            raise UserError(
                f"Expected `views` or `state='recompute'`, got both (views={self.views}): fixed views are cached, "
                "recomputed state is not. Set `views` to None (null in a recipe), or `state` to 'cached'."
            )
        _require(self, "storage", self.storage in ("float32", "float16"), "'float32' or 'float16'")
        _require(self, "lr", self.lr > 0, "> 0")
        _require(self, "weight_decay", self.weight_decay >= 0, ">= 0")
        losses = ("game", "prefix_kl", "prefix_kl+game", "residual")
        _require(self, "loss", self.loss in losses, " or ".join(map(repr, losses)))
        if self.loss.startswith("prefix_kl") and self.task != "classification":
            raise UserError(
                f"Expected `loss` of the boosting settings to be 'game' or 'residual' for task {self.task!r}, got "
                f"{self.loss!r}: a divergence needs the probabilities of classes."
            )
        if self.task == "regression" and self.ignore_index != UNLABELLED:
            raise UserError(
                f"Expected no `ignore_index` for task 'regression', whose labels are real numbers, got "
                f"{self.ignore_index}. Leave samples without a label out of the data."
            )
        alone = not self.independent or all(rung.links == 0 for rung in self.ladder)
        _require(self, "ladder", alone, "rungs with links=0 for independent students")
        _require(self, "temperature", self.temperature > 0, "> 0 (2 is a good start)")
        _require(self, "residual_weight", self.residual_weight >= 0, ">= 0")
        _require(self, "schedule", self.schedule in ("cosine", "constant"), "'cosine' or 'constant'")
        _require(self, "keep_epoch", self.keep_epoch in ("last", "best"), "'last' or 'best'")

    def gamma_for(self, bound: float) -> float:
        """Gamma of the loss: `gamma` if set, otherwise computed from eta, kappa and `bound`, b = 2 max|g|."""
        if self.gamma is not None:
            return self.gamma
        return gamma_of(self.eta, 1.0 if self.kappa is None else self.kappa, bound)

    @property
    def cached_links(self) -> int:
        """Number of preceding students whose activations are cached for links; 0 if state is recomputed."""
        return 0 if self.state == "recompute" else max(rung.links for rung in self.ladder)

    def cached_keys(self, student: Student) -> list[int]:
        """Keys of a student's stage activations that are cached because a rung may read them."""
        if self.state == "recompute" or student.staged is None:
            return []
        return [key for key in student.staged.keys if any(rung.may_read(key) for rung in self.ladder)]

    def rungs(self, number: int, *, links: bool) -> Sequence[Rung]:
        """Classes of students that a round may try, in order.

        Args:
            number: index of the round, from 0.
            links: whether students take links; without links only the rungs with `links=0` are tried, or F_0.
        """
        if number == 0 or not links:
            bare = [rung for rung in self.ladder if rung.links == 0]
            return bare or [Rung(0)]
        return self.ladder[min(self.start, len(self.ladder) - 1) :]

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)


def _require(settings: BoostingSettings, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"Expected `{name}` of the boosting settings to be {allowed}, got {getattr(settings, name)!r}.")
