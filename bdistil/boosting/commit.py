"""The end of a round: the verdict on its student, the row of the curve, and the commit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from bdistil.boosting.costs import linked_activations_macs, student_latency
from bdistil.boosting.ledger.records import RoundEvidence
from bdistil.boosting.round import RoundState
from bdistil.boosting.run import Boosting, RoundPlan
from bdistil.boosting.settings import BoostingSettings
from bdistil.metrics.cost import training_macs
from bdistil.metrics.curve import curve_figures
from bdistil.metrics.quality import score_name
from bdistil.models.student import Rung, link_macs, links_of
from bdistil.storage.blueprint import IndescribableError, describe
from bdistil.storage.files import disk_errors
from bdistil.utils import distributed


@dataclass(frozen=True)
class Verdict:
    """Decision on a trained student and its evidence; accuracy and loss are those of the prefix on validation."""

    accepted: bool
    reason: str
    training: RoundEvidence
    validation: RoundEvidence
    accuracy: float
    loss: float


def decide(
    settings: BoostingSettings, number: int, training: RoundEvidence, validation: RoundEvidence
) -> tuple[bool, str]:
    """Decides whether to accept the student of a round and gives the reason; evidence and result agree on all ranks.

    With `accept="progress"` the prefix's rms error to the teacher on the validation part has to fall by more than
    `min_progress`, relative to the previous prefix; with "margin", a relaxed form of the paper's condition, a share
    `margin_share` of the outputs has to meet its margin on the training part.
    """
    if number == 0:
        return True, "the first round is always accepted"
    if settings.accept == "margin":
        share, required = training.margin_share, settings.margin_share
        relation = "at least" if share >= required else "less than"
        return share >= required, f"{share:.0%} of the outputs meet their margin, {relation} {required:.0%}"
    before, after, minimum = validation.rms_before, validation.rms_after, settings.min_progress
    fall = 1.0 - after / before if before > 0 else 0.0
    verdict, change = "fell" if fall > minimum else "did not fall", f"{before:.4f} -> {after:.4f}, {-fall:+.2%}"
    return fall > minimum, f"rms error to the teacher {verdict} by more than {minimum:g}: {change}"


def close_round(
    boosting: Boosting, plan: RoundPlan, state: RoundState, device: torch.device, *, steps: int
) -> dict[str, Any] | None:
    """Evaluates the trained student of a round; commits it, or records that it was rejected.

    Args:
        boosting: the run.
        plan: the round.
        state: progress of the round.
        device: device of the student.
        steps: number of optimizer steps of the round.

    Returns:
        The row of the curve; None if the student was rejected.

    Raises:
        RunError: NaN or infinity among the student's logits, or a disk error.
    """
    number, settings = plan.module.number, boosting.settings
    distributed.broadcast(plan.module.student.buffers())  # batch statistics differ; those of process 0 are committed
    with disk_errors(f"round {number + 1}", boosting.run.root):
        verdict = _evaluate(settings, plan, device)
    name = f"Round {number + 1} of {settings.rounds}, class {plan.rung.name}"
    if not verdict.accepted:
        then = "A wider class is tried." if _reject(boosting, plan, verdict.reason, state, steps) else "Boosting stops."
        rank_zero_info(f"{name}: rejected, {verdict.reason}. {then}")
        return None
    row = _curve_row(boosting, plan, verdict, state, device)
    _commit(boosting, plan, verdict, row, epochs=state.epochs, steps=steps)
    rank_zero_info(
        f"{name}: accepted, {verdict.reason}. {score_name(settings.task).capitalize()} of the prefix "
        f"{verdict.accuracy:.4f} on validation, {row['macs']:,} MACs."
    )
    return row


def _evaluate(settings: BoostingSettings, plan: RoundPlan, device: torch.device) -> Verdict:
    """Scores the student in one pass each over the validation part, the training part and every view of it."""
    module, parts = plan.module, plan.checked.parts
    validation, accuracy, loss = parts.val.score(module.student, module.earlier, device)
    training, _, _ = parts.train.score(module.student, module.earlier, device)
    for view in parts.views:
        view.score(module.student, module.earlier, device)
    accepted, reason = decide(settings, module.number, training, validation)
    return Verdict(accepted, reason, training, validation, accuracy, loss)


def _curve_row(
    boosting: Boosting, plan: RoundPlan, verdict: Verdict, state: RoundState, device: torch.device
) -> dict[str, Any]:
    """Row of the prefix that ends with this round: MACs and parameters are cumulative, other costs of this round."""
    module, cost = plan.module, plan.cost
    latency = student_latency(module.student, module.earlier, plan.checked.example, device)
    _, *prefixes = boosting.run.rows()
    before = prefixes[-1] if prefixes else {"macs": 0, "params": 0}
    row = {
        "stage": module.number + 1,
        "macs": before["macs"] + cost.macs,
        "link_macs": link_macs(cost.by_module),
        "params": before["params"] + cost.params,
        "train_macs": _training_macs(boosting, plan, state),
        "val_accuracy": verdict.accuracy,
        "val_loss": verdict.loss,
        "latency_ms": latency,
        "seconds": state.elapsed(),
        "accepted_class": (plan.rung if links_of(module.student) else Rung(0, width=plan.rung.width)).name,
        "margin_share": verdict.training.margin_share,
        "reason": verdict.reason,
        "margin_min": verdict.training.margin_min,
        "rms_error": verdict.validation.rms_after,
        "sup_error": verdict.validation.sup_after,
        "activation_bytes": cost.activation_bytes,
    }  # fmt: skip
    curve = [*prefixes, row]
    return row | curve_figures([r["macs"] for r in curve], [r["val_accuracy"] for r in curve])


def _training_macs(boosting: Boosting, plan: RoundPlan, state: RoundState) -> int:
    """Training MACs of one try of a round: of its student, and of whatever it reads that is not cached.

    Moves the earlier students to the CPU.
    """
    module, example = plan.module, plan.checked.example
    for student in module.earlier:
        student.cpu()
    teacher_macs = earlier_macs = 0
    if boosting.settings.state == "recompute":
        teacher, *prefixes = boosting.run.rows()
        teacher_macs, earlier_macs = teacher["macs"], prefixes[-1]["macs"] if prefixes else 0
    elif links_of(module.student) and not module.reads_cache(plan.checked.parts.train):
        earlier_macs = linked_activations_macs(module.student, module.earlier, example)
    seen = state.samples_seen
    return training_macs(
        student=plan.cost.macs, links=earlier_macs, samples_seen=seen, teacher=teacher_macs, teacher_samples=seen
    )


def _commit(boosting: Boosting, plan: RoundPlan, verdict: Verdict, row: dict[str, Any], **counts: int) -> None:
    """Commits student, S and metrics together, or none of them."""
    run, parts, number = boosting.run, plan.checked.parts, plan.module.number
    for part in parts:
        part.publish(plan.module.student, number)
    if distributed.rank() == 0:
        for module in plan.module.student.modules():
            if isinstance(module, pl.LightningModule):
                module.trainer = None  # Lightning gave it that of the round, which cannot be described
        why, tensors, blueprint = None, plan.module.student.state_dict(), None
        try:
            blueprint, tensors = describe(plan.module.student)
        except IndescribableError as error:
            buffers = dict(plan.module.student.named_buffers())  # also those outside the state dict
            why, tensors = str(error), {name: value.clone() for name, value in {**buffers, **tensors}.items()}
        head = parts.train.ledger.head
        record = {
            "round": number,
            "reason": verdict.reason,
            "tries": run.tries(number),
            "spent_on_tries": run.spent(number),
            "rung": asdict(plan.rung),
            "scale": head.scale,
            "offset": head.offset,
            "task": boosting.settings.task,
            **plan.checked.inputs.to_record(),
            "curve": row,
            "evidence": {"training": asdict(verdict.training), "validation": asdict(verdict.validation)},
            "uncounted": plan.cost.uncounted,
            **counts,
            **({} if plan.module.best is None else {"kept_epoch": plan.module.best.epoch}),
            **plan.checked.optimization,
            "structure": plan.module.structure,
            "indescribable": why,
            "blueprint": blueprint,
        }
        run.commit(number, tensors, record)
        run.write_curve(run.rows())
    distributed.barrier()


def _reject(boosting: Boosting, plan: RoundPlan, reason: str, state: RoundState, steps: int) -> bool:
    """Records a rejected try and its cost; stops the run after the last rung. Returns whether the run continues."""
    number, last = plan.module.number, plan.attempt + 1 >= len(plan.rungs)
    if distributed.rank() == 0:
        macs = _training_macs(boosting, plan, state)
        boosting.run.reject(
            number, f"{plan.rung.name}: {reason}", train_macs=macs, seconds=state.elapsed(), steps=steps
        )
        if last:
            boosting.stop(number, reason)
    distributed.barrier()
    return not last
