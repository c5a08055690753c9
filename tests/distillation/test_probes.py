"""What the callbacks of distillation read: the x, the samples and the loss with which the student is trained."""

import lightning as L
import numpy as np
import pytest
import torch
from helpers.toys import TRAIN, Hook, Noisy, Toys, boost, make_teacher, make_trainer, settings_for
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler, random_split

from bdistil import Rung, Student, UserError
from bdistil.callbacks import GradientNoise, LossMixing
from bdistil.distillation import Distillation, MixingSettings
from bdistil.distillation.gradient_noise import spread_batches
from bdistil.distillation.probes import RoundProbe
from bdistil.utils.modules import eval_mode

X, Y = torch.randn(96, 6, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 3
SOON = MixingSettings(warmup=0, every=1, inner=1)


class Data(L.LightningDataModule):
    """Parts and samplers of any kind."""

    def __init__(self, train=None, sampler=None, y=Y):
        super().__init__()
        self.train, self.sampler, self.whole = train, sampler, TensorDataset(X, y)

    def train_dataloader(self):
        data = self.train() if self.train else self.whole
        return DataLoader(data, batch_size=16, shuffle=self.sampler is None, sampler=self.sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(X, Y), batch_size=32)


def fit(data, *callbacks, module=None, **options):
    options = {"epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0, **options}
    module = module or Distillation(nn.Linear(6, 3), nn.Linear(6, 3))
    make_trainer(*callbacks, **options).fit(module, datamodule=data)
    return module


@pytest.fixture(params=["noise", "mixing"])
def callback(request, tmp_path):
    made = {"noise": GradientNoise(every=1, samples=96, folder=tmp_path), "mixing": LossMixing(SOON, folder=tmp_path)}
    return made[request.param]


# ---- a boosting run


@pytest.mark.parametrize("settings", [{"views": 2}, {"state": "recompute"}], ids=str)
def test_x_of_a_probe_is_the_one_that_its_target_and_error_are_of(tmp_path, settings):
    teacher, seen = make_teacher(), []

    def look(trainer, module):
        probe = RoundProbe(module)
        for validation, part in ((False, module.train_part), (True, module.val_part)):
            x, _, index = next(probe.batches([list(range(20))], validation=validation))
            with torch.no_grad():
                again = module.ledger.units.inward(teacher.eval()(x))
            torch.testing.assert_close(again, part.ledger.rows(index)[0], rtol=1e-4, atol=1e-5)
            seen.append(module.number)

    data = Toys(noisy=True)
    data.val_dataloader = lambda: DataLoader(Noisy(*data.parts["val"]), batch_size=32)
    boost(
        tmp_path, data, teacher=teacher, callbacks=lambda: [Hook(on_train_start=look)], settings=settings_for(2, **settings)
    )
    assert seen == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "settings", [{"loss": "prefix_kl"}, {"loss": "prefix_kl+game"}, {"loss": "residual"}, {"independent": True}], ids=str
)
def test_the_noise_of_a_round_is_that_of_the_loss_it_is_trained_with(tmp_path, settings):
    seen = []

    def look(trainer, module):
        """By hand: gradients of the loss of a training step on all samples."""
        index = np.arange(TRAIN)
        x, _ = module.train_part.loader.dataset.tensors
        g, error = module.ledger.rows(index)
        with eval_mode(module), torch.no_grad():
            inputs = torch.cat([module.student.features(x), torch.ones(TRAIN, 1)], 1)
            deviation = module.answer(x, index, module.train_part) - g
        deviation.requires_grad_()
        error = torch.zeros_like(error) if module.settings.independent else error
        (slope,) = torch.autograd.grad(TRAIN * module.loss(deviation, error, g), deviation)
        seen.append(float((slope[:, :, None] * inputs[:, None]).flatten(1).var(0).sum()))

    noises = []

    def both():
        noises.append(GradientNoise(every=5, samples=TRAIN))
        return [Hook(on_train_end=look), noises[-1]]

    boost(tmp_path, callbacks=both, settings=settings_for(2, ladder=[Rung(0)], **settings), trainer={"epochs": 1})
    found = [noise.history[-1]["variance_game"] for noise in noises]
    assert found == pytest.approx(seen, rel=1e-3)


