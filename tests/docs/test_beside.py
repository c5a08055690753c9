"""Every row of docs/beside-your-lightning-code.md names a test, and every named test exists."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from helpers.toys import Toys, make_student, make_teacher

from bdistil.cli.app import main

ROOT = Path(__file__).parents[2]
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows(text):
    """Cells of the rows of all tables, without their heads."""
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def faults(text, root):
    """Rows without a test, rows of the wrong width, and named tests that do not exist."""
    found = []
    for row in rows(text):
        tests = TEST.findall(row[-1])
        if len(row) != 4 or not tests:
            found.append(f"{row[0]}: {len(row)} cells, {len(tests)} tests in the last one")
        found += [f"{file}::{name}" for file, name in tests if name not in functions(root / file)]
    return found


def functions(path):
    """Names of the test functions of a file; none where there is no such file."""
    if not path.is_file():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist():
    text = (ROOT / "docs/beside-your-lightning-code.md").read_text()
    assert len(re.findall(r"^\| what \|", text, re.MULTILINE)) >= 5
    assert not faults(text, ROOT)


HEAD = "| what | works? | why, and what to do | test |\n|---|---|---|---|\n"


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("| a | yes | b | `tests/docs/test_beside.py::test_every_row_names_tests_that_exist` |", 0),
        ("| a | yes | b | `tests/docs/test_beside.py::test_that_is_missing` |", 1),
        ("| a | yes | b | `tests/docs/test_missing.py::test_every_row_names_tests_that_exist` |", 1),
        ("| a | yes | b | c |", 1),
        ("| a | yes | `tests/docs/test_beside.py::test_every_row_names_tests_that_exist` |", 1),
    ],
)
def test_the_search_finds_faults(row, wrong):
    assert len(faults(HEAD + row + "\n", ROOT)) == wrong


def block(language):
    text = (ROOT / "docs/beside-your-lightning-code.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return found


def test_its_python_makes_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"teacher": make_teacher(), "make_student": make_student}
    exec(block("python"), scope)
    described = scope["controller"].boosting.check(Toys()).optimization
    assert described["optimizer"]["class"] == "torch.optim.sgd.SGD"
    assert described["lr_scheduler"]["interval"] == "step"


def test_its_recipe_is_one(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text(block("yaml"), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "digits", "--config", str(file), "--print_config"])
    assert end.value.code in (0, None)
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["optimizer"]["init_args"]["momentum"] == 0.9
    assert model["lr_scheduler"]["init_args"]["milestones"] == [30, 45]
