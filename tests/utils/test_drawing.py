"""Pictures and imports under the settings of others: the backend of a notebook, a matplotlibrc that asks for LaTeX."""

import os
import subprocess
import sys

import matplotlib
import pytest

from bdistil.reporting.curve_plot import plot_curve
from bdistil.utils.drawing import drop_missing_backend


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("module://no_such_package.backend_inline", None),
        ("module://bdistil.no_such_backend", None),
        ("module://matplotlib.backends.backend_svg", "module://matplotlib.backends.backend_svg"),
        ("Agg", "Agg"),
    ],
)
def test_only_a_backend_that_is_not_installed_is_dropped(monkeypatch, given, left):
    monkeypatch.setenv("MPLBACKEND", given)
    drop_missing_backend()
    assert os.environ.get("MPLBACKEND") == left
    monkeypatch.setenv("MPLBACKEND", given)  # for the guard against leaks


def test_the_program_starts_with_a_backend_of_another_environment():
    environ = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-m", "bdistil.cli", "recipes"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout


def test_a_picture_does_not_depend_on_the_users_style(tmp_path):
    rows = [{"stage": "1", "macs": "10", "val_accuracy": "0.5"}, {"stage": "2", "macs": "20", "val_accuracy": "0.75"}]
    plot_curve(rows, tmp_path / "plain.png")
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "red"}):  # no LaTeX here
        plot_curve(rows, tmp_path / "styled.png")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
