"""Imports of the package point one way: folder by folder down this list, and without a circle inside a folder."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bdistil"
# From low to high. Folders of one line do not import each other.
FLOORS = (
    "errors",
    "runner",
    "utils",
    "functional metrics",
    "data",
    "storage",
    "models",
    "teachers ensemble",
    "boosting reporting",
    "distillation",
    "callbacks evaluation",
    "export comparison",
    "cli",
    "__init__",
)
FLOOR = {name: floor for floor, line in enumerate(FLOORS) for name in line.split()}
ON_TOP = {"__init__.py", "errors.py", "py.typed", "callbacks", "recipes", *FLOOR} - {"errors", "__init__"}


def files(package):
    """Python files of a package; pathlib does not follow links, hence the second search."""
    return sorted({*package.rglob("*.py"), *(package / "callbacks").rglob("*.py")})


def module_name(package, file):
    """Dotted name of a file without the package's own: ("boosting", "ledger", "rows"); a folder is its __init__."""
    return file.relative_to(package).with_suffix("").parts


class Imports(ast.NodeVisitor):
    """Dotted names that a file imports, also inside functions, but not those for type checkers only."""

    def __init__(self, package):
        self.package, self.found = package, set()

    def visit_If(self, node):
        for_checkers = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.orelse if for_checkers else node.body + node.orelse:
            self.visit(child)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        module = resolve_name("." * node.level + (node.module or ""), self.package)
        self.found |= {f"{module}.{alias.name}" for alias in node.names}


def imports(package, file, known):
    """Modules of the package that a file imports, as `module_name` has them."""
    visitor = Imports(".".join([package.name, *file.relative_to(package).parent.parts]))
    visitor.visit(ast.parse(file.read_text(encoding="utf-8")))
    found = set()
    for name in visitor.found:
        top, *parts = name.split(".")
        if top == package.name:
            folder = parts[0] if parts and parts[0] in FLOOR else "__init__"
            while parts and tuple(parts) not in known and (*parts, "__init__") not in known:
                parts.pop()  # a name inside a module
            known_as = tuple(parts) if tuple(parts) in known else (*parts, "__init__")
            found.add(known_as if parts else (folder,))
    return found


def violations(package):
    names = {module_name(package, file): file for file in files(package)}
    graph, wrong = {}, set()
    for name, file in names.items():
        if name[0] not in FLOOR:
            wrong.add(f"{name[0]} is not in the list")
            continue
        targets = imports(package, file, set(names)) - {name}
        graph[name] = {target for target in targets if target[0] == name[0]}
        for target in targets - graph[name]:
            if FLOOR.get(target[0], -1) >= FLOOR[name[0]]:
                wrong.add(f"{'.'.join(name)} imports {'.'.join(target)}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.add(f"circle of {', '.join(sorted({'.'.join(name) for name in error.args[1]}))}")
    return wrong


def test_imports_point_one_way():
    found = {module_name(PACKAGE, file)[0] for file in files(PACKAGE)}
    assert {"functional", "callbacks", "cli"} <= found, f"the search is broken, it found only {found}"
    assert not violations(PACKAGE)


def test_nothing_else_lies_on_top():
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found == ON_TOP


def test_no_folder_has_many_files():
    folders = {}
    for file in files(PACKAGE):
        folders.setdefault(file.parent, []).append(file.name)
    assert {str(folder): len(names) for folder, names in folders.items() if len(names) > 15} == {}  # 14 and __init__


def test_every_folder_lists_its_public_names():
    for name in set(FLOOR) - {"errors", "__init__", "utils", "data"}:
        tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
        assert any("__all__" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)), name


@pytest.mark.parametrize(
    ("sources", "wrong"),
    [
        (
            {"functional/one": "from bdistil.boosting import BoostingRound"},
            {"functional.one imports boosting"},
        ),
        (
            {"functional/one": "from ..boosting import round", "boosting/round": ""},
            {"functional.one imports boosting.round"},
        ),
        ({"storage/one": "def late():\n    import bdistil.callbacks.curves"}, {"storage.one imports callbacks"}),
        (
            {"functional/one": "import bdistil.metrics.cost", "metrics/cost": ""},
            {"functional.one imports metrics.cost"},
        ),
        ({"cli/one": "from bdistil import Student"}, {"cli.one imports __init__"}),
        ({"errors": "import bdistil"}, {"errors imports __init__"}),
        ({"surprise": ""}, {"surprise is not in the list"}),
        ({"callbacks/one": "from bdistil.cli.app import main", "cli/app": ""}, {"callbacks.one imports cli.app"}),
        (
            {"models/one": "import bdistil.models.two", "models/two": "from bdistil.models import one"},
            {"circle of models.one, models.two"},
        ),
        (
            {"models/__init__": "from bdistil.models.one import A", "models/one": "from bdistil.models import A"},
            {"circle of models.__init__, models.one"},
        ),
        ({"data/image": "from ..functional.one import centre", "functional/one": ""}, set()),
        ({"storage/one": "if TYPE_CHECKING:\n    from bdistil.boosting import BoostingRound"}, set()),
        ({"boosting/one": "from bdistil.functional import centre\nimport torch, bdistil_extra"}, set()),
    ],
)
def test_the_search_finds_what_points_the_other_way(tmp_path, sources, wrong):
    package = tmp_path / "bdistil"
    for name, source in sources.items():
        path = (package / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert violations(package) == wrong
