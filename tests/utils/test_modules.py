"""Eval mode for a while, and the mode of every submodule back, also after an error."""

import pytest
from torch import nn

from bdistil.utils.modules import eval_mode


@pytest.mark.parametrize("fails", [False, True])
def test_every_submodule_gets_its_own_mode_back(fails):
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2).eval(), nn.ReLU()).train(False), nn.ReLU())
    network[1][1].train()
    before = [part.training for part in network.modules()]
    assert {*before} == {True, False}
    if fails:
        with pytest.raises(ZeroDivisionError), eval_mode(network):
            assert 1 / sum(part.training for part in network.modules())
    else:
        with eval_mode(network):
            assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == before
