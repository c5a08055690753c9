"""Random augmentation: what is cached belongs to the view of a sample that a batch brings."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from helpers.toys import (
    BATCH,
    FEATURES,
    ROUNDS,
    TRAIN,
    VAL,
    Hook,
    Noisy,
    Toys,
    boost,
    by_hand,
    control,
    curve,
    digests,
    fit,
    make_teacher,
    settings_for,
)
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bdistil import ProgressiveEnsemble, UserError
from bdistil.data.loaders import Views
from bdistil.utils.seeding import reseed

K = 2


class Drawing(Dataset):
    """Draws from each of the generators that augmentations use."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.random(), torch.rand(()).item()]), 0


def test_a_view_is_a_function_of_sample_and_number():
    views = Views(Drawing(), seed=3)
    reseed("somewhere else")
    first = views.__getitems__([2, 5, 2 + 7])
    reseed("and now here")
    assert torch.equal(views[2][0], first[0][0])
    assert torch.equal(views[2 + 7][0], first[2][0])
    assert torch.equal(Views(Drawing(), seed=3, first=1)[2][0], first[2][0])
    drawn = torch.stack([x for x, _ in first])[:, 1:]
    assert len(drawn.unique()) == drawn.numel()
    assert not torch.equal(Views(Drawing(), seed=4)[2][0], first[0][0])


def test_reading_a_view_draws_nothing_of_the_training():
    reseed("here")
    wanted = random.random(), np.random.random(), torch.rand(3).tolist()
    reseed("here")
    Views(Drawing(), seed=3).__getitems__([0, 1, 9])
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == wanted


def views_of(toys, seed=0):
    """x (K, N, ...) of the training part of toys, as a run of that seed sees them."""
    dataset = toys.train_dataloader().dataset
    return torch.stack(
        [torch.stack([x for x, _ in Views(dataset, seed, v).__getitems__(range(TRAIN))]) for v in range(K)]
    )


class Looking(L.Callback):
    """Shows each training batch to a function."""

    def __init__(self, look):
        self.look = look

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.look(trainer, module, batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_state_belongs_to_the_view_of_a_batch(tmp_path, workers):
    """What a round reads of g, S and linked features, against teacher and students asked by hand about the same x."""
    toys, teacher, seen = Toys(noisy=True, workers=workers), make_teacher(), set()
    x_of = views_of(toys)

    def compare(trainer, module, batch):
        x, _, index = batch
        part, rows = module._view_of(index)
        view = trainer.current_epoch % K
        torch.testing.assert_close(x, x_of[view, rows], rtol=0, atol=0)
        _, target, error = module.state(x, index)
        if module.number == 0:
            return
        ensemble = ProgressiveEnsemble.load(tmp_path)
        on_view, canonical = by_hand(ensemble, teacher, x), by_hand(ensemble, teacher, x_of[0, rows])
        torch.testing.assert_close(target, on_view.g, atol=1e-6, rtol=0)
        torch.testing.assert_close(error, on_view.error, atol=5e-6, rtol=0)
        if view:
            assert (error - canonical.error).abs().max() > 0.01
            assert (target - canonical.g).abs().max() > 0.01  # what a cache by index alone would have given
        linked = part.linked(module._linked, rows, module.device)
        torch.testing.assert_close(linked[0], ensemble.students[module.number - 1].features(x), atol=1e-6, rtol=0)
        seen.add((module.number, view))

    controller = control(tmp_path, settings=settings_for(views=K), teacher=teacher)
    fit(controller, toys, callbacks=lambda: [Looking(compare)], epochs=3)
    assert seen == {(number, view) for number in (1, 2) for view in range(K)}


def test_a_run_of_views_goes_on_as_it_would_have_ended(tmp_path):
    options = {"settings": settings_for(2, views=K), "trainer": {"epochs": 3}}
    boost(tmp_path / "whole", Toys(noisy=True), **options)

    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 2):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        boost(tmp_path / "cut", Toys(noisy=True), callbacks=lambda: [Hook(on_train_epoch_start=stop)], **options)
    boost(tmp_path / "cut", Toys(noisy=True, workers=1), **options)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_validation_part_that_augments_is_seen_in_one_view(tmp_path):
    """What is logged in a fit, batch by batch, is what is found at its end, of the same x."""

    class Wrong(Toys):
        def val_dataloader(self):
            return DataLoader(Noisy(*self.parts["val"]), batch_size=BATCH)

    logged = []

    def look(trainer, module):
        logged.append([float(trainer.callback_metrics[name]) for name in ("val_loss", "val_rms")])

    boost(tmp_path, Wrong(), callbacks=lambda: [Hook(on_fit_end=look)])
    for values, row in zip(logged, curve(tmp_path)[1:], strict=True):
        assert values == pytest.approx([float(row[column]) for column in ("val_loss", "rms_error")], rel=1e-4)


