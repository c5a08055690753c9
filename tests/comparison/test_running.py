"""The runner of cells: what it says of time, and of cells that do not end well."""

import signal

import pytest

from bdistil.comparison.methods import TEACHER, Cell
from bdistil.comparison.running import CellRunner, _failure
from bdistil.errors import RunError

CELLS = [Cell("bdistil", seed, "bdistil") for seed in (0, 1)]


def test_the_teacher_says_nothing_of_the_time_of_the_students(tmp_path, capsys):
    runner = CellRunner(tmp_path, [], 1, [TEACHER, *CELLS])
    for cell in (TEACHER, *CELLS):
        runner._report(cell)
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "1 of 3: teacher, seed 0; time left unknown."
    assert second.startswith("2 of 3: bdistil, seed 0; about ")
    assert last == "3 of 3: bdistil, seed 1; all done."


def test_the_estimate_is_near_where_cells_differ_and_run_side_by_side(tmp_path, capsys, monkeypatch):
    """Times of CIFAR-10's cells, two at a time."""
    seconds = [363, 600, 820, 1095]
    cells = [[Cell("no_resched", seed, "no_resched", prefix) for prefix in (1, 2, 3, 4)] for seed in (0, 1)]
    runner, clock = CellRunner(tmp_path, [], 2, [*cells[0], *cells[1]]), 0.0
    monkeypatch.setattr("time.perf_counter", lambda: runner._started + clock)
    for taken, first, second in zip(seconds, *cells, strict=True):
        clock += taken
        runner._report(first)
        runner._report(second)
    lines, left = capsys.readouterr().out.splitlines(), sum(seconds)
    for line, taken in zip(lines[::2], seconds, strict=True):
        left -= taken
        hours, minutes, rest = map(int, line.split("about ")[1].removesuffix(" left.").split(":"))
        assert 0.6 * left <= 3600 * hours + 60 * minutes + rest <= 1.6 * left + seconds[-1]
    assert lines[-1].endswith("all done.")


def test_a_cell_that_was_killed_is_told_from_one_that_failed(tmp_path):
    folder = CELLS[0].folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("Round 1\n")
    assert "bdistil, seed 0, failed; its log" in _failure(CELLS[0], folder, 1)
    assert "bdistil, seed 0, was ended by signal 9 (Killed; is memory short?)" in _failure(
        CELLS[0], folder, -signal.SIGKILL
    )


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match=r"Could not finish the start of bdistil in .*bdistil-seed0"):
        CellRunner(tmp_path, [], 1, CELLS).run([CELLS])
