"""The runner of cells: what it says of time, and of cells that do not end well."""

import signal

import pytest

from bdistil.comparison.methods import TEACHER, Cell
from bdistil.comparison.running import CellRunner, _failure
from bdistil.errors import RunError

CELLS = [Cell("bdistil", seed, "bdistil", 100) for seed in (0, 1)]


def test_the_teacher_says_nothing_of_the_time_of_the_students(tmp_path, capsys):
    runner = CellRunner(tmp_path, [], 1, [TEACHER, *CELLS])
    for cell in (TEACHER, *CELLS):
        runner._report(cell)
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "1 of 3: teacher, seed 0; time left unknown."
    assert second.startswith("2 of 3: bdistil, seed 0; about ")
    assert last == "3 of 3: bdistil, seed 1; all done."


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
