"""The answers of an API and the number of its queries, in one SQLite file.

A request is recorded before it is sent, and its answers when they arrive, each in its own transaction: whenever a
process is killed, the count is never too low, and no answer that arrived is requested again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from bdistil.errors import RunError, UserError

TABLES = """
    CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS requests (number INTEGER PRIMARY KEY, samples INTEGER NOT NULL, outcome TEXT);
    CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID;
"""


class AnswerCache:
    """Answers (input hash -> row of numbers) and the number of queries.

    Each call opens a connection of its own, so the object can be copied, pickled and used after a fork. `identity`
    names the API and the kind of its answers.

    Raises:
        UserError: the file belongs to another API, or is not such a cache.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.alone(), self._open() as base:
            base.executescript(TABLES)
            with base:
                base.execute("INSERT OR IGNORE INTO about VALUES ('identity', ?)", (identity,))
            (found,) = base.execute("SELECT value FROM about WHERE name = 'identity'").fetchone()
        if found != identity:
            raise UserError(
                f"The answers in {path} are of another API: {found!r} there, {identity!r} now. "
                "Give another `cache`, or the `name` and `answers` that it was started with."
            )

    def alone(self) -> FileLock:
        """A lock for one process at a time, so that two never send the same input."""
        return FileLock(f"{self.path}.lock")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as base:
                base.execute("PRAGMA synchronous = FULL")
                yield base
        except sqlite3.Error as error:
            raise RunError(
                f"The answers of the API in {self.path} cannot be read or written: {error}. Every answer written "
                "before is intact. Fix that (room, permission, a file that is no cache) and start again."
            ) from error

    def find(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The recorded answers to some keys; each a row of float32."""
        with self._open() as base:
            rows = ((key, base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()) for key in keys)
            return {key: np.frombuffer(row[0], np.float32) for key, row in rows if row}

    def sending(self, samples: int) -> int:
        """Records a request of that many samples before it is sent; returns its number."""
        with self._open() as base, base:
            return int(base.execute("INSERT INTO requests (samples) VALUES (?)", (samples,)).lastrowid or 0)

    def answered(self, number: int, answers: Mapping[bytes, np.ndarray]) -> None:
        """Records the answers to a request, in one transaction."""
        rows = [(key, row.astype(np.float32).tobytes()) for key, row in answers.items()]
        with self._open() as base, base:
            base.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
            base.execute("UPDATE requests SET outcome = 'answered' WHERE number = ?", (number,))

    def refused(self, number: int) -> None:
        """Records that the API reported a request as unanswered, so that it does not count as a query."""
        with self._open() as base, base:
            base.execute("UPDATE requests SET outcome = 'refused' WHERE number = ?", (number,))

    @property
    def queries(self) -> int:
        """Samples sent, in all processes and starts: answered, or with an unknown outcome."""
        with self._open() as base:
            return int(base.execute("SELECT TOTAL(samples) FROM requests WHERE outcome IS NOT 'refused'").fetchone()[0])
