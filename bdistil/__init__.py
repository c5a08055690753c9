"""Progressive ensemble distillation (B-DISTIL) on PyTorch Lightning.

A trained teacher becomes an ordered ensemble of tiny students, round by round; every prefix of it is a predictor.

Letters in shapes, the same everywhere: N samples, L outputs (classes), T rounds, B samples of a batch, D features,
g teacher logits, f_t student t, S running error.
"""

from importlib.metadata import version

from bdistil.utils.drawing import drop_missing_backend

drop_missing_backend()  # before torchmetrics imports matplotlib

# isort: split

from bdistil.boosting.ledger.ledger import ErrorLedger
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.settings import BoostingSettings
from bdistil.callbacks.distill import distill
from bdistil.ensemble.budget import Budget, Prediction
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError, UserError
from bdistil.models.student import Rung, Student
from bdistil.teachers.api import ApiTeacher
from bdistil.teachers.exported import OnnxTeacher, TorchScriptTeacher
from bdistil.teachers.http_endpoint import HttpEndpoint
from bdistil.teachers.offline import OfflineTeacher
from bdistil.teachers.wrappers import AdaptedTeacher, AveragedTeacher, FrozenTeacher

__version__ = version("bdistil")

__all__ = [
    "AdaptedTeacher",
    "ApiTeacher",
    "AveragedTeacher",
    "BoostingRound",
    "BoostingSettings",
    "Budget",
    "ErrorLedger",
    "FrozenTeacher",
    "HttpEndpoint",
    "OfflineTeacher",
    "OnnxTeacher",
    "Prediction",
    "ProgressiveEnsemble",
    "RunError",
    "Rung",
    "Student",
    "TorchScriptTeacher",
    "UserError",
    "distill",
]
