"""Every path into the package that README, docs and recipes name can be imported."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.yaml")])
DOTTED = re.compile(r"\bbdistil(?:\.[A-Za-z_]\w*)+")
IMPORT = re.compile(r"^\s*from (bdistil[\w.]*) import ([\w, ]+)", re.M)


def named_paths():
    """Dotted paths, and where each is named first."""
    found = {}
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        paths = DOTTED.findall(text)
        paths += [f"{module}.{name.strip()}" for module, names in IMPORT.findall(text) for name in names.split(",")]
        for path in paths:
            found.setdefault(path, str(file.relative_to(ROOT)))
    return found


def resolve(path):
    """The module, class, function or attribute of a dotted path."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not path.startswith(str(error.name)):
                raise
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def test_the_search_finds_paths_of_every_kind():
    found = named_paths()
    assert {"bdistil.ProgressiveEnsemble", "bdistil.callbacks.RoundController", "bdistil.data.digits.Digits"} <= set(
        found
    )
    assert "recipes/watch.yaml" in found.values()
    assert len(found) > 30


@pytest.mark.parametrize(("path", "file"), sorted(named_paths().items()))
def test_a_named_path_can_be_imported(path, file):
    assert resolve(path) is not None, file


@pytest.mark.parametrize("path", ["bdistil.zoo.ConvStudent", "bdistil.Nothing", "bdistil.models.nothing.Net"])
def test_a_path_that_is_not_there_is_found_out(path):
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        resolve(path)
