"""Imports between the modules of bdistil point one way: down this table, or along a line of it without a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bdistil"
LAYERS = """
    functional round_loss mac_rules units regression errors seeding distributed disk configurations
    run_places run_directory row_kernels large_rows row_files weight_files exit_rules anytime environment
    stopping strategies wandb_log run_notes run_logger workers allocator epoch_saving
    api_cache api_endpoint api_teacher
    settings block_sums ledger_records advancing ledger teachers students sequences blueprint cost metrics budgets
    indexing data zoo zoo_cifar zoo_sequences zoo_tables timm_models onnx_graphs foreign_teachers suspicions preflight
    recipe_files curve_rows curve_table curve_picture
    schedules
    ensemble walk prediction stage_times inputs mekd_losses mekd_networks mixing variance
    sample_gradients mixing_store mixing_report mekd_deprivatization mekd_emulation mekd mekd_data
    exit_fitting calibration timing
    rounds scoring node_disks boosting probing observing round_mixing distillation
    noise_look noise_report mixing_update
    tracking report report_anytime round_tracker round_state round_end round_hooks mekd_stage mekd_run
    callbacks
    compare distiller api_server early evaluation run_data anytime_fit
    runner export_graphs export_folder export_parity export_data export_fuse export_branches export_exits export_int8
    export_executorch export_job export_formats export_summary export
    evaluation_files profiling commands cli_parser fit_command cli
    __init__ __main__
""".strip().splitlines()
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}


def modules(package):
    """Files of a package by the name that the table has for them; pathlib follows no links, hence the second search."""
    files = {*package.rglob("*.py"), *(package / "callbacks").rglob("*.py")}
    return {file: file.relative_to(package).with_suffix("").parts[0] for file in sorted(files)}


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


def imports(package, file):
    """What a file imports of bdistil, by the names of the table; `from bdistil import Student` is `__init__`."""
    visitor = Imports(".".join([package.name, *file.relative_to(package).parent.parts]))
    visitor.visit(ast.parse(file.read_text(encoding="utf-8")))
    paths = [[*name.split("."), "__init__"] for name in visitor.found if name.split(".")[0] == package.name]
    return {path[1] if path[1] in LEVEL else "__init__" for path in paths}


def violations(package):
    graph, wrong = {}, set()
    for file, name in modules(package).items():
        targets = imports(package, file) - {name}
        graph.setdefault(name, set()).update(targets)
        if name not in LEVEL:
            wrong.add(f"{name} is not in the table")
        else:
            wrong |= {f"{name} imports {target}" for target in targets if LEVEL[target] > LEVEL[name]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.add(f"circle of {', '.join(sorted(set(error.args[1])))}")
    return wrong


def test_imports_point_one_way():
    found = set(modules(PACKAGE).values())
    assert {"functional", "callbacks"} <= found, f"the search is broken, it found only {found}"
    assert not violations(PACKAGE)


@pytest.mark.parametrize(
    ("sources", "wrong"),
    [
        ({"functional": "from bdistil.boosting.round import BoostingRound"}, {"functional imports rounds"}),
        ({"functional": "from . import rounds"}, {"functional imports rounds"}),
        ({"ledger": "def late():\n    import bdistil.callbacks.curves"}, {"ledger imports callbacks"}),
        ({"cli": "from bdistil import Student"}, {"cli imports __init__"}),
        ({"errors": "import bdistil"}, {"errors imports __init__"}),
        ({"surprise": ""}, {"surprise is not in the table"}),
        ({"callbacks/one": "from bdistil.cli.app import main"}, {"callbacks imports cli"}),
        (
            {"mixing": "import bdistil.ensemble.ensemble", "ensemble": "from bdistil import mixing"},
            {"circle of ensemble, mixing"},
        ),
        ({"data/image": "from ..functional import centre\nfrom bdistil.data.text import read"}, set()),
        ({"ledger": "if TYPE_CHECKING:\n    from bdistil.boosting.round import BoostingRound"}, set()),
        ({"ledger": "if late:\n    from bdistil.boosting.round import BoostingRound"}, {"ledger imports rounds"}),
        ({"rounds": "from bdistil.functional.boosting import centre\nimport torch, bdistil_extra"}, set()),
    ],
)
def test_the_search_finds_what_points_the_other_way(tmp_path, sources, wrong):
    package = tmp_path / "bdistil"
    for name, source in sources.items():
        path = (package / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert violations(package) == wrong
