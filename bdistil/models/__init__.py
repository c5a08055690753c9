"""Students: the base class, and networks for images, sequences and tables."""

from typing import TYPE_CHECKING, Any

from bdistil.models.cifar import CifarResNet, WideResNet
from bdistil.models.convnets import ConvStudent, SequenceConvNet, SequenceConvStudent, StridedConvNet
from bdistil.models.mlp import MLP, MLPStudent
from bdistil.models.recurrent import RecurrentNet, RecurrentSegmentStudent, RecurrentStudent, StateBody
from bdistil.models.segment_student import SegmentStudent
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
    """Imports timm, which loads slowly, on the first access to one of its students or teachers."""
    if name in ("TimmStudent", "TimmTeacher"):
        from bdistil.models import timm

        return getattr(timm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
