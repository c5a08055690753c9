"""A ledger of large files on two real processes: each reads and writes its own rows, and all hold one normaliser."""

import json
import os
from dataclasses import asdict

import pytest
import torch
from helpers.toys import on_ranks

from bdistil import ErrorLedger
from bdistil.boosting.ledger import rows as row_files
from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.ledger.rows import RowFile
from bdistil.utils import distributed

pytestmark = pytest.mark.distributed

N, L, ETA = 7 * BLOCK + 100, 5, 0.5  # two groups of four blocks of 512 rows; rows of 20 bytes


def answers(seed):
    """Logits of the rows of this process."""
    table = torch.randn(N, L, generator=torch.Generator().manual_seed(seed))
    return [(low, table[low:high]) for low, high in distributed.my_blocks(N, BLOCK)]


def two_rounds(folder, storage):
    """Evidence on the second student, log Z, and the rows that were read and written in two rounds."""
    rows = {"read": [], "written": []}
    read, write = RowFile.read, RowFile.write

    def noted_read(table, low, high):
        rows["read"].append((low, high))
        return read(table, low, high)

    def noted_write(table, low, values):
        rows["written"].append((low, low + len(values)))
        return write(table, low, values)

    ledger = ErrorLedger(folder, storage)
    ledger.create(N, answers(0), outputs=L)
    RowFile.read, RowFile.write = noted_read, noted_write
    try:
        for number in range(2):
            ledger.use(number)
            evidence = ledger.advance(answers(number + 1), eta=ETA, tolerance=1e-3)
            ledger.publish()
        ledger.use(2)
        return asdict(evidence), ledger.log_normaliser(ETA).tolist(), rows
    finally:
        RowFile.read, RowFile.write = read, write


def script(folder, storage):
    """What each of the processes runs."""
    row_files.LARGE = 0
    torch.distributed.init_process_group("gloo")
    said = two_rounds(folder / "two", storage)
    (folder / f"rank{os.environ['RANK']}").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_each_rank_reads_and_writes_its_own_rows_of_the_ledger(tmp_path, monkeypatch, storage):
    assert on_ranks(tmp_path, script, tmp_path, storage) == [0, 0], (tmp_path / "rank0.log").read_text()[-5000:]
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    monkeypatch.setattr(row_files, "LARGE", 0)
    evidence, log_z, _ = two_rounds(tmp_path / "one", storage)
    assert first[:2] == second[:2] == [evidence, log_z]
    border = distributed.GROUP * BLOCK
    assert border * L * (2 if storage == "float16" else 4) % 4096 == 0, "hosts share a page of the file"
    for what in ("read", "written"):
        assert {high <= border for _, high in first[2][what]} == {True}
        assert {low >= border for low, _ in second[2][what]} == {True}
        assert sum(high - low for low, high in first[2][what]) % border == 0
    for file in sorted((tmp_path / "one").iterdir()):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
