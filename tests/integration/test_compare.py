"""`bdistil compare`, with real processes: its files, a start that goes on, what is refused before training."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from helpers.paper_files import write_cifar10
from helpers.processes import BUSY, started
from helpers.toys import settings_for
from helpers.wandb_offline import finished_runs

from bdistil.cli.app import main
from bdistil.cli.compare import Training, _finished, _reached
from bdistil.comparison.methods import MEANING, Cell
from bdistil.comparison.students import plan_students
from bdistil.ensemble.budget import Budget
from bdistil.evaluation.evaluate import evaluate_budgets
from bdistil.models import ConvStudent
from bdistil.storage.run_directory import FORMAT, RunDirectory

SMALL = [
    "--config", "cifar10-resnet56", "--data.partial", "true", "--data.num_workers", "0", "--data.validation", "10",
    "--data.batch_size", "16", "--model.teacher.network.depth", "8", "--model.teacher.network.channels", "[4,4,8,8]",
    "--model.student.channels", "[2,2,4,4]", "--model.teacher.epochs", "2", "--model.teacher.warmup", "1",
    "--model.boosting.rounds", "2", "--model.boosting.accept", "margin", "--model.boosting.margin_share", "0",
    "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
]  # fmt: skip
CONV, IMAGE = settings_for(3), torch.zeros(1, 1, 28, 28)
INDEPENDENT, CONVEX = (
    [{"class_path": "bdistil.callbacks.LossMixing", "init_args": {"settings": {"mode": mode}}}]
    for mode in ("independent", "convex")
)


def make_conv(round, width=1.0):
    return ConvStudent((8, 16), width=width)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    write_cifar10(root, each=3)
    return root


def command(root, output, *more):
    return ["compare", *SMALL, "--data.root", str(root), "--output", str(output), *more]


def table(output):
    with open(output / "compare.csv", newline="") as file:
        return list(csv.DictReader(file))


def results(output):
    """What two comparisons have in common: all but times."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "latency_ms")} for row in table(output)]


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    """A comparison of two methods, one seed."""
    output = tmp_path_factory.mktemp("compare") / "small"
    assert main(command(root, output, "--methods", "bdistil", "joint", "teacher", "--seeds", "1")) == 0
    return output


def test_every_prefix_of_every_method_has_a_row(done):
    rows = table(done)
    found = [(row["method"], row["prefix"]) for row in rows]
    assert found == [("teacher", "1"), ("bdistil", "1"), ("bdistil", "2"), ("joint", "1"), ("joint", "2")]
    teacher, first, last, _, joint = ({key: float(row[key]) for key in ("macs", "train_macs")} for row in rows)
    assert [row["macs"] for row in rows[1:3]] == [row["macs"] for row in rows[3:]]
    seen = first["train_macs"] / (3 * first["macs"] + teacher["macs"])  # the recipe asks the teacher for every batch
    assert joint["train_macs"] == seen * (3 * last["macs"] + teacher["macs"])
    assert all(float(row["latency_ms"]) > 0 for row in rows[1:])


def test_figures_are_those_of_the_run_and_the_test_part_is_read_for_them_alone(done):
    run = RunDirectory(done / "runs" / "bdistil-seed0")
    assert run.read("test") is None
    evaluated = evaluate_budgets(run, [Budget(stages=1), Budget(stages=2)], batch_size=1)
    figures = [row["test_accuracy"] for row in table(done)[1:3]]
    assert [float(figure) for figure in figures] == pytest.approx([row["accuracy"] for row in evaluated], abs=1e-6)


def test_the_teacher_is_trained_once_and_asked_once_a_seed(done):
    first, joint = (done / "runs" / f"{name}-seed0" for name in ("bdistil", "joint"))
    teachers = sorted(path.parent.name for path in done.rglob("teacher.safetensors"))
    assert teachers == ["teacher-seed0"]
    assert "Evaluating the teacher" in (first / "log.txt").read_text()
    assert "Evaluating the teacher" not in (joint / "log.txt").read_text()


def test_tables_in_markdown_have_a_row_for_each_method(done):
    lines = (done / "compare.md").read_text().splitlines()
    assert sum(line.startswith("| bdistil |") for line in lines) == 2
    assert any(line.startswith("| prefix | joint |") for line in lines)


