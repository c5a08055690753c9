"""What pages tell the reader to run is run: Python of pages without a test of their own, and commands of all pages."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers.toys import Toys, make_student, make_teacher

from bdistil.cli.app import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SMALL = [
    "fit", "--config", "digits", "--model.boosting.rounds", "2", "--trainer.max_epochs", "1",
    "--model.teacher.epochs", "1", "--model.teacher.network.channels", "[4,8]", "--trainer.accelerator", "cpu",
    "--tracking.mode", "disabled", "--data.batch_size", "500",
]  # fmt: skip
QUIET = 'max_epochs=1, accelerator="cpu", enable_progress_bar=False'
# Pages whose blocks run one after the other, and what they take for the reader's own: code before each block.
SEGMENTS = """
import torch

from bdistil import ProgressiveEnsemble, Rung
from bdistil.models.student import build_student

students = []
for number in range(8):
    students.append(build_student(make_student, number, students, Rung(1 if number else 0)))
ensemble = ProgressiveEnsemble(students, macs=range(1, 9))


def wait_for(start, stop):
    return torch.randn(1, stop - start, 6)
"""
GIVEN = {
    "first-run.md": [""],
    "gradient-noise.md": ["", ""],
    "mekd.md": ["", ""],
    "noisy-labels.md": ["", ""],
    "sequences.md": ["", SEGMENTS],
    "wandb.md": [""],
}
# Shorter than on the pages.
SHORT = {r"max_epochs=\d+": QUIET, r"\b(gan_)?epochs=\d+": r"\1epochs=1", "queries=5_000": "queries=1_000"}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands():
    """Lines of all shell blocks that start with `bdistil`, without comments, and the page where each is first."""
    lines = [(line, page) for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    found = {}
    for line, page in lines:
        if line.startswith("bdistil "):
            found.setdefault(shlex.join(shlex.split(line, comments=True)), page.name)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with a run `runs/digits` of two small rounds."""
    folder = tmp_path_factory.mktemp("demo")
    assert main([*SMALL, "--run_dir", str(folder / "runs" / "digits")]) == 0
    return folder


@pytest.fixture
def folder(demo, tmp_path, monkeypatch):
    """A copy of it, as the current folder, with the reader's own recipe."""
    shutil.copytree(demo / "runs", tmp_path / "runs")
    shutil.copy(ROOT / "recipes" / "digits.yaml", tmp_path / "my_recipe.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIGITS_KEY", "of-no-api")
    return tmp_path


def test_every_page_with_python_has_a_test():
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("*.py"))
    assert [page.name for page in PAGES if blocks(page, "python") and page.name not in tests] == []


@pytest.mark.parametrize("name", GIVEN)
def test_its_python_runs(folder, name):
    """Word for word, but for the numbers of epochs and queries."""
    scope = {"teacher": make_teacher(), "make_student": make_student, "datamodule": Toys()}
    found = blocks(ROOT / "docs" / name, "python")
    for before, block in zip(GIVEN[name], found, strict=True):
        exec(compile(before, name, "exec"), scope)
        for long, short in SHORT.items():
            block = re.sub(long, short, block)
        exec(compile(block, name, "exec"), scope)


def test_the_search_finds_commands():
    assert {command.split()[1] for command in commands()} >= {"fit", "evaluate", "calibrate", "profile", "export"}


@pytest.mark.parametrize("command", [command for command in commands() if " fit " in command])
def test_a_fit_is_one_that_could_start(folder, command, capsys):
    """Its configuration is resolved and printed; to run it takes minutes."""
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command)[1:], "--print_config"])
    assert end.value.code in (0, None)
    assert "boosting:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands() if " compare " in command])
def test_a_comparison_runs(folder, command):
    """With one seed, and small rounds."""
    assert main([*shlex.split(command)[1:], "--seeds", "1", *SMALL[3:]]) == 0


TRAINING = (" fit ", " compare ")


@pytest.mark.parametrize("command", [c for c in commands() if not any(word in c for word in TRAINING)])
def test_a_command_runs(folder, command, capsys):
    if "executorch" in command:
        pytest.importorskip("executorch")
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_targets_of_make_are_there(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = re.findall(r"(?:^|`|^ +)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M)
    assert set(named) <= targets
