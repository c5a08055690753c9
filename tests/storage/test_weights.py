"""Checkpoints as people have them: read without executing anything, one prefix off, and what a mismatch says."""

import argparse
import collections
import functools
import os
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bdistil import UserError
from bdistil.storage.weights import load_weights, save_weights


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


class Settings(dict):
    """A mapping of a script's own, as many configurations are."""


WEIGHTS = make().state_dict()
OTHER = make(1).state_dict()

CHECKPOINTS = {
    "a state dict": WEIGHTS,
    "timm's train.py": {"epoch": 1, "state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1), "metric": np.float64(9)},
    "LightningModule": {"state_dict": under("model.", WEIGHTS), "hyper_parameters": {"a": pathlib.PurePosixPath()},
                        "pytorch-lightning_version": "2.6", "callbacks": {"best": {"score": torch.tensor(1.0)}}},
    "LightningModule with a loss": {"state_dict": {**under("network.", WEIGHTS), "criterion.weight": torch.ones(5)}},
    "DDP": {"state_dict": under("module.", WEIGHTS)},
    "DDP in a LightningModule": {"state_dict": under("model.module.", WEIGHTS)},
    "torch.compile": under("_orig_mod.", WEIGHTS),
    "a compiled part": {name.replace("0.", "0._orig_mod."): value for name, value in WEIGHTS.items()},
    "torchvision": {"model": WEIGHTS, "epoch": 3, "args": argparse.Namespace(), "lr_scheduler": {"last_lr": [0.1]}},
    "an average by timm": {"state_dict": OTHER, "state_dict_ema": WEIGHTS},
    "an average by torchvision": {"model": OTHER,
                                  "model_ema": {"n_averaged": torch.tensor(3), **under("module.", WEIGHTS)}},
    "one odd prefix": under("resnet.body.", WEIGHTS),
    "one odd entry": {"epoch": torch.tensor(3), "my_weights": WEIGHTS},
    "odd settings": {"state_dict": WEIGHTS, "settings": Settings(lr=1), "parts": collections.defaultdict(list, a=[1]),
                     "made": functools.partial(max, 1), "kind": Settings, "all": {1, 2}, "table": np.eye(2)},
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_as_people_have_them_are_read(tmp_path, name, zipped):
    torch.save(CHECKPOINTS[name], tmp_path / "last.pth", _use_new_zipfile_serialization=zipped)
    network = make(2)
    load_weights(network, tmp_path / "last.pth", "checkpoint")
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in network.state_dict().items())


def test_safetensors_are_known_by_their_content(tmp_path):
    save_file(under("module.", WEIGHTS), tmp_path / "weights.bin")
    network = make(2)
    load_weights(network, tmp_path / "weights.bin", "checkpoint")
    assert torch.equal(network[3].weight, WEIGHTS["3.weight"])


@pytest.mark.parametrize("wrap", [nn.Sequential, functools.partial(torch.compile, backend="eager")])
def test_a_wrapped_network_reads_the_weights_of_the_plain_one(tmp_path, wrap):
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    network = wrap(make(2))
    load_weights(network, tmp_path / "plain.pt", "checkpoint")
    assert all(torch.equal(*pair) for pair in zip(network.state_dict().values(), WEIGHTS.values(), strict=True))


def test_weights_of_another_precision_are_converted(tmp_path):
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in WEIGHTS.items()},
               tmp_path / "half.pt")  # fmt: skip
    network = make(2)
    load_weights(network, tmp_path / "half.pt", "checkpoint")
    assert network[3].weight.dtype is torch.float32
    torch.testing.assert_close(network[3].weight, WEIGHTS["3.weight"], rtol=1e-3, atol=1e-3)


def test_a_counter_of_batches_may_lack(tmp_path):
    """It does in files that were converted by other programs."""
    torch.save({name: value for name, value in WEIGHTS.items() if "num_batches" not in name}, tmp_path / "x.pt")
    load_weights(network := make(2), tmp_path / "x.pt", "checkpoint")
    assert torch.equal(network[1].weight, WEIGHTS["1.weight"])