def test_page_and_pictures_stand_alone(done):
    page = (done / "report.html").read_text()
    assert "http" not in page.split("<details>")[0].replace("http-equiv", "")
    assert "bdistil against the others" in page
    for name in ("compare-macs", "compare-latency", "compare-calibration"):
        assert (done / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_wandb_has_a_run_for_each_training_and_a_summary_in_one_group(done):
    runs = [found.run for found in finished_runs(done)]
    names = sorted(run["name"] for run in runs)
    assert {run["run_group"] for run in runs} == {"small"}
    assert names == ["bdistil-seed0", "joint-seed0", "summary"]


def test_the_same_command_trains_nothing_again(done, root, capsys):
    before = {path: path.stat().st_mtime for path in done.rglob("*.safetensors")}
    rows = results(done)
    assert main(command(root, done, "--methods", "bdistil", "joint", "--seeds", "1")) == 0
    assert {path: path.stat().st_mtime for path in done.rglob("*.safetensors")} == before
    assert results(done) == rows
    assert " of 3:" not in capsys.readouterr().out


def test_a_report_of_what_is_finished_trains_nothing(done, root, tmp_path, capsys):
    output = tmp_path / "copy"
    shutil.copytree(done, output)
    shutil.rmtree(output / "runs" / "bdistil-seed0")
    wanted = [row for row in results(done) if row["method"] != "bdistil"]
    methods = ("--methods", "bdistil", "joint", "resched", "--seeds", "2", "--report_only", "true")
    assert main(command(root, output, *methods)) == 0
    assert results(output) == wanted
    assert "2 of 7 trainings are finished" in capsys.readouterr().out
    assert "joint" in (output / "report.html").read_text()
    assert sorted(path.name for path in (output / "runs").iterdir()) == ["joint-seed0", "teacher-seed0"]
    assert main(command(root, output, "--methods", "resched", "--report_only", "true")) == 2
    assert "Expected finished trainings of resched in `output`" in capsys.readouterr().err
    assert main(command(root, tmp_path / "typo", "--report_only", "true")) == 2
    assert "got none. Leave it out to begin it" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_other_options_are_refused_in_the_same_folder(done, root, capsys):
    assert main(command(root, done, "--methods", "bdistil", "--model.boosting.eta", "0.7")) == 2
    assert "holds a comparison of another recipe or with other options" in capsys.readouterr().err


def test_a_file_of_somebody_else_is_not_replaced(root, tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert main(command(root, tmp_path, "--methods", "bdistil")) == 2
    assert "has a file report.html, which would be replaced. Choose another folder" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("recipe.yaml", "holds a comparison without its recipe.yaml"),
        ("options.json", "holds a comparison without its options.json"),
        ("origin.json", "holds a comparison without its origin.json"),
        ("runs/teacher-seed0/teacher.safetensors", "the weights of the teacher of this comparison"),
    ],
)
def test_a_comparison_without_one_of_its_files_is_refused(done, root, tmp_path, capsys, file, message):
    output = shutil.copytree(done, tmp_path / "small")
    (output / file).unlink()
    assert main(command(root, output, "--methods", "bdistil", "joint", "--seeds", "1")) == 2
    assert message in capsys.readouterr().err


def test_widths_beside_a_run_need_only_the_small_files_of_its_cells(tmp_path):
    """Those that an archive keeps: the row of the teacher is not among them."""
    planned = plan_students(make_conv, CONV, IMAGE, widths=True)
    cell = Cell("bdistil", 0, "bdistil")
    run, rows = RunDirectory(cell.folder(tmp_path)), [{"macs": macs} for macs in planned.prefix_macs]
    run.write("figures", rows)
    for number, row in enumerate(rows):
        run.write(f"rounds/{number:03d}/round", {"format": FORMAT, "curve": row})
    inputs = SimpleNamespace(model=SimpleNamespace(make_student=make_conv), x=IMAGE)
    assert _reached(Training(tmp_path, [], [], 1, 1, inputs, planned), cell) == planned


