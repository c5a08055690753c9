"""Students and networks: the `Student` base class and ready networks for images, sequences and tables."""

from typing import TYPE_CHECKING, Any

from bdistil.models.cifar import CifarResNet, WideResNet
from bdistil.models.convnets import ConvStudent, StridedConvNet
from bdistil.models.mlp import MLP, MLPStudent
from bdistil.models.recurrent import RecurrentNet, RecurrentSegmentStudent, RecurrentStudent, StateBody
from bdistil.models.segment_student import SegmentStudent
from bdistil.models.sequence_convnets import SequenceConvNet, SequenceConvStudent
from bdistil.models.student import Rung, Student

if TYPE_CHECKING:
    from bdistil.models.timm import TimmStudent, TimmTeacher

__all__ = [
    "MLP",
    "CifarResNet",
    "ConvStudent",
    "MLPStudent",
    "RecurrentNet",
    "RecurrentSegmentStudent",
    "RecurrentStudent",
    "Rung",
    "SegmentStudent",
    "SequenceConvNet",
    "SequenceConvStudent",
    "StateBody",
    "StridedConvNet",
    "Student",
    "TimmStudent",
    "TimmTeacher",
    "WideResNet",
]


def __getattr__(name: str) -> Any:
    """Imports timm only when one of its students or teachers is asked for: it loads slowly."""
    if name in ("TimmStudent", "TimmTeacher"):
        from bdistil.models import timm

        return getattr(timm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
