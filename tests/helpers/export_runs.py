"""Runs of tiny students for the tests of the export."""

import json

import torch
from torch import nn

from bdistil.ensemble.calibration import save_calibration
from bdistil.export.run import export_run
from bdistil.models.recurrent import RecurrentSegmentStudent
from bdistil.models.student import Rung, Student, build_student, run_student
from bdistil.storage.blueprint import describe
from bdistil.storage.run_directory import RunDirectory

L = 5
RUNGS = [Rung(0), Rung(1), Rung(2, "hidden", 4), Rung(1, "residual")]
MACS = [100, 250, 420, 600]


class Recurrent(nn.Module):
    """Output of a recurrent net after the last step."""

    def __init__(self, kind, hidden):
        super().__init__()
        self.net = getattr(nn, kind)(3, hidden, batch_first=True)

    def forward(self, x):
        return self.net(x)[0][:, -1]


class Trimmed(nn.Module):
    """Mean of the steps that there are, as far as the longest sample goes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 8)

    def forward(self, x, lengths):
        longest = int(lengths.max())
        there = (torch.arange(longest) < lengths[:, None])[..., None]
        return (self.layer(x[:, :longest]).tanh() * there).sum(1) / lengths[:, None]


def conv_student(number):
    body = nn.Sequential(
        nn.Conv2d(1, 3 + number, 3, stride=2), nn.BatchNorm2d(3 + number), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return Student(body, nn.Linear(3 + number, L))


def mlp_student(number):
    return Student(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4 + number), nn.Tanh()), nn.Linear(4 + number, L)
    )


def recurrent_student(kind):
    return lambda number: Student(Recurrent(kind, 4 + number), nn.Linear(4 + number, L))


def plain_third(number):
    """Students of which one takes no links."""
    return nn.Sequential(nn.Flatten(), nn.Linear(6, L)) if number == 2 else mlp_student(number)


def segment_student(number):
    """Reads its quarter of the steps, from the state handed over."""
    return RecurrentSegmentStudent(3, L, segments=4, hidden=4 + number % 2)


KINDS = {
    "conv": (conv_student, (1, 9, 9)),
    "mlp": (mlp_student, (6,)),
    "lstm": (recurrent_student("LSTM"), (7, 3)),
    "gru": (recurrent_student("GRU"), (7, 3)),
    "plain": (plain_third, (6,)),
    "segments": (segment_student, (9, 3)),
}


def write_run(root, make, shape, figures=None, rounds=4):
    """A run directory of committed rounds, with statistics of batch norm that are not those of the start."""
    run, students = RunDirectory(root), []
    for number, rung in enumerate(RUNGS[:rounds]):
        student = build_student(make, number, students, rung)
        run_student(student.train(), students, 1 + 2 * torch.randn(32, *shape))
        student.eval()
        run.commit(number, *committed(student, rung, number, shape))
        students.append(student)
    if figures:
        save_calibration(run, figures)
    return run


def committed(student, rung, number, shape):
    """Tensors and record of a round, as a run keeps them."""
    plan, tensors = describe(student)
    record = {"scale": 2.5, "curve": {"macs": MACS[number]}, "input_shape": list(shape), "input_dtype": "float32",
              "rung": vars(rung), "blueprint": plan}  # fmt: skip
    return tensors, record


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def exported_mlps(folder):
    """A run of MLPs without fitted figures, and its exported folder."""
    torch.manual_seed(2)
    run = write_run(folder / "run", mlp_student, (6,))
    export_run(run, folder / "out")
    return run, folder / "out"
