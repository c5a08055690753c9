"""The ledger: teacher logits and running errors of every sample, on the disk."""

from bdistil.boosting.ledger.ledger import ErrorLedger
from bdistil.boosting.ledger.records import LedgerHead, RoundEvidence
from bdistil.boosting.ledger.units import Units

__all__ = [
    "ErrorLedger",
    "LedgerHead",
    "RoundEvidence",
    "Units",
]
