"""Teachers: frozen modules, exported graphs, models behind an API, and training one."""

from bdistil.teachers.api import ApiTeacher
from bdistil.teachers.exported import OnnxTeacher, TorchScriptTeacher
from bdistil.teachers.http_endpoint import ApiRefusedError, ApiUnavailableError, HttpEndpoint
from bdistil.teachers.local_api import LocalApi, ModelServer
from bdistil.teachers.offline import OfflineTeacher
from bdistil.teachers.training import TeacherSpec, TeacherTraining
from bdistil.teachers.wrappers import AdaptedTeacher, AveragedTeacher, FrozenTeacher

__all__ = [
    "AdaptedTeacher",
    "ApiRefusedError",
    "ApiTeacher",
    "ApiUnavailableError",
    "AveragedTeacher",
    "FrozenTeacher",
    "HttpEndpoint",
    "LocalApi",
    "ModelServer",
    "OfflineTeacher",
    "OnnxTeacher",
    "TeacherSpec",
    "TeacherTraining",
    "TorchScriptTeacher",
]
