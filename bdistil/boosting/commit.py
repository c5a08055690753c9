"""The end of a round: the verdict on its student, and what is written of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bdistil.boosting.acceptance import Verdict
from bdistil.boosting.curve_rows import dtype_of, round_training_macs, shape_of, stage_row
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.round_state import RoundState
from bdistil.boosting.run import Boosting
from bdistil.metrics.curve import curve_figures
from bdistil.metrics.quality import score_name
from bdistil.models.student import Rung, links_of
from bdistil.storage.blueprint import IndescribableError, describe
from bdistil.storage.files import disk_errors
from bdistil.utils import distributed


def close_round(
    boosting: Boosting, module: BoostingRound, state: RoundState, device: torch.device, *, steps: int
) -> dict[str, Any] | None:
    """Judges the student of a round; commits it, or sends the round to a wider class.

    Args:
        boosting: the run.
        module: the round, trained.
        state: its progress.
        device: where the student is.
        steps: optimizer steps of the round.

    Returns:
        The row of the curve; None when the student was rejected.

    Raises:
        RunError: NaN or infinity among the student's logits, or the disk refused.
    """
    distributed.share(module.student.buffers())  # each rank has batch statistics of its own; that of 0 is committed
    with disk_errors(f"round {module.number}", boosting.run.root):
        verdict = judge(boosting, module, device)
    name = f"Round {module.number + 1} of {boosting.settings.rounds}, class {boosting.rung.name}"
    if not verdict.accepted:
        then = "A wider class is tried." if _reject(boosting, module.number, verdict) else "Boosting stops."
        rank_zero_info(f"{name}: rejected, {verdict.reason}. {then}")
        return None
    row, what = _row(boosting, module, verdict, state), score_name(boosting.settings.task).capitalize()
    _commit(boosting, module, verdict, row, epochs=state.epochs, steps=steps)
    rank_zero_info(
        f"{name}: accepted, {verdict.reason}. {what} of the prefix {verdict.accuracy:.4f} on validation, "
        f"{row['macs']:,} MACs."
    )
    return row


def judge(boosting: Boosting, module: BoostingRound, device: torch.device) -> Verdict:
    """One pass over the training part and one over the validation part: is the student accepted?

    Raises:
        RunError: NaN or infinity among the student's logits.
    """
    earlier, settings = boosting.students, boosting.settings
    validation, accuracy, loss = boosting.val.score(module.student, earlier, device, settings)
    training, _, _ = boosting.train.score(module.student, earlier, device, settings)
    accepted, reason = boosting.decide(module.number, training, validation)
    return Verdict(accepted, reason, training, validation, accuracy, loss)


def _row(boosting: Boosting, module: BoostingRound, verdict: Verdict, state: RoundState) -> dict[str, Any]:
    """The row of the prefix that ends with this round."""
    teacher, *prefixes = boosting.run.rows()
    kind = boosting.rung if links_of(module.student) else Rung(0, width=boosting.rung.width)
    for student in boosting.students:
        student.cpu()
    asked = teacher["macs"] if boosting.recompute else 0
    spent = round_training_macs(
        module.student, boosting.cost, boosting.students, boosting.example, state.samples_seen, asked
    )  # fmt: skip
    row = {
        **stage_row(module.number, prefixes[-1] if prefixes else teacher, boosting.cost, verdict),
        "train_macs": spent,
        "latency_ms": boosting.latency,
        "seconds": state.elapsed(),
        "accepted_class": kind.name,
    }
    curve = [*prefixes, row]
    return row | curve_figures([r["macs"] for r in curve], [r["val_accuracy"] for r in curve])


def _commit(boosting: Boosting, module: BoostingRound, verdict: Verdict, row: Mapping[str, Any], **extra: int) -> None:
    """Student, S and metrics: all of it, or nothing."""
    for part in (boosting.train, boosting.val):
        part.keep(module.student, module.number)
    if distributed.rank() == 0:
        plan, tensors, why = _described(module.student)
        record = {
            "round": module.number,
            "reason": verdict.reason,
            "tries": boosting.run.tries(module.number),
            "rung": asdict(boosting.rung),
            "scale": boosting.train.ledger.head.scale,
            "offset": boosting.train.ledger.head.offset,
            "input_shape": shape_of(boosting.example),
            "input_dtype": dtype_of(boosting.example),
            "curve": dict(row),
            "evidence": {"training": asdict(verdict.training), "validation": asdict(verdict.validation)},
            "uncounted": boosting.cost.uncounted,
            **extra,
            "indescribable": why,
            "blueprint": plan,
        }
        boosting.run.commit(module.number, tensors, record)
        boosting.run.write_curve(boosting.run.rows())
    distributed.barrier()


def _reject(boosting: Boosting, number: int, verdict: Verdict) -> bool:
    """Records a rejected try; stops the run when the ladder has no rung left. Says whether it goes on."""
    last = boosting.attempt + 1 >= len(boosting.settings.rungs(number, links=boosting.takes_links))
    if distributed.rank() == 0:
        boosting.run.reject(number, f"{boosting.rung.name}: {verdict.reason}")
        if last:
            boosting.stop(number, verdict.reason)
    distributed.barrier()
    return not last


def _described(student: nn.Module) -> tuple[dict[str, Any] | None, dict[str, Tensor], str | None]:
    """Structure and tensors of a student; without the structure, and why, where JSON cannot say it."""
    try:
        plan, tensors = describe(student)
    except IndescribableError as error:
        return None, {name: value.clone() for name, value in student.state_dict().items()}, str(error)
    return plan, tensors, None
