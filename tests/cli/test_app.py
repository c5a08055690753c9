"""The command line as a user meets it: the commands on a small real run, and one message for each mistake."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version

import pytest
import yaml

from bdistil import Budget, ProgressiveEnsemble
from bdistil.callbacks import RoundController
from bdistil.cli.app import _overview, main
from bdistil.cli.commands import COMMANDS, EXAMPLES
from bdistil.ensemble.calibration import load_calibration
from bdistil.evaluation import evaluate_budgets
from bdistil.storage.run_directory import CURVE_COLUMNS, RunDirectory

pytestmark = pytest.mark.pictures

SMALL = [
    "fit", "--config", "digits", "--model.boosting.rounds", "2", "--trainer.max_epochs", "1",
    "--model.teacher.epochs", "1", "--model.teacher.network.channels", "[4,8]", "--trainer.accelerator", "cpu",
    "--tracking.mode", "disabled", "--data.batch_size", "500",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "digits"
    assert main([*SMALL, "--run_dir", str(folder)]) == 0
    return RunDirectory(folder)


def failed(capsys, *args):
    """Exit status and message of a command that fails."""
    try:
        status = main(list(args))
    except SystemExit as end:  # the parser's own way
        status = end.code
    return status, capsys.readouterr().err


def test_fit_leaves_a_whole_run_directory(run):
    assert run.committed() == 2
    assert run.teacher.is_file()
    assert run.picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<html" in run.report.read_text()
    rows = run.read_curve()
    assert [row["stage"] for row in rows] == ["teacher", "1", "2"]
    assert list(rows[0]) == list(CURVE_COLUMNS)
    assert all(float(row["test_accuracy"]) > 0 for row in rows)


def test_config_is_resolved_and_starts_the_same_run_again(run, capsys):
    config = yaml.safe_load(run.config.read_text())
    assert config["model"]["boosting"]["rounds"] == 2
    assert config["model"]["boosting"]["eta"] == 0.5
    assert config["data"]["class_path"] == "bdistil.data.digits.Digits"
    before = run.curve.read_bytes()
    assert main([*SMALL, "--run_dir", str(run.root)]) == 0
    assert "teacher" in capsys.readouterr().out
    assert run.curve.read_bytes() == before


def test_fit_prints_the_curve_as_a_table(run, capsys):
    assert main(["report", "--run_dir", str(run.root)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^teacher +\S+", out, re.M)
    assert re.search(r"^ +2 +\S+", out, re.M)
    assert str(run.picture) in out


def test_evaluate_within_budgets(run, capsys):
    ensemble = ProgressiveEnsemble.load(run.root)
    answers = {}
    for stages in (1, 2):
        assert main(["evaluate", "--run_dir", str(run.root), "--budget.stages", str(stages), "--json"]) == 0
        answers[stages] = json.loads(capsys.readouterr().out)
    assert [answers[s]["average_macs"] for s in (1, 2)] == ensemble.macs
    rows = run.read_curve()
    assert [answers[s]["accuracy"] for s in (1, 2)] == pytest.approx([float(r["test_accuracy"]) for r in rows[1:]])
    assert answers[1]["decided_share"] == [1.0, 0.0]
    assert main(["evaluate", "--run_dir", str(run.root), "--budget.macs", "1", "--part", "val"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"samples +500", out)
    assert re.search(rf"average_macs +{ensemble.macs[0]:,}", out)


def test_fit_leaves_what_stopping_early_needs(run, capsys):
    figures = load_calibration(run)
    target = "lose at most 1 point with probability 0.9"
    assert (figures.count, figures.exits.rule, figures.exits.target) == (2, "max_prob", target)
    assert (figures.exits.promise.samples, figures.exits.promise.validation) == (400, 500)
    assert (
        main(["evaluate", "--run_dir", str(run.root), "--budget.confidence", "fitted", "--part", "val", "--json"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["accuracy"] == pytest.approx(figures.exits.accuracy, abs=1e-4)
    assert answer["answered_macs"] == round(figures.exits.average_macs)  # whatever ran
    assert answer["answered_macs"] <= answer["average_macs"]


def test_calibrate_fits_again(run, capsys):
    args = ["calibrate", "--run_dir", str(run.root), "--rule", "margin"]
    assert main([*args, "--average_macs", "20000", "--json"]) == 0
    figures = load_calibration(run)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(figures.to_dict()))
    assert (figures.exits.rule, figures.exits.target) == ("margin", "average at most 20,000 MACs")
    assert "average at most 20,000 MACs" in run.report.read_text()
    assert main(args) == 0
    out = capsys.readouterr().out
    line = (
        r"^margin, to lose at most 1 point with probability 0.9: accuracy 0\.\d+ on validation, where all stages have"
    )
    assert re.search(line, out, re.M)
    assert main([*args, "--max_loss", "2", "--delta", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "lose at most 2 points with probability 0.95" in out
    assert "at most 2 points of accuracy with probability 0.95" in run.report.read_text()
    assert main([*args, "--max_loss", "0.2", "--delta", "none"]) == 0
    assert "lose at most 0.2 points of the validation part (naive)" in capsys.readouterr().out
    assert "A naive fit, which promises nothing for new samples" in run.report.read_text()
    assert load_calibration(run).exits.promise is None
    before = (run.root / "anytime.json").read_bytes()
    status, message = failed(capsys, *args, "--average_macs", "1")
    assert status == 2
    assert "`average_macs` >= " in message
    assert (run.root / "anytime.json").read_bytes() == before  # a mistake costs nothing


def test_figures_within_seconds_are_of_the_batch_size(run, monkeypatch):
    predict, sizes = ProgressiveEnsemble.predict, set()
    monkeypatch.setattr(
        ProgressiveEnsemble, "predict", lambda self, x, budget: sizes.add(len(x)) or predict(self, x, budget)
    )
    (row,) = evaluate_budgets(run, [Budget(seconds=1.0)], "val", batch_size=30)
    assert sizes == {1, 30, 500 % 30}
    assert row["samples"] == 500


@pytest.mark.parametrize(("sweep", "budgets"), [("stages", 2), ("macs", 2), ("seconds", 6), ("confidence", 7)])
def test_a_sweep_has_a_row_for_each_budget_beside_the_teacher(run, capsys, tmp_path, sweep, budgets):
    table, picture = tmp_path / "sweep.csv", tmp_path / "sweep.png"
    args = ["evaluate", "--run_dir", str(run.root), "--sweep", sweep, "--batch_size", "32", "--part", "val"]
    assert main([*args, "--csv", str(table), "--picture", str(picture), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 1 + budgets
    assert rows[0]["budget"] == "teacher"
    assert rows[0]["accuracy"] == run.read("teacher")["val_accuracy"]
    assert all(row["budget"].startswith(f"{sweep}=") for row in rows[1:])
    assert all(0 < row[f"{call}_ms_p50"] <= row[f"{call}_ms_p95"] for row in rows[1:] for call in ("single", "batch"))
    if sweep in ("stages", "macs"):
        curve = run.read_curve()
        assert [row["accuracy"] for row in rows] == pytest.approx([float(row["val_accuracy"]) for row in curve])
        for key in ("average_macs", "answered_macs"):
            assert [row[key] for row in rows] == [int(row["macs"]) for row in curve]
    with open(table, newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["budget"] for row in written] == [row["budget"] for row in rows]
    assert written[1]["decided_share"].split() == [str(share) for share in rows[1]["decided_share"]]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_sweep_for_the_terminal(run, capsys):
    assert main(["evaluate", "--run_dir", str(run.root), "--sweep", "stages", "--batch_size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "--------", "teacher", "stages=1", "stages=2"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--sweep", "stages", "--budget.stages", "1"], "`budget.stages` to be unset as `sweep` varies it"),
        (["--sweep", "watts"], "watts"),
        (["--batch_size", "0"], "`batch_size` to be >= 1, got 0"),
        (["--budget.confidence", "fitted", "--budget.rule", "agreement"], "budget has rule='agreement'"),
    ],
)
def test_evaluations_that_contradict_themselves(run, capsys, args, names):
    status, message = failed(capsys, "evaluate", "--run_dir", str(run.root), *args)
    assert status == 2
    assert names in message


def test_a_file_that_cannot_be_written_is_named(run, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    target = str(tmp_path / "file" / "sweep.csv")
    status, message = failed(capsys, "evaluate", "--run_dir", str(run.root), "--batch_size", "1", "--csv", target)
    assert status == 1
    assert "the table of the evaluation" in message


def test_folders_of_files_are_made(run, capsys, tmp_path):
    files = ["--csv", str(tmp_path / "new" / "a.csv"), "--picture", str(tmp_path / "other" / "a.png")]
    assert main(["evaluate", "--run_dir", str(run.root), "--batch_size", "1", *files]) == 0
    assert "average_macs" in capsys.readouterr().out
    assert (tmp_path / "new" / "a.csv").exists()
    assert (tmp_path / "other" / "a.png").exists()


def test_profile_lists_teacher_and_stages(run, capsys):
    assert main(["profile", "--run_dir", str(run.root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in rows] == ["teacher", 1, 2]
    assert [row["cumulative_macs"] for row in rows[1:]] == ProgressiveEnsemble.load(run.root).macs
    assert rows[2]["link_macs"] > 0
    assert all(row["latency_ms"] > 0 for row in rows)
    assert set(rows[0]) == set(rows[1])
    assert rows[0]["latency_ms"] == pytest.approx(run.read("teacher")["latency_ms"], abs=1e-3)
    assert main(["profile", "--run_dir", str(run.root), "--batch_size", "4"]) == 0
    assert "cumulative_macs" in capsys.readouterr().out
    assert main(["profile", "--run_dir", str(run.root), "--batch_size", "4", "--json"]) == 0
    for one, four in zip(rows[1:], json.loads(capsys.readouterr().out)[1:], strict=True):
        assert all(one[key] == four[key] for key in ("macs", "link_macs", "params"))
        assert one["activation_bytes"] < four["activation_bytes"]


def test_recipes_are_listed_with_their_first_line(capsys):
    assert main(["recipes"]) == 0
    assert re.search(r"^digits +5,000 real MNIST digits", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_the_overview_names_every_command(args, capsys):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", out, re.M) for name in ("fit", *COMMANDS))


@pytest.mark.parametrize("command", ["fit", *COMMANDS])
def test_help_of_a_command_is_short_and_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert len(out.splitlines()) < 600
    assert "--run_dir" in out or command == "recipes"
    assert out.startswith(f"usage: bdistil {command}")
    usage, says, *_ = out.split("\n\n")
    assert len(usage.splitlines()) < 10
    assert " ".join(says.split())[:40] in _overview()
    example = EXAMPLES.get(command, "")
    assert " ".join(out.split()).endswith(example)
    assert all(word in out.split("Example:")[0] for word in example.split() if word.startswith("--"))


def test_help_of_fit_has_what_is_ours_before_what_is_lightnings(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    out = capsys.readouterr().out
    places = [out.index(f"  {name} ") for name in
              ("-c", "--model.boosting.rounds", "--data", "--tracking.mode", "--trainer.max_epochs")]  # fmt: skip
    assert places == sorted(places)
    assert "`bdistil recipes` lists" in " ".join(out.split())


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"bdistil {version('bdistil')}, torch 2")


def test_print_config_shows_the_resolved_recipe(capsys):
    with pytest.raises(SystemExit) as end:
        main([*SMALL, "--print_config"])
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["student"]["class_path"] == "bdistil.models.ConvStudent"
    assert shown["trainer"]["max_epochs"] == 1


MISTAKES = [
    (["fitt"], "'fitt'", "Did you mean 'fit'"),
    (["fit", "--config", "digits", "--rounds", "3"], "--rounds", "Did you mean 'model.boosting.rounds'"),
    (["fit", "--config", "digits", "--run-dir", "d"], "--run-dir", "Did you mean 'run_dir'"),
    (
        ["fit", "--config", "digits", "--model.student.channels", "[6,", "12]"],
        '"channels"',
        "Expected a list without spaces, or in quotes. Got value: [6,",
    ),
    (["fit", "--config", "digits", "--model.boosting.loss", "gme"], "'game'", "Did you mean 'game'?"),
    (["fit", "digits"], "digits", "Every value follows an option, such as --config"),
    (["evaluate", "--run_dir", "none", "--confidence", "0.9"], "--confidence", "Did you mean 'budget.confidence'"),
    (["fit", "--config", "digit"], "'digit'", "Did you mean 'digits'"),
    (["fit", "--config", "digits", "--model.boosting.rouns", "3"], "rouns", "Did you mean 'model.boosting.rounds'"),
    (["fit", "--config", "digits", "--model.boosting.round", "3"], "unrecognized", "model.boosting.rounds"),
    (["fit", "--config", "digits", "--model.boosting.rounds", "many"], "model.boosting.rounds", "many"),
    (["fit", "--config", "digits", "--model.boosting.rounds", "0"], "`rounds`", "got 0"),
    (["fit", "--config", "digits", "--model.boosting.eta", "-1"], "`eta`", "got -1.0"),
    (
        ["fit", "--config", "digits", "--model.boosting.kappa", "1", "--model.boosting.gamma", "2"],
        "`kappa` or `gamma`",
        "Leave one out",
    ),
    (
        ["fit", "--config", "digits", "--model.boosting.ladder", "[{links:0}]"],
        "model.boosting.ladder",
        "colon of a key: {links: 0}",
    ),
    (["fit", "--config", "digits", "--model.student.wdith", "3"], "wdith", "Did you mean 'width'"),
    (["fit", "--config", "digits", "--model.teacher.checkpoint", "none.pt"], "checkpoint", "'none.pt'"),
    (["fit", "--config", "digits", "--data.batch_size", "0"], "`batch_size`", "got 0"),
    (["fit", "--config", "digits", "--data.batch_siz", "9"], "batch_siz", "Did you mean 'batch_size'"),
    (["fit", "--config", "digits", "--data.split_seed", "abc"], "split_seed", "a whole number. Got value: abc"),
    (["fit", "--config", "digits", "--data", "Digit"], 'key "data"', "Digit"),
    (["fit", "--config", "digits", "--model.optimizer", "torch.optim.SGDD"], "model.optimizer", "attribute 'SGDD'"),
    (
        ["fit", "--config", "digits", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lrr", "0.1"],
        "'lrr'",
        "Did you mean 'lr'",
    ),
    (["fit", "--config", "digits", "--model.boosting.ladder", '[{"linkz": 1}]'], "'linkz'", "Did you mean 'links'"),
    (["fit", "--config", "digits", "--run_dir", "/proc/nowhere"], "`run_dir`", "/proc/nowhere"),
    (["fit"], "required: --model.teacher.network, --model.student, --data", "bdistil fit --config digits"),
    (["evaluate"], "required", "--run_dir"),
    (["evaluate", "--run_dir", "none"], "none", "bdistil fit"),
    (["profile", "--run_dir", "none"], "none", "bdistil fit"),
    (
        ["fit", "--config", "digits", "--trainer.max_epochs", "ten"],
        "max_epochs",
        "a whole number\n    - or null\n  Given value: ten",
    ),
    (
        ["export", "--run_dir", "none", "--fuse", "exit"],
        "fuse",
        "one of 'all', 'exits'\n    - or null\n  Given value: exit",
    ),
    (["evaluate", "--run_dir", "none", "--budget.stage", "1"], "budget.stage", "Did you mean 'budget.stages'"),
    (["evaluate", "--run_dir", "none", "--budget.stages", "0"], "`stages`", "got 0"),
    (["evaluate", "--run_dir", "none", "--budget.confidence", "2"], "`confidence`", "(0, 1]"),
    (["evaluate", "--run_dir", "none", "--budget.rule", "margin"], "`rule`", "without confidence"),
    (["evaluate", "--run_dir", "none", "--budget.confidence", "sure"], "budget.confidence", "sure"),
    (["calibrate", "--run_dir", "none"], "none", "bdistil fit"),
    (["calibrate", "--run_dir", "none", "--rule", "luck"], "rule", "luck"),
    (["calibrate", "--run_dir", "none", "--max_loss", "1", "--average_macs", "2"], "`average_macs`", "Give one"),
    (["calibrate", "--run_dir", "none", "--delta", "2"], "`delta`", "in 0 … 1 or 'none', got 2.0"),
]


@pytest.mark.parametrize(("args", "names", "helps"), MISTAKES, ids=[" ".join(a[-2:]) for a, _, _ in MISTAKES])
def test_a_mistake_gets_one_message(args, names, helps, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, message = failed(capsys, *args)
    assert status == 2
    assert names in message
    assert helps in message
    assert "Traceback" not in message
    assert "NestedArg" not in message
    assert "Union" not in message
    assert "typing." not in message
    assert "Namespace" not in message
    assert "Expected a path" not in message
    assert len(message) < 1000
    assert not list(tmp_path.glob("runs/*/rounds/*"))


def test_another_configuration_is_refused_with_what_differs(run, capsys):
    status, message = failed(capsys, *SMALL, "--run_dir", str(run.root), "--model.boosting.eta", "0.7")
    assert status == 2
    assert "model.boosting.eta: 0.5 there, 0.7 now" in message
    assert run.committed() == 2


def test_a_failed_run_exits_with_1(tmp_path, capsys):
    """The learning rate of the teacher makes its logits NaN: no round is committed."""
    status, message = failed(
        capsys, *SMALL, "--run_dir", str(tmp_path / "run"), "--model.teacher.lr", "1e30", "--model.teacher.epochs", "2"
    )
    assert status == 1
    assert "NaN or infinity in the teacher's logits" in message
    assert RunDirectory(tmp_path / "run").committed() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_exits_with_1_and_says_how_to_go_on(tmp_path, capsys, caplog, monkeypatch, number):
    """A signal to a real fit, sent by a hook in its second round."""
    hook = RoundController.on_train_epoch_start

    def terminate(self, trainer, pl_module):
        hook(self, trainer, pl_module)
        if self.number == 1:
            os.kill(os.getpid(), number)

    run = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(RoundController, "on_train_epoch_start", terminate)
        status, message = failed(capsys, *SMALL, "--run_dir", str(run.root))
    assert status == 1
    assert (caplog.text + message).count("interrupted with 1 of 2 rounds committed") == 1
    assert run.committed() == 1
    assert main([*SMALL, "--run_dir", str(run.root)]) == 0
    assert run.committed() == 2


@pytest.mark.slow
def test_a_strategy_of_its_own_class_is_made_anew_for_every_round(tmp_path):
    """In a process of its own, as it makes a process group."""
    strategy = [
        "--trainer.strategy",
        "lightning.pytorch.strategies.DDPStrategy",
        "--trainer.strategy.timeout",
        "0:01:00",
        "--trainer.strategy.cluster_environment",
        "lightning.fabric.plugins.environments.LightningEnvironment",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bdistil.cli", *SMALL, "--run_dir", str(tmp_path / "run"), *strategy],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert RunDirectory(tmp_path / "run").committed() == 2


def test_tables_are_printed_to_a_narrow_terminal_that_has_only_ascii(run):
    command = [sys.executable, "-m", "bdistil.cli", "profile", "--run_dir", str(run.root)]
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "20"}
    done = subprocess.run(command, capture_output=True, env=environ, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len({len(line) for line in done.stdout.decode("ascii").splitlines()}) == 1


def test_a_rung_takes_nothing_from_the_default_ladder(tmp_path, capsys):
    """Which has three rungs, too; the third is of kind `hidden`."""
    ladder = "[{links: 0}, {links: 1}, {links: 1, width: 2}]"
    recipe = tmp_path / "wide.yaml"
    recipe.write_text(f"model: {{boosting: {{ladder: {ladder}}}}}")
    for given in (["--model.boosting.ladder", ladder], ["--config", str(recipe)]):
        with suppress(SystemExit):
            main(["fit", "--config", "digits", *given, "--print_config"])
        rungs = yaml.safe_load(capsys.readouterr().out)["model"]["boosting"]["ladder"]
        assert [(rung["kind"], rung["width"]) for rung in rungs] == [("concat", 1.0), ("concat", 1.0), ("concat", 2.0)]


def test_mappings_of_the_user_with_fields_of_a_rung_stay_as_they_are(tmp_path, capsys):
    layers = [{"width": 3}, {"kind": "conv", "width": 2}]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"data: {{class_path: helpers.options.Layered, init_args: {{layers: {json.dumps(layers)}}}}}")
    for given in (
        ["--config", str(recipe)],
        ["--data", "helpers.options.Layered", "--data.layers", json.dumps(layers)],
    ):
        with suppress(SystemExit):
            main(["fit", "--config", "digits", *given, "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["layers"] == layers
