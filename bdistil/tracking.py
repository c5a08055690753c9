"""Tracking: one run of Weights & Biases for all rounds, and plain scalars for any other logger of Lightning.

A tracker only watches: it asks nothing, never ends a run, and holds one up for seconds, or for two minutes where its
server goes away meanwhile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from multiprocessing.pool import ThreadPool
from pathlib import Path
from socket import create_connection
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from uuid import uuid4

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from bdistil.metrics.task import score_name
from bdistil.run_logger import RunLogger
from bdistil.run_notes import FLUSH_SECONDS, FLUSH_SETTING
from bdistil.storage.files import write_atomically

CONNECT_SECONDS, INIT_SECONDS, FINISH_SECONDS = 3.0, 10.0, 60.0
# A student that takes W&B as long as this to refuse is one for a server that has gone.
SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class Tracking:
    """How a run is shown in Weights & Biases. WANDB_MODE=offline or disabled goes before `mode`.

    Attributes:
        mode: `auto` is online where a key is configured and the server answers, else offline. `online` is the same,
            with a warning where it cannot be. `offline` is for `wandb sync` later. `disabled` makes no run.
        project: the project of the run.
        group: runs that belong together, such as the seeds of one recipe.
        name: of the run; W&B invents one otherwise.
        tags: labels to search by, such as data set, teacher and student.
        job_type: what the run does: fit, evaluate or profile.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "bdistil"
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    job_type: str = "fit"


def make_logger(tracking: Tracking, folder: Path, config: Mapping[str, Any]) -> RunLogger | None:
    """The W&B logger that all rounds share, with a run behind it on rank zero. None, with a warning, if that fails.

    Args:
        tracking: how the run is shown; None is returned where it is disabled.
        folder: the run directory. ``wandb_id.txt`` in it keeps the id of the W&B run, so that a folder started again
            goes on with its run; W&B writes to ``wandb/`` in it, or in WANDB_DIR.
        config: the resolved configuration, nested plain values.
    """
    if "disabled" in (tracking.mode, os.environ.get("WANDB_MODE")):
        return None
    try:
        run = rank_zero_only(_start)(tracking, folder, config)
        return RunLogger(folder, project=tracking.project, experiment=run)
    except Exception as error:
        rank_zero_warn(f"W&B did not start, this run is not tracked there. {type(error).__name__}: {error}")
        return None


def _start(tracking: Tracking, folder: Path, config: Mapping[str, Any]) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    if not (id_file := folder / "wandb_id.txt").exists():
        write_atomically(id_file, uuid4().hex[:8])
    settings, root = wandb.setup().settings, os.environ.get("WANDB_DIR", str(folder))
    # Quiet, as W&B would first ask the server for the name of the user, and wait for that as well.
    bounds = wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, quiet=True)
    if hasattr(bounds, FLUSH_SETTING):
        setattr(bounds, FLUSH_SETTING, FLUSH_SECONDS)
    init = partial(
        wandb.init, project=tracking.project, group=tracking.group, name=tracking.name, tags=tracking.tags, dir=root,
        job_type=tracking.job_type, config=dict(config), id=id_file.read_text(), resume="allow", settings=bounds,
    )  # fmt: skip
    obstacle, tell = _obstacle(tracking.mode, settings)
    if not obstacle:
        try:
            run = init()
        except Exception as error:
            wandb.teardown()  # or the id stays taken
            obstacle, tell = f"{settings.base_url} did not start the run ({error})", rank_zero_warn
    if obstacle:
        bounds.silent = True  # online it says where the run is, and what it could not upload
        run = init(mode="offline")  # WandbLogger(offline=True) would set WANDB_MODE for the rest of the process
        tell(f"W&B is offline: {obstacle}. `wandb sync {root}/wandb/offline-run-*` uploads the run later.")
    run.define_metric("trainer/global_step")  # this and the next as WandbLogger does for the runs that it makes
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def _obstacle(mode: str, settings: Any) -> tuple[str, Callable[[str], object]]:
    """Why a run cannot be online, or "", and how to tell: what the user will not have expected is a warning."""
    from wandb.sdk.lib.wbauth import authenticate_session

    if settings.mode == "disabled":  # by the command `wandb disabled`
        return "", rank_zero_info
    if mode == "offline" or settings.mode in ("offline", "dryrun"):
        return "as asked for", rank_zero_info
    try:
        if not authenticate_session(host=settings.base_url, source="bdistil", prompt=False, update_session=False):
            return "no API key is configured, see `wandb login`", rank_zero_info if mode == "auto" else rank_zero_warn
        _knock(settings.base_url, CONNECT_SECONDS)
    except Exception as error:
        return f"{settings.base_url} is out of reach ({type(error).__name__} {error})", rank_zero_warn
    return "", rank_zero_info


def _knock(server: str, seconds: float) -> None:
    """Connects to a server, or to the proxy on the way to it, or raises."""
    parts = urlsplit(server)
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}") if proxy else parts
    address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    with ThreadPool(1) as pool:  # the time-out of a connection does not bound the look-up of the name
        pool.apply_async(create_connection, (address, seconds)).get(seconds).close()


