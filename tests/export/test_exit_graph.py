"""One graph with early exits, and the traps of composing it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.export_runs import KINDS, MACS, write_run

from bdistil import Budget, ProgressiveEnsemble, UserError
from bdistil.ensemble.budget import confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures
from bdistil.errors import RunError
from bdistil.export.exit_graph import write_exits
from bdistil.export.fusion import exit_after
from bdistil.export.run import ExportOptions, export_run
from bdistil.models.convnets import ConvStudent
from bdistil.runner import Budget as RunnerBudget
from bdistil.runner import ExportedEnsemble

CASES = [("conv", "margin"), ("gru", "entropy"), ("mlp", "max_prob"), ("segments", "margin"), ("plain", "agreement")]


def figures(rule, thresholds=(0.2, 0.3, 0.1, 0.0)):
    exits = ExitFigures(rule, thresholds, "", (0.4, 0.3, 0.2, 0.1), 0.9, 0.9, 200.0)
    return Calibration(4, exits, temperatures=(0.5, 0.7, 0.9, 1.1), weights=(1.0, 0.5, 2.0, 0.7))


@pytest.fixture(scope="module", params=CASES, ids=[f"{kind}-{rule}" for kind, rule in CASES])
def exported(request, tmp_path_factory):
    """A run with a fitted rule, its export with the graph in use, and samples."""
    kind, rule = request.param
    make, shape = KINDS[kind]
    folder = tmp_path_factory.mktemp(kind)
    torch.manual_seed(4)
    run = write_run(folder / "run", make, shape, figures(rule))
    manifest = export_run(run, folder / "out", ExportOptions(fuse="exits"))
    used = {**manifest, "fused": {**manifest["fused"], "faster": True}}
    return ProgressiveEnsemble.load(run.root), ExportedEnsemble(folder / "out", used, 1), torch.randn(24, *shape)


def test_the_manifest_describes_the_graph(exported):
    fused = exported[1].manifest["fused"]
    rule = exported[1].manifest["exits"]["rule"]
    assert fused["rule"] == ("max_prob" if rule == "agreement" else rule)
    assert fused["difference"] <= 1e-4
    for found in fused["latency"]["1"].values():
        assert len(found) == 4
        assert min(found) > 0


def test_it_exits_where_pytorch_does(exported, monkeypatch):
    """Sample by sample, at thresholds between the samples, within limits on stages and MACs."""
    ensemble, runner, x = exported
    rule = runner.manifest["fused"]["rule"]
    scores = torch.stack([confidence_of(s.logits, rule, ensemble.calibration.temperature(n))
                          for n, s in enumerate(ensemble.stages(x))])  # fmt: skip
    confidence = float(scores[0].quantile(0.45))
    monkeypatch.setattr(runner, "_stages", None)  # nothing can run stage by stage
    seen = set()
    for limits in ({}, {"stages": 3}, {"macs": MACS[1]}, {"stages": 1}):
        for number in range(len(x)):
            if (scores[:, number] - confidence).abs().min() < 1e-6:
                continue
            sample, given = x[number : number + 1], {"confidence": confidence, "rule": rule, **limits}
            theirs = ensemble.predict(sample, Budget(**given))
            ours = runner.predict(sample.numpy(), RunnerBudget(**given))
            assert (ours.stages[0], ours.macs[0]) == (int(theirs.stages[0]), int(theirs.macs[0]))
            np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), rtol=0, atol=1e-4)
            seen.add((len(limits), int(ours.stages[0])))
    assert len({stages for _, stages in seen}) >= 3


def test_it_exits_at_fitted_thresholds(exported, monkeypatch):
    ensemble, runner, x = exported
    has_rule = runner.manifest["fused"]["rule"] == runner.manifest["exits"]["rule"]
    monkeypatch.setattr(runner, "_stages" if has_rule else "run_exits", None)  # agreement runs stage by stage
    for number in range(len(x)):
        theirs = ensemble.predict(x[number : number + 1], Budget(confidence="fitted"))
        ours = runner.predict(x[number : number + 1].numpy(), RunnerBudget(confidence="fitted"))
        assert ours.stages[0] == int(theirs.stages[0])
        np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), rtol=0, atol=1e-4)


def test_batches_deadlines_and_other_rules_run_stage_by_stage(exported, monkeypatch):
    _, runner, x = exported
    monkeypatch.setattr(runner, "run_exits", None)
    other = "entropy" if runner.manifest["fused"]["rule"] == "margin" else "margin"
    for batch, given in (
        (2, {"confidence": "fitted"}),
        (1, {"confidence": 0.5, "seconds": 9.0}),
        (1, {"confidence": 0.5, "rule": other}),
    ):
        assert runner.predict(x[:batch].numpy(), RunnerBudget(**given)).stages.min() >= 1


def test_a_batch_exits_with_its_least_confident_sample(exported):
    """As another program would run the graph."""
    ensemble, runner, x = exported
    rule, answers = runner.manifest["fused"]["rule"], [stage.logits for stage in ensemble.stages(x)]
    least = [
        float(confidence_of(logits, rule, ensemble.calibration.temperature(n)).min())
        for n, logits in enumerate(answers)
    ]
    session = runner._exits.graphs[0].session
    for number in range(4):
        thresholds = [value + 1e-5 for value in least[:number]] + [value - 1e-5 for value in least[number:]]
        given = {"x": x.numpy(), "thresholds": np.float32(thresholds)}
        logits, stages = session.run(["logits", "stages"], given)
        assert stages == number + 1
        np.testing.assert_allclose(logits, answers[number].numpy(), rtol=0, atol=1e-4)


# ---- traps


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    """Folder of an export of convolutional students as large as onnxruntime lays out anew."""
    folder = tmp_path_factory.mktemp("conv28")
    torch.manual_seed(5)
    run = write_run(folder / "run", lambda number: ConvStudent((16, 32)), (1, 28, 28))
    export_run(run, folder / "out", ExportOptions(fuse="exits"))
    return folder / "out"


def kernels(model, path):
    """Nodes, with those of branches, by domain and kind, after onnxruntime has optimised a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(nodes_of(onnx.load(str(path)).graph))


