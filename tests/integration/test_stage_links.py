"""Whole runs of students that build on activations: cached and recomputed, resumed, loaded, cut down, exported."""

import copy
import json

import lightning as L
import numpy as np
import pytest
import torch
from helpers.toys import (
    CLASSES,
    FEATURES,
    Hook,
    Killed,
    boost,
    by_hand,
    control,
    curve,
    digests,
    fit,
    kill,
    ledger,
    make_teacher,
    samples,
    settings_for,
)
from torch import nn
from torch.utils.data import DataLoader

from bdistil import Budget, ProgressiveEnsemble, Rung, Student, UserError
from bdistil.boosting import part
from bdistil.export.run import ExportOptions, export_run
from bdistil.functional import kd_terms
from bdistil.runner import ExportedEnsemble
from bdistil.storage.run_directory import RunDirectory

LADDERS = {"deep": Rung(1, "deep"), "start": Rung(1, "start", at=1), "both": Rung(1, "deep", at=1)}


def make(round, width=1.0):
    stages = [nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()) for i, o in ((FEATURES, 7), (7, 5), (5, 6))]
    return Student(stages=stages, head=nn.Linear(6, CLASSES))


def settings(kind, **more):
    return settings_for(3, ladder=[Rung(0), LADDERS[kind]], **more)