def test_a_prefix_of_the_oracle_is_reported_once_both_losses_are_trained(tmp_path):
    settings = settings_for(2, loss="prefix_kl")
    planned = plan_students(make_conv, settings, IMAGE, widths=True)
    inputs = SimpleNamespace(model=SimpleNamespace(boosting=settings))
    for name in ("no_resched-1", "no_resched-1-game", "no_resched-2"):
        RunDirectory(Cell("no_resched", 0, name).folder(tmp_path)).write("figures", [])
    cells = _finished(Training(tmp_path, [], ["no_resched"], 1, 1, inputs, planned))
    assert [cell.name for cell in cells] == ["no_resched-1", "no_resched-1-game"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "bdistil", "boosting"], "got bdistil, boosting"),
        (["--methods", "bdistil", "no_reshed"], "got bdistil, no_reshed"),
        (["--seeds", "two"], "argument --seeds: invalid int value: 'two'"),
        (["--seeds", "0"], "Expected `seeds` and `workers` >= 1, got 0 and 1"),
        (["--model.boosting.round", "2"], "Did you mean 'model.boosting.rounds'"),
        (["--model.mekd.queries", "1000"], "got one with `model.mekd`"),
        (["--method", "bdistil"], "got `--method`. Did you mean `--methods`?"),
        (["--run_dir", "here"], "`--run_dir` is set by the comparison for each training: give `--output` instead"),
        (["--seed_everything", "3"], "give `--seeds` instead"),
        (["--config", "digits"], "Expected one `--config`, got several"),
        (["--trainer.fast_dev_run", "true"], "got `trainer.fast_dev_run`, of which nothing is kept"),
        (["--trainer.devices", "2"], "Expected one process for each training, got 2. Give --trainer.devices 1"),
        (["--methods", "teacher"], "Expected `methods` to be some of bdistil, no_resched"),
        (["--trainer.callbacks", json.dumps(INDEPENDENT)], "Expected `mode` of the mixing settings to be 'convex'"),
        (
            ["--trainer.callbacks", json.dumps(CONVEX)],
            "LossMixing of the recipe mixes labels, got resched, joint",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_is_trained(root, tmp_path, capsys, options, message):
    with suppress(SystemExit):  # of the parser
        assert main(command(root, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # the right command finds a folder of nobody


def test_the_help_says_what_the_methods_mean(capsys):
    with suppress(SystemExit):
        main(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{method}: {meaning}" in said for method, meaning in MEANING.items())


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_command_goes_on_afterwards(root, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(root, output, "--methods", "bdistil", "--seeds", "1")) == 0
    blocked = output / "runs" / "joint-seed0"
    (blocked / "config.yaml").mkdir(parents=True)  # nothing can be written there
    assert main(command(root, output, "--methods", "bdistil", "joint", "--seeds", "1")) == 1
    assert f"joint, seed 0, failed; its log is {blocked / 'log.txt'}" in capsys.readouterr().err
    (blocked / "config.yaml").rmdir()
    assert main(command(root, output, "--methods", "bdistil", "joint", "--seeds", "1")) == 0


@pytest.mark.slow
def test_all_methods_have_all_prefixes(root, tmp_path):
    methods = ["bdistil", "no_resched", "resched", "links_only", "residual", "joint"]
    assert main(command(root, tmp_path / "all", "--methods", *methods, "--seeds", "1")) == 0
    found = [(row["method"], row["prefix"]) for row in table(tmp_path / "all")]
    assert found == [("teacher", "1"), *((method, prefix) for method in methods for prefix in ("1", "2"))]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_ends_as_if_nothing_had_happened(root, tmp_path):
    methods = ["--methods", "bdistil", "joint", "--seeds", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(root, whole, *methods)) == 0
    start = [sys.executable, "-m", "bdistil.cli", *command(root, killed, *methods, "--workers", "2")]

    def trainings():
        return len(list(killed.glob("runs/*/config.yaml")))

    for number, status in ((signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)):
        before = trainings()
        with started(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while trainings() == before and process.poll() is None:
                time.sleep(0.1)
            process.send_signal(number)
            assert process.wait(BUSY) == status
    assert subprocess.run(start, check=False, timeout=BUSY).returncode == 0
    assert results(killed) == results(whole)
