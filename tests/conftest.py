"""What every test gets: one thread, no GPU unless asked for, fixed seeds, and guards against leaks."""

import os

# Before torch is imported. With a CUDA build of torch and no GPU, each step of Adam asks NVML again for devices, which
# costs as much as a tiny step itself; and a test must do the same on every machine. `CUDA_VISIBLE_DEVICES=0 pytest`
# shows a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ["BDISTIL_TEST_OWNER"] = str(os.getpid())  # see helpers/processes.py
os.environ["WANDB_MODE"] = "offline"  # not a default: no test uploads, whatever the shell says

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import kill, orphans

torch.set_num_threads(1)

# What a package sets once for the whole process, when it is imported or started: stays.
KEPT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # import lightning
    "TORCHINDUCTOR_CACHE_DIR",  # import lightning
    "KMP_DUPLICATE_LIB_OK",  # import sklearn
    "KMP_INIT_AT_FORK",  # import sklearn
    "WANDB_SERVICE",  # the first run of wandb
    "CRC32C_SW_MODE",  # import tensorboardX
}
# What Lightning sets by design: taken back after each test, and no fault of the test.
TAKEN_BACK = {
    "PL_GLOBAL_SEED",  # seed_everything
    "PL_SEED_WORKERS",  # seed_everything
    "CUBLAS_WORKSPACE_CONFIG",  # Trainer(deterministic=True)
    "WANDB_MODE",  # WandbLogger(offline=True)
    "PYTEST_CURRENT_TEST",  # pytest itself
}


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU; the tests hide it unless CUDA_VISIBLE_DEVICES is set")


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_leaks():
    """Fails a test that leaves environment variables or a process group behind, and cleans up for the next one."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} - KEPT
    for key in changed - {"PYTEST_CURRENT_TEST"}:
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if group:
        torch.distributed.destroy_process_group()
    leaked = {key: after.get(key) for key in sorted(changed - TAKEN_BACK)}
    assert not leaked, f"the test left environment variables changed: {leaked}; set them with monkeypatch.setenv"
    assert not group, "the test left a torch process group; end it with destroy_process_group()"


@pytest.fixture(scope="module", autouse=True)
def _no_orphans():
    """Ends what the tests of a file have started and left running: ranks of a launcher that was killed, for example."""
    yield
    if Path("/proc").exists():
        for pid in orphans():
            kill(pid)


@pytest.fixture(scope="module", autouse=True)
def _no_pictures(request):
    """Pictures take as long as a whole run of toys: only files that are marked `pictures` have them drawn."""
    if request.node.get_closest_marker("pictures"):
        yield
        return
    from bdistil.callbacks import round_controller
    from bdistil.cli import fit

    with pytest.MonkeyPatch.context() as patch:
        for module in (round_controller, fit):
            patch.setattr(module, "write_report", lambda run: run.report)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of toys, with what was seen of it after each round."""
    from helpers.toys import finished_run

    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def api():
    """A server that answers like a model, see `api_toys`."""
    from helpers.api_toys import serving

    with serving() as server:
        yield server


@pytest.fixture
def make(tmp_path):
    """Makes a teacher of such a server, or of a callable, with waits that no test notices."""
    from helpers.api_toys import OUTPUTS

    from bdistil import ApiTeacher, HttpEndpoint

    def build(ask, **options):
        ask = HttpEndpoint(ask.url, timeout=0.3) if hasattr(ask, "url") and not callable(ask) else ask
        given = {
            "outputs": OUTPUTS,
            "cache": tmp_path / "answers.sqlite",
            "batch_size": 4,
            "backoff": 0.001,
            "name": "toy",
        }
        return ApiTeacher(ask, **{**given, **options})

    return build
