"""Ratios that benches record, written to bench.json at the end of `make bench`, with environment and commit."""

import json
import os
import platform
import re
from pathlib import Path

import pytest
import torch

from bdistil.storage.provenance import describe_start

RATIOS = pytest.StashKey[dict[str, float]]()


def pytest_configure(config):
    config.stash[RATIOS] = {}


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """Overrides that of all tests: what is measured is what users get."""


@pytest.fixture
def record(request):
    """Keeps a ratio for bench.json: `record("epoch of a round / plain epoch", 1.08)`.

    A ratio is a cost relative to another one of the same run, so that it says the same on any machine: larger is worse.
    """
    ratios = request.config.stash[RATIOS]

    def keep(name, ratio):
        assert name not in ratios, f"{name!r} is recorded twice"
        ratios[name] = round(float(ratio), 4)

    return keep


def environment():
    """The machine and the versions, without names of hosts and folders: baselines are committed."""
    start = describe_start()
    cpus = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", cpus.read_text(), re.M) if cpus.exists() else []
    return {
        **{key: start[key] for key in ("time", "python", "system", "versions")},
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute, by all programs: 1 for each busy core
    }


def pytest_sessionfinish(session):
    if ratios := session.config.stash[RATIOS]:
        found = {"commit": describe_start()["revision"], "environment": environment(), "ratios": ratios}
        file = session.config.rootpath / "bench.json"
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"\n{len(ratios)} ratios in {file}; `make bench-check` compares them with the baseline")
