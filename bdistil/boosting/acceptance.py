"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from bdistil.boosting.ledger.records import RoundEvidence


def accepts_progress(before: float, after: float, minimum: float) -> tuple[bool, str]:
    """Does the prefix's rms error to the teacher fall by more than `minimum` of what it was?

    Returns:
        The decision, and the sentence that explains it.
    """
    fall = 1.0 - after / before if before > 0 else 0.0
    verdict = "fell" if fall > minimum else "did not fall"
    change = f"{before:.4f} -> {after:.4f}, {-fall:+.2%}"
    return fall > minimum, f"rms error to the teacher {verdict} by more than {minimum:g}: {change}"


def accepts_margin(margin_share: float, required: float) -> tuple[bool, str]:
    """Does a share of at least `required` of the outputs meet its margin? The condition of the paper, softened.

    Returns:
        The decision, and the sentence that explains it.
    """
    met = margin_share >= required
    return (
        met,
        f"{margin_share:.0%} of the outputs meet their margin, {'at least' if met else 'less than'} {required:.0%}",
    )


@dataclass(frozen=True)
class Verdict:
    """What became of a trained student, and the figures behind it; accuracy and loss are the prefix's on validation."""

    accepted: bool
    reason: str
    training: RoundEvidence
    validation: RoundEvidence
    accuracy: float
    loss: float
