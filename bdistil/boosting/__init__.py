"""B-DISTIL: boosting rounds, the ledger of errors, acceptance and commit."""

from bdistil.boosting.commit import decide
from bdistil.boosting.ledger import ErrorLedger
from bdistil.boosting.part import Part
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.run import Boosting
from bdistil.boosting.settings import BoostingSettings

__all__ = [
    "Boosting",
    "BoostingRound",
    "BoostingSettings",
    "ErrorLedger",
    "Part",
    "decide",
]