def _runs(loggers: Sequence[Logger]) -> list[Any]:
    """The W&B runs behind loggers, on rank zero: what can `define_metric`."""
    working = [logger for logger in loggers if not getattr(logger, "lost", False)]
    found = [getattr(logger, "experiment", None) for logger in working if getattr(rank_zero_only, "rank", 0) == 0]
    return [run for run in found if hasattr(run, "define_metric")]


class CurveTracker:
    """Shows rounds: metrics in all loggers, curve and students in W&B. Whatever fails is a warning, the first time."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers, self.step, self.warned, self.artifacts = loggers, 0, False, True
        self.defined = {"round/val_accuracy"}

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            gone = [logger for logger in self.loggers if isinstance(logger, RunLogger) and _is_gone(error)]
            for logger in gone:  # the process of W&B, which takes what is logged
                logger.lose(error)
            if not gone and not self.warned:
                self.warned = True
                rank_zero_warn(f"Tracking failed, the run goes on without. {type(error).__name__}: {error}")

    def define(self, logger: Logger) -> None:
        """Makes `round` the x axis of what is logged about rounds."""
        with self._harmless():
            for run in _runs([logger]):
                run.define_metric("round")
                run.define_metric("round/*", step_metric="round")
                run.define_metric("round/val_accuracy", step_metric="round", summary="max")

    def round(self, metrics: Mapping[str, Any], number: int, step: int, *, again: bool = False) -> None:
        """Logs `round` and `round/<key>` of metrics that are numbers. `again`: unless a W&B run has them already."""
        self.step = max(self.step, step)
        row = {f"round/{key}": float(value) for key, value in metrics.items() if isinstance(value, (int, float))}
        for logger in self.loggers:
            with self._harmless():
                self._log(logger, {"round": number, **row}, again)

    def _log(self, logger: Logger, row: dict[str, float], again: bool) -> None:
        for run in _runs([logger]):
            if again and (run.summary.get("round") or 0) >= row["round"]:
                return
            for key in row.keys() - self.defined - {"round"}:  # as W&B takes either of two globs, "*" and "round/*"
                run.define_metric(key, step_metric="round")
                self.defined.add(key)
        logger.log_metrics(row, self.step)
        logger.save()  # some write at the end of a fit only

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Logs the rounds before a restart, by `round`, `steps` and `curve` of round.json: offline runs start empty."""
        with self._harmless():
            for record, step in zip(records, accumulate(record["steps"] for record in records), strict=True):
                self.round(record["curve"], record["round"] + 1, step, again=True)

    def curve(self, rows: Sequence[Mapping[str, str]], task: str = "classification") -> None:
        """Shows the rows of curve.csv as a table, and accuracy (or R²) over MACs."""
        with self._harmless():
            for run in _runs(self.loggers):
                from wandb import Table, plot

                cells = {key: _numbers([row[key] for row in rows]) for key in rows[0]}
                table = Table(columns=[*cells], data=[[*row] for row in zip(*cells.values(), strict=True)])
                title = score_name(task).capitalize()
                line = plot.line(table, "macs", "val_accuracy", title=f"{title} over multiply-adds per sample")
                run.log({"curve": table, "accuracy_vs_macs": line})

    def student(self, folder: Path, number: int, metadata: Mapping[str, Any]) -> None:
        """Keeps the folder of a committed round as an artifact. A refusal that took long is the last one waited for."""
        started = time.monotonic()
        with self._harmless():
            runs = _runs(self.loggers) if self.artifacts else []
            try:
                for run in runs:
                    _keep(run, folder, number, metadata)
            except Exception as error:
                if _is_gone(error):
                    raise
                self.artifacts = time.monotonic() - started < SLOW_SECONDS
                later = "" if self.artifacts else ", nor will those of later rounds be"
                rank_zero_warn(
                    f"The student of round {number} is not in W&B{later}: they are in {folder.parent}. "
                    f"{type(error).__name__}: {error}"
                )

    def finish(self, exit_code: int | None = None) -> None:
        """Closes the run, for a `finally`: as failed where an exception is under way. Waits a minute for uploads."""
        code = int(sys.exc_info()[0] is not None) if exit_code is None else exit_code
        with self._harmless():
            for logger in self.loggers:
                for run in _runs([logger]):
                    (logger if isinstance(logger, RunLogger) else run).finish(exit_code=code)


def _keep(run: Any, folder: Path, number: int, metadata: Mapping[str, Any]) -> None:
    from wandb import Artifact

    artifact = Artifact(f"student-{run.id}", type="student", metadata=dict(metadata))
    for file in sorted(folder.iterdir()):  # a committed file never changes, so W&B need not copy it
        artifact.add_file(str(file), name=file.name, policy="immutable")
    run.log_artifact(artifact, aliases=[f"round-{number}", "latest"])


def _is_gone(error: Exception) -> bool:
    """Whether the process of W&B has ended: its socket is broken, or it has gone while something waited for it."""
    return isinstance(error, OSError) or type(error).__module__.startswith("wandb.sdk.mailbox.")


def _numbers(cells: Sequence[str]) -> Sequence[float | str | None]:
    """A column as numbers where all cells are, else as text: a W&B table has one type a column."""
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError:
        return [cell or None for cell in cells]
