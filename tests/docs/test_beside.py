"""Every row of docs/beside-your-lightning-code.md names a test, and every named test exists."""

import ast
import re
from pathlib import Path

import pytest

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
