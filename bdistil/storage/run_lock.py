"""Lock of a run directory: only one start uses it at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bdistil.errors import UserError

# Seconds for which the lock of a dead process may outlive it: forked workers notice the end of their parent after
# about 5, a file server that of its client after up to 90.
LINGER = 120.0


class RunLock:
    """File lock that the operating system releases when the process ends, however it ends.

    The file names the holder of the lock. Forked workers of a dead process, or a file server that waits for a dead
    host, may keep it for a while; if the holder is known to be dead, the lock is awaited and then overridden. On a file
    system without locks, only a holder on this host whose process is alive is respected.

    Args:
        path: lock file; it stays when the lock is released.
        argument: name of the user's argument for the folder, for error messages.
    """

    def __init__(self, path: Path, argument: str = "run_dir") -> None:
        self.path, self.argument = path, argument
        self._handle: int | None = None
        self._users: set[object] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context that holds the lock; contexts of one object may be nested and end in any order.

        Raises:
            UserError: another process holds it, or another object of this one.
        """
        user = object()
        self.acquire()
        self._users.add(user)
        try:
            yield
        finally:
            self._users.discard(user)
            if not self._users:
                self.release()

    def acquire(self) -> None:
        """Acquires the lock, unless this object holds it already. `release` or the end of the last `held` frees it.

        Raises:
            UserError: another process holds it, or another object of this one.
        """
        if self._handle is not None:
            return
        handle = os.open(self.path, os.O_RDONLY | os.O_CREAT, 0o644)  # a disk may be remounted read-only meanwhile
        if _try_lock(handle) is None:
            os.close(handle)
            handle = os.open(self.path, os.O_RDWR)  # as network file systems require
        try:
            self._wait(handle)
            self.path.write_text(json.dumps(_myself()), encoding="utf-8")
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def release(self) -> None:
        """Releases the lock, even if contexts of `held` are still open."""
        self._users.clear()
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        with suppress(OSError):  # the disk accepts no more writes
            self.path.write_text("")
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_UN)  # forked workers share the open file, so that closing it is not enough
        os.close(handle)

    def _wait(self, handle: int) -> None:
        """Acquires the lock; waits only if its holder is dead."""
        start = time.monotonic()
        while (taken := _try_lock(handle)) is not True:
            holder, waited = _read(self.path), time.monotonic() - start
            being_written = not holder and waited < 1
            if not being_written and not _may_be_passed_over(holder, locks=taken is not None):
                raise self._refusal(holder)
            if taken is None or waited > LINGER:
                return
            time.sleep(0.1)

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        process, host = holder.get("process", "(unknown)"), holder.get("host", "(unknown)")
        own = (process, host) == (os.getpid(), socket.gethostname())
        where = "this process; an earlier loop over `rounds()` has not ended" if own else "another start"
        return UserError(
            f"`{self.argument}` {self.path.parent} is in use by process {process} on host {host} ({where}), since "
            f"{holder.get('since', '(unknown)')}: {holder.get('command', '(unknown)')}. Wait until it has ended, or "
            f"choose another `{self.argument}`. If that host is gone, remove {self.path}."
        )


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _read(path: Path) -> dict[str, Any]:
    """The holder named in the file; empty while it is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _may_be_passed_over(holder: dict[str, Any], *, locks: bool) -> bool:
    """Whether a holder is dead: a process of this host, or this SLURM job before it was requeued.

    Without file locks, a process of another host counts as dead, and so does a holder with this process's own id: an
    earlier process had it, as happens in containers.
    """
    if holder.get("host") == socket.gethostname():
        process = holder.get("process")
        return not _exists(process) or (not locks and process == os.getpid())
    me = _myself()
    requeued = me["job"] is not None and holder.get("job") == me["job"] and holder.get("restarts", 0) < me["restarts"]
    return requeued or not locks


def _exists(process: Any) -> bool:
    if not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _try_lock(handle: int) -> bool | None:
    """Whether the lock was taken; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True
