"""Weights & Biases: one W&B run for each run directory, shared by all rounds and all restarts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from uuid import uuid4

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from bdistil.storage.files import write_atomically

INIT_SECONDS, FINISH_SECONDS = 10.0, 60.0  # longest waits for the server, at the start and at the end of a run


@dataclass(frozen=True)
class Tracking:
    """Settings of the Weights & Biases run. WANDB_MODE=offline or disabled overrides `mode`.

    Attributes:
        mode: `auto` is online if a key is configured and the server answers, otherwise offline. `online` is the same,
            with a warning if no key is configured. `offline` stores the run for `wandb sync`. `disabled` makes no run.
        project: the W&B project.
        group: groups related runs, such as the seeds of one recipe.
        name: display name of the run; W&B generates one by default.
        tags: labels to filter by, such as the dataset, the teacher and the student.
        job_type: kind of job, such as fit, evaluate or profile.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "bdistil"
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    job_type: str = "fit"


class RunLogger(WandbLogger):
    """`WandbLogger` that continues without W&B if W&B fails.

    Args:
        folder: the run directory.
        options: options of `WandbLogger`.

    Attributes:
        lost: whether W&B has failed, for example because its process was killed.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(save_dir=folder, **options)
        self.lost = False

    def _guarded(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not self.lost:
            try:
                call(*args, **kwargs)
            except Exception as error:
                self.lose(error)

    def lose(self, error: Exception) -> None:
        """Stops logging for the rest of the process, with one warning."""
        if self.lost:
            return
        self.lost = True
        rank_zero_warn(
            f"W&B failed ({type(error).__name__}: {error}). Nothing more is logged there until the run is started "
            "again; training continues, and curve.csv and report.html are complete."
        )
        with suppress(Exception):  # without the teardown, W&B fails at exit with a traceback
            rank_zero_only(_teardown)()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As `WandbLogger`."""
        self._guarded(super().log_metrics, metrics, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """As `WandbLogger`."""
        self._guarded(super().log_hyperparams, *args, **kwargs)


def _teardown() -> None:
    import wandb

    wandb.teardown()


def make_logger(tracking: Tracking, folder: Path, config: Mapping[str, Any]) -> RunLogger | None:
    """Starts the W&B run of a run directory, or resumes it, on rank zero.

    Args:
        tracking: settings of the W&B run.
        folder: the run directory. ``wandb_id.txt`` in it stores the id of the W&B run. W&B writes to ``wandb/`` in it,
            or to WANDB_DIR.
        config: the resolved configuration, nested plain values.

    Returns:
        The logger for all rounds; None if tracking is disabled, or, with a warning, if W&B cannot start.
    """
    if "disabled" in (tracking.mode, os.environ.get("WANDB_MODE")):
        return None
    try:
        return RunLogger(folder, project=tracking.project, experiment=_start(tracking, folder, config))
    except Exception as error:
        rank_zero_warn(f"W&B did not start, this run is not tracked there. {type(error).__name__}: {error}")
        return None


def _is_copy(folder: Path) -> bool:
    """Whether this run directory is a copy: the folder in which the W&B run was last started still exists."""
    try:
        origin = Path((folder / "wandb_place.txt").read_text(encoding="utf-8"))
        ids = [(place / "wandb_id.txt").read_text() for place in (folder, origin)]
        return ids[0] == ids[1] and not origin.samefile(folder)
    except OSError:  # the folder was moved, or its file belongs to an earlier version
        return False


@rank_zero_only
def _start(tracking: Tracking, folder: Path, config: Mapping[str, Any]) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    if not (id_file := folder / "wandb_id.txt").exists() or _is_copy(folder):
        write_atomically(id_file, uuid4().hex[:8])
    write_atomically(folder / "wandb_place.txt", str(folder.resolve()))
    root = os.environ.get("WANDB_DIR", str(folder))

    def init(mode: Literal["online", "offline", "disabled"]) -> Any:
        settings = wandb.Settings(
            init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True, quiet=True,
            silent=mode == "offline",
        )  # fmt: skip
        return wandb.init(
            project=tracking.project, group=tracking.group, name=tracking.name, tags=tracking.tags, dir=root, mode=mode,
            job_type=tracking.job_type, config=dict(config), id=id_file.read_text(), resume="allow", settings=settings,
        )  # fmt: skip

    run, configured = None, wandb.setup().settings
    reason, tell = "as configured", cast(Callable[[str], object], rank_zero_info)
    if configured.mode == "disabled":  # by the command `wandb disabled`
        return init("disabled")
    if tracking.mode != "offline" and configured.mode not in ("offline", "dryrun"):
        try:
            if wandb.login(prompt=False, verify=False):
                run = init("online")
            else:
                reason = "no API key is configured, see `wandb login`"
                tell = rank_zero_warn if tracking.mode == "online" else rank_zero_info
        except Exception as error:
            wandb.teardown()  # otherwise the id stays in use
            message = " ".join(str(error).split())
            reason, tell = f"{configured.base_url} did not start the run ({message})", rank_zero_warn
    if run is None:
        run = init("offline")  # WandbLogger(offline=True) would set WANDB_MODE for the whole process
        tell(f"W&B is offline: {reason}. `wandb sync {root}/wandb/offline-run-*` uploads the run later.")
    # The x axis of all metrics, as `WandbLogger` defines it for runs that it starts itself.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run