def nodes_of(graph):
    for node in graph.node:
        yield f"{node.domain}.{node.op_type}"
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def hoisted(model):
    """The naive way: the weights of all branches in the outer graph."""
    new = onnx.ModelProto()
    new.CopyFrom(model)

    def hoist(graph):
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    hoist(attribute.g)
                    new.graph.initializer.extend(attribute.g.initializer)
                    del attribute.g.initializer[:]

    hoist(new.graph)
    return new


def test_onnxruntime_optimises_a_branch_as_it_does_the_stage_alone(convolutions, tmp_path):
    """It does not where the weights of a branch lie in the outer graph."""
    stages = sorted(convolutions.glob("stage_*.onnx"))
    alone = sum((kernels(onnx.load(str(path)), tmp_path / path.name) for path in stages), Counter())
    model = onnx.load(str(convolutions / "exits.onnx"))
    ours, naive = kernels(model, tmp_path / "ours.onnx"), kernels(hoisted(model), tmp_path / "naive.onnx")
    assert ours["com.microsoft.nchwc.Conv"] + ours["com.microsoft.FusedConv"] == 8
    assert alone == Counter({kind: ours[kind] for kind in alone} | {".Gather": alone[".Gather"], ".Mul": alone[".Mul"]})
    if not alone["com.microsoft.nchwc.Conv"]:
        pytest.skip("onnxruntime does not lay convolutions out anew on this processor")
    assert naive["com.microsoft.nchwc.Conv"] == 2  # of the first stage alone


def test_weights_lie_in_the_branch_that_uses_them_and_nowhere_twice(convolutions):
    model = onnx.load(str(convolutions / "exits.onnx"))
    level, graph, names = 0, model.graph, []
    while graph is not None:
        names += [tensor.name for tensor in graph.initializer]
        used = {name for node in graph.node for name in node.input}
        assert {tensor.name for tensor in graph.initializer} <= used
        level += 1
        branches = [
            a.g for node in graph.node if node.op_type == "If" for a in node.attribute if a.name != "then_branch"
        ]
        graph = branches[0] if branches else None
    assert level == 4
    assert len(names) == len(set(names))
    stages = sum(path.stat().st_size for path in convolutions.glob("stage_*.onnx"))
    assert (convolutions / "exits.onnx").stat().st_size < 1.05 * stages


@pytest.mark.parametrize("stop", range(4))
def test_stages_after_the_exit_do_not_run(convolutions, stop, tmp_path):
    """By onnxruntime's own record of what it ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "record")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # names of nodes stay
    session = onnxruntime.InferenceSession(
        str(convolutions / "exits.onnx"), options, providers=["CPUExecutionProvider"]
    )
    given = {"x": np.zeros((1, 1, 28, 28), np.float32), "thresholds": np.float32(exit_after(stop, 4))}
    assert session.run(["stages"], given)[0] == stop + 1
    ran = [
        event["name"] for event in json.loads(Path(session.end_profiling()).read_text()) if event.get("cat") == "Node"
    ]
    assert {int(name[1]) for name in ran if name.startswith("s")} == set(range(1, stop + 2))


# ---- what is refused


def test_a_graph_that_exits_elsewhere_than_pytorch_is_refused(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", *KINDS["mlp"], figures("margin"))
    monkeypatch.setattr("bdistil.export.fusion.write_exits", swapped_rule)
    with pytest.raises(RunError, match="stopped after stage"):
        export_run(run, tmp_path / "out", ExportOptions(fuse="exits"))
    assert not (tmp_path / "out").exists()


def swapped_rule(folder, manifest, write=write_exits):
    """Declares the entropy for a graph of the margin."""
    return write(folder, manifest) | {"rule": "entropy"}


def test_one_stage_alone_needs_no_branch(tmp_path):
    run = write_run(tmp_path / "run", *KINDS["mlp"], rounds=1)
    manifest = export_run(run, tmp_path / "out", ExportOptions(fuse="exits"))
    assert [node.op_type for node in onnx.load(str(tmp_path / "out" / "exits.onnx")).graph.node].count("If") == 0
    assert manifest["fused"]["difference"] <= 1e-4


def test_real_outputs_have_no_exits(tmp_path):
    run = write_run(tmp_path / "run", *KINDS["mlp"])
    for number in range(4):
        path = run.root / "rounds" / f"{number:03d}" / "round.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"scale": [1.0] * 5, "offset": [0.0] * 5}))
    with pytest.raises(UserError, match="which real outputs and several labels do not have"):
        export_run(run, tmp_path / "out", ExportOptions(fuse="exits"))
