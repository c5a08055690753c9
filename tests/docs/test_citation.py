"""CITATION.cff is that of this version and has every paper that docs/method.md names."""

import re
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_it_is_that_of_this_version():
    assert CITATION["version"] == version("bdistil")
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)


def test_it_has_the_papers_of_the_method():
    named = set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "docs" / "method.md").read_text(encoding="utf-8")))
    cited = {i["value"].removeprefix("arXiv:") for paper in CITATION["references"] for i in paper["identifiers"]}
    assert len(named) == 4
    assert named <= cited
