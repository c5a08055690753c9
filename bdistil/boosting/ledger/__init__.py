"""The ledger: teacher logits and running errors of all samples, on disk."""

from bdistil.boosting.ledger.ledger import ErrorLedger
from bdistil.boosting.ledger.records import LedgerHead, RoundEvidence, Units

__all__ = [
    "ErrorLedger",
    "LedgerHead",
    "RoundEvidence",
    "Units",
]
