"""The program anywhere it is started: recipes with slips, odd paths, pipes, terminals, and machines without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdistil import UserError
from bdistil.cli.app import main
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils.paths import user_path

PROGRAM = [sys.executable, "-m", "bdistil.cli"]


def refused(capsys, *args):
    """The message of a command that is refused: one, on stderr, with status 2."""
    try:
        status = main(list(args))
    except SystemExit as end:  # the parser's own way
        status = end.code
    message = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in message
    assert message.startswith("bdistil: error: ") or "error: " in message.splitlines()[0]
    return message


# ---- recipes


BAD_RECIPES = {
    "twice": (
        b"model:\n  boosting: {rounds: 2}\nmodel:\n  boosting: {eta: 0.3}\n",
        "got `model` twice, in lines 1 and 3",
    ),
    "twice inside": (b"trainer:\n  max_epochs: 1\n  devices: 1\n  max_epochs: 2\n", "got `trainer.max_epochs` twice"),
    "twice in a list": (
        b"trainer:\n  callbacks:\n    - class_path: A\n      class_path: B\n",
        "got `trainer.callbacks.0.class_path` twice, in lines 3 and 4",
    ),
    "empty": (b"# nothing yet\n", "to set options (`key: value`), got an empty file"),
    "list": (b"- seed_everything\n", "got a list"),
    "latin1": (
        "# kein UTF-8\nrun_dir: größe\n".encode("latin1"),
        "in UTF-8, got another encoding: byte 0xf6 in line 2",
    ),
    "torn": (b"model: {boosting: [1\n", "torn.yaml to be YAML, got an error"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_recipe_with_a_slip_gets_one_message(tmp_path, capsys, name):
    content, message = BAD_RECIPES[name]
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(content)
    said = refused(capsys, "fit", "--config", "digits", "--config", str(path), "--print_config")
    assert message in said
    assert len(said.splitlines()) <= 6


def test_a_key_twice_in_a_value_of_the_command_line(capsys):
    said = refused(capsys, "fit", "--config", "digits", "--model.boosting", "{rounds: 2, rounds: 3}")
    assert "got `rounds` twice" in said


def test_anchors_and_merged_keys_are_no_duplicates(tmp_path, capsys):
    path = tmp_path / "merged.yaml"
    path.write_text("model:\n  teacher: &t {epochs: 1, lr: 0.1}\n  boosting:\n    lr: 0.2\n", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "digits", "--config", str(path), "--print_config"])
    assert end.value.code == 0
    assert "lr: 0.2" in capsys.readouterr().out


def test_options_before_the_recipe_override_it_too(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("run_dir: here\nmodel: {boosting: {rounds: 2}}\n")
    given = ["--run_dir", "there", "--model.boosting.rounds=5", "--config", "digits", f"--config={path}"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *given, "--print_config"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "run_dir: there" in printed
    assert "rounds: 5" in printed


# ---- options of the Trainer and the seed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accelerator", "gpu"], "No supported gpu backend found"),
        (["--trainer.accelerator", "abacus"], "invalid accelerator name"),
        (["--trainer.devices", "0"], "not a valid input using cpu accelerator"),
        (["--seed_everything", "-1"], "Expected `seed_everything` in 0 … 4294967295, got -1"),
        (["--seed_everything", str(2**32)], "got 4294967296"),
    ],
)
def test_what_lightning_refuses_is_one_message(tmp_path, capsys, options, message):
    accelerator = [] if "--trainer.accelerator" in options else ["--trainer.accelerator", "cpu"]
    said = refused(capsys, "fit", "--config", "digits", "--run_dir", str(tmp_path / "run"), *accelerator, *options)
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


# ---- paths


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "--config", "digits", "--trainer.accelerator", "cpu", "--run_dir", ""],
        ["fit", "--config", "digits", "--trainer.accelerator", "cpu", "--model.teacher.checkpoint", ""],
        ["evaluate", "--run_dir", " "],
        ["report", "--run_dir", ""],
        ["export", "--run_dir", "none", "--output", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_refused_and_nothing_is_written(args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "to be a path, got an empty one" in refused(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert RunDirectory("~/runs/x").root == tmp_path / "runs" / "x"
    assert user_path(Path("a/~"), "x") == Path("a/~")
    with pytest.raises(UserError, match="Expected `output` to be a path, got '~no_such_user/x'"):
        user_path("~no_such_user/x", "output")


# ---- pipes and terminals


def started(*args, **environ):
    return subprocess.Popen(
        [*PROGRAM, *args], env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("args", [["recipes"], ["fit", "--config", "digits", "--print_config"]], ids=lambda a: a[0])
def test_a_reader_that_leaves_early_is_no_error(args):
    process = started(*args)
    process.stdout.close()
    assert (process.wait(120), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_a_broken_pipe_that_is_not_of_stdout_is_an_error(monkeypatch):
    def fail():
        raise BrokenPipeError

    monkeypatch.setattr("bdistil.cli.commands.recipes", fail)
    with pytest.raises(BrokenPipeError):
        main(["recipes"])


def test_a_terminal_of_another_encoding_gets_what_it_can_show():
    done = subprocess.run(
        [*PROGRAM, "--help"], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "fit " in done.stdout.decode("ascii")
