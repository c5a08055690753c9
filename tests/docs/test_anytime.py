"""docs/anytime.md is true: its Python runs on a run of toys, its commands exist."""

import re
from pathlib import Path

import torch
from helpers.toys import Toys, boost

from bdistil.cli.app import COMMANDS

GUIDE = (Path(__file__).parents[2] / "docs" / "anytime.md").read_text(encoding="utf-8")


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    boost(tmp_path / "runs" / "digits")
    scope = {"x": torch.randn(5, 8), "val_loader": Toys().val_dataloader()}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, scope)
    assert scope["stage"].index == 3
    assert scope["ensemble"].calibration is scope["calibration"]
    assert len(scope["calibration"].exits.decided_share) == 3
    assert "tensor" in capsys.readouterr().out


def test_every_command_that_is_named_is_there():
    assert set(re.findall(r"^bdistil (\w+)", GUIDE, re.M)) <= set(COMMANDS)