MISMATCHES = {
    "another classifier": (
        {**WEIGHTS, "3.weight": torch.ones(7, 16), "3.bias": torch.ones(7)},
        r"9 of its 9 names are in the file, 7 with the same shape\.\n  of another shape: 3\.weight \(\(7, 16\) in the "
        r"file, \(5, 16\) here\), 3\.bias .*$",
    ),
    "another network": (
        under("module.", {**{name: WEIGHTS[name] for name in list(WEIGHTS)[:4]}, "fc.weight": torch.ones(2)}),
        r"4 of its 9 names are in the file under `module\.`.*\n  missing in the file: 1\.running_mean, 1\.running_var, "
        r"3\.weight and 1 more\n  only in the file: fc\.weight\n  likely prefix: `module\.`, which was taken off\.$",
    ),
    "one attribute of several": (
        {**under("backbone.", WEIGHTS), "head.weight": torch.ones(1)},
        r"likely prefix: `backbone\.`, which 1 of the names in the file do not have; save the weights of that module",
    ),
    "two that fit": (
        {**under("model.", WEIGHTS), **under("net.", OTHER)}, r"one prefix in .* got other ones under model\., net\."
    ),
    "whole numbers": (
        {name: value.to(torch.int8) for name, value in WEIGHTS.items()}, r"0\.weight \(int8 in the file, float32 here\)"
    ),
    "a pickled module": (make(), r"a pickled torch\.nn\.\S*Sequential \(save its weights alone: torch\.save\("),
    "two networks": ({"generator": WEIGHTS, "critic": OTHER}, r"weights under several names \(generator, critic; save"),
    "no tensors": ({"lr": 0.1, "optimizer": {"state": {0: torch.ones(1)}}}, r"but the entries lr, optimizer in"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_is_five_lines(tmp_path, name):
    content, message = MISMATCHES[name]
    torch.save(content, tmp_path / "x.pt")
    network = make(2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message) as refused:
        load_weights(network, tmp_path / "x.pt", "checkpoint")
    assert len(str(refused.value).splitlines()) <= 5
    assert "`checkpoint`" in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Harmful:
    """Would be executed by a full unpickling."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, zipped, capfd):
    path, made = tmp_path / "x.pt", tmp_path / "made"
    harmful = {"a": Harmful(open, str(made), "w"), "b": Harmful(print, "executed")}
    torch.save({"state_dict": WEIGHTS, **harmful}, path, _use_new_zipfile_serialization=zipped)  # fmt: skip
    load_weights(make(2), path, "checkpoint")
    torch.save({"state_dict": WEIGHTS, "a": Harmful(os.system, f"touch {made}")}, path,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    with pytest.raises(UserError, match=r"cannot be read without executing it: .*posix"):
        load_weights(make(2), path, "checkpoint")
    assert not made.exists()
    assert "executed" not in capfd.readouterr().out


def test_what_is_no_checkpoint_is_named(tmp_path):
    page = tmp_path / "page.pth"
    page.write_text("<html>not found</html>")
    torch.save(WEIGHTS, tmp_path / "torn.pth")
    torn = (tmp_path / "torn.pth").read_bytes()[:2000]
    (tmp_path / "torn.pth").write_bytes(torn)
    for path, message in (
        (page, "hold weights"), (tmp_path / "torn.pth", "hold weights"), (tmp_path, "which is a folder"),
        (tmp_path / "none.pth", "which is not there"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_weights(make(), path, "checkpoint")


def test_extra_state_that_is_no_tensor_stays(tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            assert state == {"note": 1}

    network = Noted(2, 3)
    save_weights(network, tmp_path / "w.safetensors")
    load_weights(again := Noted(2, 3), tmp_path / "w.safetensors", "checkpoint")
    assert torch.equal(again.weight, network.weight)
