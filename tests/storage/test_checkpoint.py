"""The checkpoint of an epoch: torch and Lightning read it as one of their own, and it is there whole or not at all."""

import time
import zipfile

import pytest
import torch
from helpers.toys import Hook, boost, control, digests, fit, settings_for
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn

from bdistil.storage import checkpoint as epoch_saving
from bdistil.storage.checkpoint import QuickIO, save_epoch

pytestmark = pytest.mark.usefixtures("no_pictures")


def saved(thing, folder):
    """What is read of a thing that was saved, and whether it was saved quickly."""
    QuickIO().save_checkpoint({"thing": thing}, folder / "new" / "a.ckpt")
    found = torch.load(folder / "new" / "a.ckpt", weights_only=True)["thing"]
    return found, not zipfile.is_zipfile(folder / "new" / "a.ckpt")


def same(found, wanted):
    """Are two checkpoints equal, in types, numbers and strides?"""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


BASE = torch.arange(24.0).view(2, 3, 4)
QUICK = {
    **{str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in epoch_saving.storages()},
    "a number": torch.tensor(3.0),
    "a number of 16 bits": torch.tensor(3.0, dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
    "transposed": BASE.permute(2, 0, 1),
    "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "rows of another": BASE[1],
    "rows that overlap": torch.arange(4.0).as_strided((2, 2), (1, 1)),
    "nothing": None,
    "plain": {"a": [1, 2.5, True, "text", b"bytes", (1, {2})], 3: torch.Size([1, 2]), "kind": torch.float32},
}
SLOW = {
    "columns of another": BASE[:, 1],
    "rows that overlap, from the second number on": torch.arange(4.0).as_strided((2, 2), (1, 1), 1),
    "a parameter": nn.Parameter(torch.ones(3)),
    "with a gradient": torch.ones(3, requires_grad=True),
    "complex": torch.tensor([1 + 2j]),
}


@pytest.mark.parametrize("thing", QUICK.values(), ids=QUICK.keys())
def test_torch_reads_what_was_saved_quickly(tmp_path, thing):
    found, quick = saved([thing, "between", thing], tmp_path)
    same(found, [thing, "between", thing])
    assert quick


@pytest.mark.parametrize("thing", SLOW.values(), ids=SLOW.keys())
def test_what_is_unusual_is_left_to_torch(tmp_path, thing):
    found, quick = saved(thing, tmp_path)
    assert isinstance(found, nn.Parameter) is isinstance(thing, nn.Parameter)
    assert str(list(found)) == str(list(thing))
    assert getattr(found, "requires_grad", False) is getattr(thing, "requires_grad", False)
    assert not quick


def test_a_bare_storage_is_left_to_torch(tmp_path):
    found, quick = saved(torch.ones(3).untyped_storage(), tmp_path)
    assert torch.empty(0, dtype=torch.uint8).set_(found).view(torch.float32).tolist() == [1, 1, 1]
    assert not quick


def test_a_torch_that_does_not_read_it_gets_its_own_format(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_saving, "_head", lambda: b"something else")
    epoch_saving.is_read.cache_clear()
    found, quick = saved(BASE, tmp_path)
    epoch_saving.is_read.cache_clear()
    assert torch.equal(found, BASE)
    assert not quick


def test_a_torch_without_a_name_of_the_format_gets_its_own(tmp_path, monkeypatch):
    monkeypatch.delattr(torch, "DoubleStorage")
    for kept in (epoch_saving.is_read, epoch_saving.storages):
        kept.cache_clear()
    found, quick = saved(BASE, tmp_path)
    epoch_saving.is_read.cache_clear()
    assert torch.equal(found, BASE)
    assert not quick


def test_the_checkpoint_of_an_epoch_is_that_of_lightning(tmp_path):
    seen = []

    def look(trainer, module):
        folder = tmp_path / f"{module.number}.{trainer.current_epoch}"
        trainer.save_checkpoint(folder / "lightning.ckpt", weights_only=False)
        save_epoch(trainer, folder / "ours.ckpt")
        found, wanted = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("ours", "lightning"))
        for kept in (found, wanted):
            assert kept["callbacks"]["RoundController"].pop("seconds") > 0
        same(found, wanted)
        assert wanted["optimizer_states"][0]["state"]
        assert sorted(path.name for path in folder.iterdir()) == ["lightning.ckpt", "ours.ckpt"]
        assert not zipfile.is_zipfile(folder / "ours.ckpt")
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


def test_a_disk_that_refuses_leaves_the_epoch_before(tmp_path, monkeypatch):
    before = []

    def refuse(checkpoint, file):
        file.write(b"torn")
        raise OSError(28, "No space left on device")

    def arm(trainer, module):
        if trainer.current_epoch == 1:
            before.append(torch.load(controller.ckpt_path, weights_only=True)["epoch"])
            monkeypatch.setattr(epoch_saving, "write", refuse)

    controller = control(tmp_path)
    with pytest.raises(Exception, match="the disk is full"):
        fit(controller, callbacks=lambda: [Hook(on_train_batch_start=arm)])
    assert set(before) == {torch.load(controller.ckpt_path, weights_only=True)["epoch"]} == {0}
