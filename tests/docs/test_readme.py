"""The README is true: its Python runs, its files are there, its commands exist."""

import re
from pathlib import Path

import lightning as L
import pytest

from bdistil.callbacks import ComputeCost, MetricCurves
from bdistil.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_first_command_comes_early():
    assert next(n for n, line in enumerate(README.splitlines(), 1) if line.startswith("```")) < 30


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_file_that_is_named_is_there(target):
    assert (ROOT / target).is_file()


def test_every_command_that_is_named_is_there():
    named = set(re.findall(r"^bdistil (\w+)", README, re.M))
    assert named == {"fit", "compare", *COMMANDS}


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    """Word for word, but for the number of epochs and rounds, and a Trainer that leaves nothing on the screen."""
    monkeypatch.chdir(tmp_path)
    quiet = 'max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False'
    own_teacher = PYTHON[0].replace("max_epochs=20", quiet).replace("rounds=6", "rounds=2")
    assert own_teacher != PYTHON[0]
    assert len(own_teacher[own_teacher.index("def make_student") :].splitlines()) <= 20
    scope = {"__name__": "mine"}
    exec(own_teacher, scope)
    assert len(scope["ensemble"]) == 2
    in_a_call = PYTHON[1].replace("max_epochs=20", quiet).replace("rounds=6", "rounds=1")
    exec(in_a_call, scope)
    assert len(scope["ensemble"]) == 1
    exec(PYTHON[2], scope)
    assert "2 " in capsys.readouterr().out
    assert scope["prediction"].logits.shape == (16, 10)
    exec(PYTHON[3].replace("max_epochs=1", quiet), {"L": L})
    assert ComputeCost
    assert MetricCurves
