"""Tracking: one run of Weights & Biases for all rounds, and plain scalars for any other logger of Lightning.

A tracker only watches: it asks nothing, never ends a run, and holds one up for seconds, or for two minutes where its
server goes away meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from socket import create_connection
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from uuid import uuid4

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from bdistil.reporting.wandb_logger import RunLogger
from bdistil.reporting.wandb_state import FLUSH_SECONDS, FLUSH_SETTING
from bdistil.storage.files import write_atomically

CONNECT_SECONDS, INIT_SECONDS, FINISH_SECONDS = 3.0, 10.0, 60.0


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
