"""docs/export.md is true: its Python runs on a folder that was exported."""

import re
import sys
from pathlib import Path

import torch
from helpers.export_runs import conv_student, write_run

from bdistil.export.run import export_run

DOCS = Path(__file__).parents[2] / "docs/export.md"
PYTHON = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    export_run(write_run(tmp_path / "run", conv_student, (1, 28, 28)), tmp_path / "exported")
    exec(PYTHON[0], {})
    assert "4 600 (16, 5)" in capsys.readouterr().out
    sys.modules.pop("runner")