@pytest.fixture(scope="module", params=LADDERS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    answers = []
    look = Hook(on_fit_end=lambda trainer, module: answers.append(ProgressiveEnsemble.load(folder)(samples(9, 5)[0])))
    boost(folder, student=make, settings=settings(request.param), callbacks=lambda: [look])
    return request.param, folder, answers


def test_prefixes_stay_as_they_are(run):
    """To the bit; also where the student is built by the user's function, as for classes that cannot be imported."""
    _, folder, answers = run
    x = samples(9, 5)[0]
    for ensemble in (ProgressiveEnsemble.load(folder), ProgressiveEnsemble.load(folder, student=make)):
        for stages, before in enumerate(answers, 1):
            assert torch.equal(ensemble(x, stages=stages), before)


def test_the_ledger_holds_exact_errors(run):
    """Although training read activations in 16 bits."""
    _, folder, _ = run
    expected = by_hand(ProgressiveEnsemble.load(folder), make_teacher(), samples(192, 11)[0])
    torch.testing.assert_close(ledger(folder)[1], expected.error, atol=2e-5, rtol=1e-5)


def test_macs_of_the_curve(run):
    kind, folder, _ = run
    rows = curve(folder)[1:]
    own = {"deep": FEATURES * 7 + 35 + 30, "start": 35 + 30, "both": 35 + 30}[kind] + 6 * CLASSES
    links = {"deep": 49 + 25, "start": 0, "both": 25}[kind] + 6 * CLASSES
    assert [int(row["link_macs"]) for row in rows] == [0, links, links]
    assert int(rows[2]["macs"]) - int(rows[1]["macs"]) == own + links
    assert [row["accepted_class"] for row in rows] == ["F0", LADDERS[kind].name, LADDERS[kind].name]


def test_what_is_cached_is_what_rounds_read(run):
    kind, folder, _ = run
    last = sorted(path.name for path in (folder / "ledger" / "train").glob("features.*"))
    keys = {"deep": ["1", "2"], "start": ["1"], "both": ["1", "2"]}[kind]
    assert [name for name in last if name.startswith("features.002")] == [
        *(f"features.002.{key}.f16" for key in keys), "features.002.f32",
    ]  # fmt: skip


def test_no_earlier_body_runs_while_a_round_is_trained(tmp_path):
    calls = []

    def watch(trainer, module):
        for student in module.earlier:
            student.body.stages[-1].register_forward_hook(lambda *_: calls.append(module.number))

    hooks = lambda: [Hook(on_train_start=watch, on_train_end=lambda *_: calls.append("end"))]  # noqa: E731
    boost(tmp_path, student=make, settings=settings("deep"), callbacks=hooks)
    assert calls[0] == calls[1] == "end"
    assert 2 not in calls[: calls.index("end", 2)]


@pytest.mark.parametrize("how", ["state", "size"])
def test_recomputed_activations_train_the_same_students(run, tmp_path, monkeypatch, how):
    """Up to the 16 bits of the cache; also where they are too large to be cached."""
    kind, folder, _ = run
    monkeypatch.setattr(part, "MOST_CACHED", 2)
    other = settings(kind, state="recompute") if how == "state" else settings(kind)
    boost(tmp_path / "run", student=make, settings=other)
    assert not list((tmp_path / "run").rglob("*.f16"))
    trained = [int(row["train_macs"]) for row in curve(tmp_path / "run")[2:]]
    assert trained[1] > trained[0]  # two earlier bodies run then
    x = samples(9, 5)[0]
    expected = ProgressiveEnsemble.load(folder)(x)
    torch.testing.assert_close(ProgressiveEnsemble.load(tmp_path / "run")(x), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("lost", ["nothing", "cache"])
def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path, lost):
    kind, folder, _ = run
    hooks = lambda: [Hook(on_train_epoch_end=lambda trainer, module: kill() if module.number == 2 else None)]  # noqa: E731
    with pytest.raises(Killed):
        boost(tmp_path / "run", student=make, settings=settings(kind), callbacks=hooks)
    if lost == "cache":
        for file in (tmp_path / "run").glob("ledger/*/features*"):
            file.unlink()
    fit(control(tmp_path / "run", student=make, settings=settings(kind)))
    assert digests(tmp_path / "run") == digests(folder)


def test_samples_that_left_take_their_activations_with_them(run):
    """Each sample is answered by its prefix, whoever else is in the batch."""
    _, folder, _ = run
    ensemble, x = ProgressiveEnsemble.load(folder), samples(40, 6)[0]
    runner = ensemble.stage_runner(x)
    runner.advance()
    rows = np.arange(0, 40, 3)
    runner.keep(rows)
    assert all(len(values) == len(rows) for values in runner.activations.values())
    torch.testing.assert_close(runner.step().logits, ensemble(x[rows], stages=2))
    runner.advance()
    assert not runner.activations  # nobody reads anything any more
    prediction = ensemble.predict(x, Budget(confidence=0.6))
    for stages in prediction.stages.unique().tolist():
        of = prediction.stages == stages
        torch.testing.assert_close(prediction.logits[of], ensemble(x[of], stages=stages))


def test_bodies_that_read_activations_do_not_run_together(run):
    _, folder, _ = run
    with pytest.raises(UserError, match="Take schedule='one'"):
        ProgressiveEnsemble.load(folder)(samples(2, 6)[0], schedule="all")


@pytest.mark.parametrize("options", [ExportOptions(), ExportOptions(fuse="all")])
def test_exported_graphs_hand_activations_on(run, tmp_path, options):
    kind, folder, _ = run
    manifest = export_run(RunDirectory(folder), tmp_path / "out", options)
    first = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"][1]["inputs"]
    keys = {"deep": "12", "start": "1", "both": "12"}[kind]
    assert {tensor["name"] for tensor in first} >= {f"activation_1_{key}" for key in keys} | {"features_1"}
    x = samples(37, 6)[0]
    runner, expected = ExportedEnsemble.load(tmp_path / "out"), ProgressiveEnsemble.load(folder)(x).numpy()
    given = runner.predict(x.numpy()).logits
    assert max(manifest["parity"]["differences"]) <= 1e-4
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_torch_archives_hand_activations_on(run, tmp_path):
    export_run(RunDirectory(run[1]), tmp_path / "out", ExportOptions(format="torch"))
    values = {"x": (x := samples(5, 6)[0])}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for stage in manifest["stages"]:
        program = torch.export.load(tmp_path / "out" / stage["file"]).module()
        given = program(*(values[tensor["name"]] for tensor in stage["inputs"]))
        values |= {tensor["name"]: value for tensor, value in zip(stage["outputs"], given, strict=True)}
    logits = values["total_3"] * manifest["stages"][2]["factor"]
    torch.testing.assert_close(logits, ProgressiveEnsemble.load(run[1])(x), atol=1e-4, rtol=1e-4)


# ---- the loss


def test_a_run_with_the_divergence_of_the_prefix_comes_nearer_to_the_teachers_classes(tmp_path):
    divergences = {}
    for loss in ("prefix_kl", "game"):
        folder, x = tmp_path / loss, samples(192, 11)[0]
        boost(folder, student=make, settings=settings("deep", loss=loss), trainer={"epochs": 12})
        assert all(row["margin_share"] for row in curve(folder)[1:])
        answers, goal = ProgressiveEnsemble.load(folder)(x), make_teacher().eval()(x).detach()
        divergences[loss] = nn.functional.kl_div(
            (answers / 2).log_softmax(-1), (goal / 2).log_softmax(-1), reduction="batchmean", log_target=True
        )
    assert divergences["prefix_kl"] < divergences["game"]


def test_both_losses_together(tmp_path):
    seen = []

    def look(trainer, module):
        g, s = module.ledger.rows(torch.arange(50))
        d = torch.randn(50, CLASSES, generator=torch.Generator().manual_seed(module.number))
        seen.append((module.loss(d, s, g), module.game.loss(d, s), module, d, s, g))

    boost(
        tmp_path, student=make, settings=settings("deep", loss="prefix_kl+game"),
        callbacks=lambda: [Hook(on_train_start=look)], trainer={"epochs": 1},
    )  # fmt: skip
    scale = json.loads((tmp_path / "rounds/000/round.json").read_text())["scale"]
    for loss, game, module, d, s, g in seen:
        prefix = (g + (s + d) / (module.number + 1)) * scale
        terms = kd_terms(prefix, g * scale, torch.zeros(50, dtype=torch.long), temperature=2.0)
        torch.testing.assert_close(loss, (module.number + 1) * terms.kl.mean() + 0.1 * game)
    assert len(seen) == 3


class Spectrum(nn.Module):
    """Complex activations."""

    def forward(self, x):
        return torch.fft.rfft(x)


class Magnitudes(nn.Module):
    def forward(self, z):
        return z.abs()


class StepsFirst(nn.Module):
    """Activations (M, B, C), as recurrent layers take them."""

    def forward(self, x):
        return x.view(len(x), 4, 2).transpose(0, 1)


class LastStep(nn.Module):
    def forward(self, h):
        return h[-1]


def test_two_depths_to_start_from_exclude_each_other(tmp_path):
    ladder = [Rung(0), START, Rung(1, "start", at=2)]
    with pytest.raises(
        UserError, match=r"round 3, of class F1-start1 after .* F1-start2, .* got 1.* leave one of the two out"
    ):
        boost(tmp_path / "run", student=make, settings=settings_for(3, ladder=ladder))


@pytest.mark.filterwarnings("ignore:The MACs of Student lack operators")
@pytest.mark.parametrize(
    ("first", "second", "width"),
    [
        (Spectrum(), Magnitudes(), FEATURES // 2 + 1),
        (StepsFirst(), LastStep(), 2),
        (nn.Linear(FEATURES, 7), nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 5)), 5),
    ],
    ids=["complex", "steps first", "large"],
)
def test_activations_that_16_bits_do_not_hold_are_computed_again(tmp_path, first, second, width):
    def made(round, width_=1.0):
        if isinstance(first, nn.Linear):
            nn.init.constant_(first.weight, 1e6)
        end = nn.Linear(width, 6)
        return Student(stages=copy.deepcopy([first, second, end]), head=nn.Linear(6, CLASSES))

    seen = []

    def look(trainer, module):
        if module.number:
            x, index = samples(192, 11)[0][:8], np.arange(8)
            module.student.eval()
            seen.append((module.answer(x, index, module.train_part) - module(x)).abs().max().item())
            module.student.train()

    given = settings_for(2, ladder=[Rung(0), Rung(1, "start", at=1)])
    boost(tmp_path, student=made, settings=given, callbacks=lambda: [Hook(on_train_start=look)])
    assert len(list(digests(tmp_path))) == 2
    assert seen == [0.0]


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 5, bias=False)

    def forward(self, x):
        return torch.relu(self.net(x))