def test_without_augmentation_there_is_one_view(finished, tmp_path):
    boost(tmp_path, settings=settings_for(views=4))
    assert digests(tmp_path) == digests(finished.run_dir)
    assert not list(tmp_path.glob("ledger/train/view*"))


def test_recomputed_state_asks_about_the_x_of_the_batch(tmp_path):
    seen, teacher, toys = [], make_teacher(), Toys(noisy=True)

    def compare(trainer, module):
        x, rows = torch.randn(BATCH, FEATURES), np.arange(BATCH)
        module.eval()
        answer, target, error = module.state(x, rows)
        torch.testing.assert_close(answer, module(x))
        module.train()
        if module.number:
            expected = by_hand(controller.ensemble, teacher, x)
            torch.testing.assert_close(target, expected.g, atol=1e-6, rtol=0)
            torch.testing.assert_close(error, expected.error, atol=5e-6, rtol=0)
            seen.append(module.number)

    controller = control(tmp_path, settings=settings_for(state="recompute"), teacher=teacher)
    fit(controller, toys, callbacks=lambda: [Hook(on_train_start=compare)])
    assert seen == [1, 2]


def test_any_other_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"random augmentation.*BoostingSettings\(state='recompute'\).*views=K"):
        boost(tmp_path, Toys(noisy=True))
    assert not digests(tmp_path)
    # As the message says, in the same folder.
    assert len(boost(tmp_path, Toys(noisy=True), settings=settings_for(views=K)).ensemble) == ROUNDS
    teacher = curve(tmp_path)[0]  # is asked about each view of the training part
    assert int(teacher["train_macs"]) == int(teacher["macs"]) * (K * TRAIN + VAL)
    assert curve(tmp_path)[1]["test_accuracy"]


class Own(Toys):
    """Augments where no seed reaches: in the collate function, or from a generator of its own."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def train_dataloader(self):
        if self.where == "collate":
            return DataLoader(TensorDataset(*self.parts["train"]), BATCH, collate_fn=shaken)
        return DataLoader(Hidden(*self.parts["train"]), BATCH)


def shaken(items):
    x, y = torch.utils.data.default_collate(items)
    return x + torch.randn_like(x), y


class Hidden(Dataset):
    def __init__(self, *tensors):
        self.tensors, self.generator = tensors, np.random.default_rng(0)

    def __len__(self):
        return TRAIN

    def __getitem__(self, index):
        noise = self.generator.standard_normal(FEATURES).astype(np.float32)
        return self.tensors[0][index] + torch.from_numpy(noise), self.tensors[1][index]


@pytest.mark.parametrize("where", ["collate", "dataset"])
def test_augmentation_that_no_view_fixes_is_refused(tmp_path, where):
    with pytest.raises(UserError, match=r"`views=2` fixes .*generator of its own.*state='recompute'"):
        boost(tmp_path, Own(where), settings=settings_for(views=K))
