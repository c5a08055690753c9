"""What the site makes of the repository: home from the README, API pages of all public names, formulas as MathML."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    """The hooks of the site, which need the packages of `make docs`."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_readme_lead_to_pages(hooks):
    text = (
        "[docs/text.md](docs/text.md) [x](docs/anytime.md#budgets) [c](a/b.py) ![p](recipes/digits.png) [w](https://w)"
    )
    page, pictures = hooks.as_page(text)
    assert page == "[Text](text.md) [x](anytime.md#budgets) `a/b.py` ![p](recipes/digits.png) [w](https://w)"
    assert pictures == ["recipes/digits.png"]


def test_links_of_a_guide_to_the_readme_lead_to_the_home_page(hooks):
    assert hooks.on_page_markdown("[r](../README.md#limits) [a](anytime.md)") == "[r](index.md#limits) [a](anytime.md)"


def test_formulas_are_mathml(hooks):
    page = hooks.on_page_content(r'<p><span class="arithmatex">\(a &lt; b\)</span></p>')
    assert "arithmatex" not in page
    assert re.findall(r"<m[io]>(.*?)</m", page.replace("&#x0003C;", "&lt;")) == ["a", "&lt;", "b"]


def test_every_public_name_is_documented_once(hooks):
    text = "\n".join(hooks.api_pages(hooks.API.values()).values())
    directives = re.findall(r"^::: (\S+)$", text, re.M)
    for package in hooks.API.values():
        for name in importlib.import_module(package).__all__:
            assert sum(path.rpartition(".")[2] == name for path in directives) == 1, name
    assert "bdistil.data.digits.Digits" in directives


def test_a_page_that_asks_another_server_is_refused(hooks):
    page = '<a href="https://arxiv.org/abs/1">paper</a><img src="a.png"><link href="site.css">'
    assert hooks.on_post_page(page) == page
    with pytest.raises(hooks.PluginError, match=r"https://cdn\.example/x\.js"):
        hooks.on_post_page(page + '<script async src="https://cdn.example/x.js">')


def test_every_page_is_in_the_navigation_once(hooks):
    written = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)  # knows no tags
    config = SimpleNamespace(nav=written["nav"])

    def pages(entries):
        for entry in entries:
            for target in entry.values() if isinstance(entry, dict) else [entry]:
                yield from pages(target) if isinstance(target, list) else [target]

    found = list(pages(hooks.on_config(config).nav))
    assert len(found) == len(set(found))
    guides = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert guides <= set(found)
