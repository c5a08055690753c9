"""The runner beside its sessions called by hand and eager PyTorch, and the graph with exits: one process, in turns.

`make bench` prints the ratios and holds them to their bounds.
"""

import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers.export_runs import write_run

from bdistil import ProgressiveEnsemble
from bdistil.export.exit_graph import write_exits
from bdistil.export.fusion import exit_after, fused_runner
from bdistil.export.run import export_run
from bdistil.models.convnets import ConvStudent
from bdistil.models.recurrent import RecurrentStudent
from bdistil.runner import Budget, Exits, ExportedEnsemble

pytestmark = pytest.mark.slow

TURNS = 400
CASES = {
    "conv 28x28, channels 16 32": (lambda number: ConvStudent((16, 32)), (1, 28, 28)),
    "conv 28x28, channels 3 6 (digits)": (lambda number: ConvStudent((3, 6)), (1, 28, 28)),
    "gru 99 steps, hidden 32": (lambda number: RecurrentStudent(32, 10, hidden=32), (99, 32)),
    "lstm 99 steps, hidden 32": (lambda number: RecurrentStudent(32, 10, hidden=32, cell="lstm"), (99, 32)),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Name, PyTorch, the exported folder, its runner, and one sample."""
    make, shape = CASES[request.param]
    torch.manual_seed(0)
    run = write_run(tmp_path / "run", make, shape)
    export_run(run, tmp_path / "out")
    ensemble, runner = ProgressiveEnsemble.load(run.root), ExportedEnsemble.load(tmp_path / "out")
    return request.param, ensemble, tmp_path / "out", runner, torch.randn(1, *shape)


def sessions_by_hand(runner, x):
    """The sessions in a row, their inputs ready."""
    values, calls = {"x": x}, []
    for graph in runner.graphs:
        calls.append((graph.session, graph.gives, {name: values[name] for name in graph.reads}))
        graph.run(values)

    def run():
        for session, gives, reads in calls:
            session.run(gives, reads)

    return run


def smallest_ms(functions, turns):
    """Smallest CPU time of each function, in turns of another order, in ms: which one ran before matters to caches."""
    order, taken = np.random.default_rng(0), np.full((turns, len(functions)), np.inf)
    for row in taken:
        for place in order.permutation(len(functions)):
            begun = time.process_time()
            functions[place]()
            row[place] = 1e3 * (time.process_time() - begun)
    return taken.min(0)


def test_the_runner_beside_its_sessions_and_eager(case, record):
    name, ensemble, _, runner, x = case
    array = x.numpy()
    functions = [sessions_by_hand(runner, array), lambda: runner.predict(array), lambda: list(runner.stages(array)),
                 lambda: ensemble.predict(x)]  # fmt: skip
    smallest_ms(functions, 20)
    hand, predict, stages = smallest_ms(functions[:3], TURNS)
    eager = smallest_ms(functions[1:], TURNS)[2]
    print(
        f"\n{name:<34} sessions {hand:.3f} ms  predict {predict / hand:.3f}  stages {stages / hand:.3f}  "
        f"of eager PyTorch's {eager:.3f} ms {predict / eager:.3f}"
    )
    record(f"runner's predict / sessions by hand, {name}", predict / hand)
    record(f"runner's predict / eager PyTorch, {name}", predict / eager)
    assert predict <= 1.15 * hand
    assert stages <= 1.15 * hand
    assert predict <= 0.4 * eager


def test_the_graph_with_exits_beside_its_stages(case, record):
    """One sample that exits at each stage: in one graph, by checks between the stages, and without checks."""
    name, _, folder, runner, x = case
    array, count, runner.clock = x.numpy(), len(runner), None  # its times may skip the checks
    graph = fused_runner(folder, runner.manifest, write_exits(folder, runner.manifest))
    arrays = runner.check(array)
    for number in range(count):
        thresholds = exit_after(number, count)
        exits = Exits("max_prob", thresholds, [1.0] * count)
        functions = [partial(graph.run_exits, arrays, thresholds, count),
                     partial(runner.run_stages, arrays, runner.plan_of(exits, count), count),
                     partial(runner.predict, array, Budget(stages=number + 1))]  # fmt: skip
        smallest_ms(functions, 20)
        one, checked, plain = smallest_ms(functions, TURNS)
        print(
            f"\n{name:<34} exit {number + 1}: graph {one:.3f} ms  with checks {checked:.3f} ms  stages {plain:.3f} ms"
        )
        record(f"graph with exits / stages with checks, exit {number + 1}, {name}", one / checked)
        assert one <= 1.1 * checked
        assert one <= 1.3 * plain
