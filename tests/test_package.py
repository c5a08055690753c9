"""The package as it is imported: its names, what it loads, and the links to the folders at the top."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"wandb", "timm", "onnx", "matplotlib"}


def python(script):
    """Runs a script in a fresh interpreter in the root of the repository; what it printed."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_callbacks_is_refused_with_the_way_out():
    script = """
import sys
try:
    import callbacks
except ImportError as error:
    print(error)
print("torch" in sys.modules)
"""
    message, torch_loaded = python(script).splitlines()
    assert "`import bdistil.callbacks`" in message
    assert torch_loaded == "False"


def test_import_loads_nothing_heavy():
    # torchmetrics loads matplotlib when Lightning is imported, so what counts is what comes on top of Lightning.
    script = """
import json, sys
import lightning
before = set(sys.modules)
import bdistil
for name in bdistil.__all__:
    getattr(bdistil, name)
print(json.dumps([sorted(bdistil.__all__), sorted(set(sys.modules) - before)]))
"""
    names, loaded = json.loads(python(script))
    assert {"BoostingSettings", "BoostingRound", "ProgressiveEnsemble", "Student", "ErrorLedger"} <= set(names)
    assert {"FrozenTeacher", "Budget"} <= set(names)
    assert "bdistil.functional.boosting" in loaded
    assert not HEAVY & {name.split(".")[0] for name in loaded}


@pytest.mark.slow
def test_import_costs_little_more_than_lightning():
    script = """
import time
import lightning
start = time.perf_counter()
import bdistil
for name in bdistil.__all__:
    getattr(bdistil, name)
print(time.perf_counter() - start)
"""
    assert float(python(script)) <= 1.5


def test_recipes_are_seen_through_the_link():
    recipes = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")}
    linked = {path.relative_to(ROOT / "bdistil/recipes") for path in (ROOT / "bdistil/recipes").rglob("*.yaml")}
    assert recipes, "no recipe found"
    assert linked == recipes


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_links_are_relative(name):
    link = ROOT / "bdistil" / name
    assert link.is_symlink(), f"{link} is a copy: clone with core.symlinks"
    assert link.readlink() == Path("..") / name
