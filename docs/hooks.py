"""What `mkdocs build` makes of the repository beside docs/: home, changelog, API pages; and formulas as MathML."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)((?:#[^)]*)?)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
REQUEST = re.compile(r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]*)"')
# Public packages in the order of the navigation; the names are those of their `__all__`, each documented once.
API = {
    "Core": "bdistil",
    "Callbacks": "bdistil.callbacks",
    "Students and networks": "bdistil.models",
    "Teachers": "bdistil.teachers",
    "Anytime inference": "bdistil.ensemble",
    "Evaluation": "bdistil.evaluation",
    "Export": "bdistil.export",
    "Data": "bdistil.data",
    "Formulas": "bdistil.functional",
    "Quality and cost": "bdistil.metrics",
    "Distillation of one student": "bdistil.distillation",
    "Run directories": "bdistil.storage",
}


def on_config(config: Any) -> Any:
    """Adds what is generated to the navigation."""
    config.nav.append({"API": [{title: f"api/{package}.md"} for title, package in API.items()]})
    config.nav.append({"Project": [{"Contributing": "contributing.md"}, {"Changelog": "changelog.md"}]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages at the top of the repository, the pictures that they show, and the API pages."""
    for source, page in PAGES.items():
        text, pictures = as_page((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
        for picture in pictures:
            files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    for page, text in api_pages(API.values()).items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Links of a guide to a page at the top of the repository lead to that page of the site."""
    return re.sub(rf"\(\.\./({'|'.join(map(re.escape, PAGES))})", lambda match: f"({PAGES[match[1]]}", text)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script; `content` is the HTML of one page."""
    return FORMULA.sub(mathml, content)


def on_post_page(output: str, **_: Any) -> str:
    """Refuses a page that loads something from another server: the site is read offline, too.

    Raises:
        PluginError: with the address.
    """
    if found := REQUEST.search(output):
        raise PluginError(f"A page of the site loads {found[1]} from another server. Put the file below docs/ instead.")
    return output


def mathml(match: re.Match[str]) -> str:
    """The formula of a `span` in its line, that of a `div` on a line of its own."""
    formula = convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")
    return f'<div class="formula">{formula}</div>' if match[1] == "div" else formula


def as_page(text: str) -> tuple[str, list[str]]:
    """A page at the top of the repository as one of the site, and the pictures that it shows.

    Links to pages and pictures lead to those of the site, and a path as their text becomes the title of the page. Other
    files of the repository are named without a link.
    """
    pictures = []

    def moved(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        if target.endswith(".png"):
            pictures.append(target)
            return match[0]
        page = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if page is None:
            return f"`{target}`"
        return f"[{title_of(target) if label == target else label}]({page}{anchor})"

    return LINK.sub(moved, text), pictures


def title_of(source: str) -> str:
    """The first heading of a page of the repository."""
    return (ROOT / source).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def api_pages(packages: Any) -> dict[str, str]:
    """An API page for each package, in Markdown with the directives of mkdocstrings."""
    pages: dict[str, str] = {}
    known: set[str] = set()
    for package in packages:
        description, names = public_names(package)
        new = {name.rpartition(".")[2]: name for name in reversed(names)}  # of two paths to a class, the shorter
        directives = "\n\n".join(f"::: {package}.{new[name]}" for name in sorted(new.keys() - known))
        known |= new.keys()
        pages[f"api/{package}.md"] = f"# {package}\n\n{description}\n\n{directives}\n"
    return pages


def public_names(package: str) -> tuple[str, list[str]]:
    """Docstring of a package and its `__all__`; the data modules are in files of their own."""
    folder = ROOT.joinpath(*package.split("."))
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (ast.literal_eval(node.value) for node in tree.body if is_all(node))
    if package == "bdistil.data":
        names += [f"{file.stem}.{name}" for file in sorted(folder.glob("*.py")) for name in classes(file)]
    return ast.get_docstring(tree) or "", names


def is_all(node: ast.stmt) -> bool:
    """Whether a statement sets `__all__`."""
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"


def classes(file: Path) -> list[str]:
    """Names of the classes that a file defines."""
    return [node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
