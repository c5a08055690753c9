import os

import pytest
import wandb
from wandb.sdk.lib.wbauth import unauthenticate_session


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """No settings of W&B but those of the test, in the environment, on the disk, or left in the process."""
    home = tmp_path_factory.mktemp("wandb")
    wandb.teardown()  # first, as it takes its WANDB_SERVICE out of the environment
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB_") or n.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home / name))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("NETRC", str(home / "netrc"))
        yield patch
        wandb.teardown()


@pytest.fixture
def fresh(alone, monkeypatch):
    """W&B has not read its settings yet, and the process is not logged in."""
    wandb.teardown()
    unauthenticate_session(update_settings=False)
    yield monkeypatch
    wandb.teardown()