class Total(nn.Module):
    def forward(self, h):
        return h.sum(1)


@pytest.mark.parametrize("kind", ["start", "deep"])
def test_samples_of_several_lengths(tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    items = [(torch.randn(4 + row % 5, 3, generator=generator), row % CLASSES) for row in range(64)]

    def padded(items):
        return nn.utils.rnn.pad_sequence([x for x, _ in items], True), torch.tensor([y for _, y in items])

    data = L.LightningDataModule()
    data.train_dataloader = lambda: DataLoader(items, 8, shuffle=True, collate_fn=padded)
    data.val_dataloader = lambda: DataLoader(items[:16], 8, collate_fn=padded)
    teacher = nn.Sequential(Total(), nn.Linear(3, CLASSES))
    made = lambda round: Student(stages=[Steps(), Total()], head=nn.Linear(5, CLASSES))  # noqa: E731
    rung = Rung(1, kind, at=1 if kind == "start" else 0)
    boost(tmp_path, data, teacher=teacher, student=made, settings=settings_for(2, ladder=[Rung(0), rung]))
    assert len(list(digests(tmp_path))) == 2


class Pair(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.one, self.two = nn.Linear(FEATURES, width), nn.Linear(3, width)

    def forward(self, x, more):
        return torch.relu(self.one(x) + self.two(more))


def test_x_of_several_parts(tmp_path):
    """Also restored from the disk, with the user's function, in a later round."""

    def items(count, seed):
        x, y = samples(count, seed)
        return [({"x": row, "more": row[:3]}, label) for row, label in zip(x, y, strict=True)]

    data = L.LightningDataModule()
    data.train_dataloader = lambda: DataLoader(items(64, 1), 16, shuffle=True)
    data.val_dataloader = lambda: DataLoader(items(32, 2), 16)
    made = lambda round: Student(stages=[Pair(), nn.Linear(7, 6)], head=nn.Linear(6, CLASSES))  # noqa: E731
    options = {
        "teacher": Pair(CLASSES),
        "student": made,
        "settings": settings_for(3, ladder=[Rung(0), Rung(1, "deep")]),
    }
    controller = boost(tmp_path, data, **options)
    assert len(controller.ensemble) == 3


def test_a_regression_has_no_divergence():
    with pytest.raises(UserError, match="to be 'game' or 'residual' for task 'regression', got 'prefix_kl'"):
        settings("deep", loss="prefix_kl", task="regression")


def test_students_without_stages_are_told_so_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        boost(tmp_path, settings=settings("deep"), trainer={"epochs": 1})
    said = [record.message for record in caplog.records if "has no stages" in record.message]
    assert said == ["Student has no stages: rungs of the kinds 'deep' and 'start' link to its features."]


def test_stages_that_do_not_fit_are_found_before_anything_is_trained(tmp_path):
    def other(round, width=1.0):
        wide = 7 + round
        stages = [nn.Linear(FEATURES, wide), nn.Linear(wide, 6)]
        return Student(stages=stages, head=nn.Linear(6, CLASSES))

    start = settings_for(3, ladder=[Rung(0), Rung(1, "start", at=1)])
    with pytest.raises(UserError, match=r"Stage 2 of the student cannot take its input of \(2, 7\)"):
        boost(tmp_path / "run", student=other, settings=start)
    assert not list((tmp_path / "run").rglob("*.f32"))
    assert not (tmp_path / "run" / "config.yaml").exists()


START = Rung(1, "start", at=1)


@pytest.mark.parametrize(
    ("ladder", "classes"),
    [
        ([Rung(0, width=2), START], "round 2, of class F1-start1 after one of class F0 x2"),
        ([Rung(0), START, Rung(1, "deep", width=2)], "round 3, of class F1-start1 after one of class F1-deep x2"),
        ([Rung(0), START, Rung(1, width=2)], "round 3, of class F1-start1 after one of class F1 x2"),
    ],
)
def test_each_class_is_tried_after_each_other_before_anything_is_trained(tmp_path, ladder, classes):
    def wider(round, width=1.0):
        stages = [nn.Linear(FEATURES, int(7 * width)), nn.Linear(int(7 * width), 6)]
        return Student(stages=stages, head=nn.Linear(6, CLASSES))

    with pytest.raises(
        UserError, match=rf"The student of {classes}, cannot be used\. Stage 2 .* of \(2, 14\).* same `width`"
    ):
        boost(tmp_path / "run", student=wider, settings=settings_for(3, ladder=ladder))
    assert not (tmp_path / "run" / "config.yaml").exists()
