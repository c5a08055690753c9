"""The checkpoint of an epoch is one of Lightning's, and is complete or as it was before."""

import time

import pytest
import torch
from helpers.toys import Hook, boost, control, digests, fit, settings_for
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from bdistil.storage import files
from bdistil.storage.files import save_epoch


def test_the_checkpoint_of_an_epoch_is_one_of_lightning(tmp_path):
    seen = []

    def look(trainer, module):
        folder = tmp_path / f"{module.number}.{trainer.current_epoch}"
        save_epoch(trainer, folder / "ours.ckpt")
        found = torch.load(folder / "ours.ckpt", weights_only=True)
        assert found["optimizer_states"][0]["state"]
        assert found["callbacks"]["RoundController"]["epochs"] == trainer.current_epoch
        assert found["state_dict"].keys() == module.state_dict().keys()
        assert [path.name for path in folder.iterdir()] == ["ours.ckpt"]
        seen.append(module.number)

    boost(tmp_path / "run", callbacks=lambda: [Hook(on_train_epoch_end=look)], settings=settings_for(2))
    assert seen == [0, 0, 1, 1]


class Own(TorchCheckpointIO):
    """A plugin of the user."""

    calls = 0

    def save_checkpoint(self, *args, **kwargs):
        """Counts."""
        Own.calls += 1
        super().save_checkpoint(*args, **kwargs)


class OwnAsync(AsyncCheckpointIO):
    """Another of the user, whose files are there late."""

    def save_checkpoint(self, *args, **kwargs):
        """Waits first, in its thread."""
        self._ensure_setup()
        self._executor.submit(time.sleep, 0.1)
        super().save_checkpoint(*args, **kwargs)


PLUGINS = {
    "own": (Own(), 4),
    "async": (AsyncCheckpointIO(), 0),
    "async around own": (AsyncCheckpointIO(Own()), 4),
    "own async": (OwnAsync(), 0),
    "own async around own": (OwnAsync(Own()), 4),
}


@pytest.mark.parametrize(("plugin", "calls"), PLUGINS.values(), ids=PLUGINS.keys())
def test_a_run_with_a_plugin_for_checkpoints(finished, tmp_path, plugin, calls):
    given, Own.calls = [], 0
    note = Hook(on_train_end=lambda trainer, module: given.append(trainer.strategy.checkpoint_io))
    boost(tmp_path, callbacks=lambda: [note], settings=settings_for(2), trainer={"plugins": [plugin]})
    assert given == [plugin, plugin], "it is put back"
    assert Own.calls == calls
    assert digests(tmp_path).items() <= digests(finished.run_dir).items()


@pytest.mark.parametrize(("where", "step"), [(TorchCheckpointIO, "save_checkpoint"), (files, "publish")])
def test_a_disk_that_refuses_leaves_the_epoch_before(tmp_path, monkeypatch, where, step):
    before = []

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    def arm(trainer, module):
        if trainer.current_epoch == 1:
            before.append(torch.load(controller.ckpt_path, weights_only=True)["epoch"])
            monkeypatch.setattr(where, step, refuse)

    controller = control(tmp_path)
    with pytest.raises(Exception, match="the disk is full"):
        fit(controller, callbacks=lambda: [Hook(on_train_batch_start=arm)])
    assert set(before) == {torch.load(controller.ckpt_path, weights_only=True)["epoch"]} == {0}
