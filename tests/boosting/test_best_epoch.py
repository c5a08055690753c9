"""The epoch that a round keeps: the last one, or the one with the smallest error to the teacher on validation."""

import pytest
import torch
from helpers.toys import Hook, Killed, boost, digests, settings_for
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file

from bdistil import UserError

# Learning rates at which the error rises and falls from epoch to epoch.
SETTINGS = {"lr": 0.3, "schedule": "constant"}


def watched(run_dir, callbacks=list, trainer=None, rounds=2, **settings):
    """A run; the error and the weights of each validation of its rounds."""
    seen = {}

    def look(trainer, module):
        if not trainer.sanity_checking:
            weights = {name: value.clone() for name, value in module.student.state_dict().items()}
            seen.setdefault(module.number, []).append((float(trainer.callback_metrics["val_rms"]), weights))

    controller = boost(
        run_dir, settings=settings_for(rounds, **{**SETTINGS, **settings}),
        callbacks=lambda: [*callbacks(), Hook(on_validation_end=look)], trainer={"epochs": 6, **(trainer or {})},
    )  # fmt: skip
    return controller, seen


def best_of(seen, number):
    return min(range(len(seen[number])), key=lambda epoch: seen[number][epoch][0])


def test_the_best_epoch_is_committed(tmp_path):
    controller, seen = watched(tmp_path, keep_epoch="best")
    bests = [best_of(seen, number) for number in range(2)]
    assert bests != [5, 5], "the last epochs are the best: this shows nothing"
    for number, epoch in enumerate(bests):
        record = controller.run.record(number)
        error, weights = seen[number][epoch]
        assert record["kept_epoch"] == epoch
        assert record["epochs"] == 6
        assert record["curve"]["rms_error"] == pytest.approx(error, rel=1e-4)
        kept = load_file(tmp_path / f"rounds/{number:03d}/student.safetensors")
        assert all(torch.equal(kept[name], value) for name, value in weights.items())


def test_the_last_epoch_is_committed_by_default(tmp_path):
    controller, seen = watched(tmp_path)
    for number in range(2):
        assert "kept_epoch" not in controller.run.record(number)
        assert controller.run.record(number)["curve"]["rms_error"] == pytest.approx(seen[number][-1][0], rel=1e-4)


@pytest.mark.parametrize("epoch", [2, 5])
def test_the_best_epoch_survives_a_kill(tmp_path, epoch):
    watched(tmp_path / "whole", keep_epoch="best")

    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, epoch):
            raise Killed

    with pytest.raises(Killed):
        watched(tmp_path / "run", lambda: [Hook(on_train_epoch_start=stop)], keep_epoch="best")
    controller, _ = watched(tmp_path / "run", keep_epoch="best")
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert controller.run.record(1)["kept_epoch"] is not None


def test_a_round_that_had_ended_keeps_its_best_epoch(tmp_path):
    watched(tmp_path / "whole", keep_epoch="best")

    def fail(trainer, module):
        if module.number == 1:
            raise Killed

    with pytest.raises(Killed):
        watched(tmp_path / "run", lambda: [Hook(on_train_end=fail)], keep_epoch="best")
    watched(tmp_path / "run", keep_epoch="best")
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_averaged_weights_are_those_that_were_validated(tmp_path):
    """The callback puts its averages in place for a validation and takes them back before the error is known."""
    controller, seen = watched(tmp_path, lambda: [EMAWeightAveraging(decay=0.8)], rounds=1, keep_epoch="best")
    error = seen[0][best_of(seen, 0)][0]
    assert controller.run.record(0)["curve"]["rms_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    "trainer",
    [
        {"val_check_interval": 500, "check_val_every_n_epoch": None},
        {"epochs": -1, "max_steps": 12, "check_val_every_n_epoch": 5},
    ],
)
def test_a_fit_that_ends_before_its_first_validation_says_so(tmp_path, trainer):
    with pytest.warns(UserWarning, match="Round 1 keeps its last epoch, not the best"):
        controller, _ = watched(tmp_path, trainer=trainer, rounds=1, keep_epoch="best")
    assert controller.run.record(0)["kept_epoch"] is None


@pytest.mark.parametrize("trainer", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 9}])
def test_a_trainer_that_does_not_validate_is_refused(tmp_path, trainer):
    with pytest.raises(UserError, match=r"a Trainer that validates, as keep_epoch='best' compares validation errors"):
        watched(tmp_path, trainer=trainer, keep_epoch="best")
    assert not digests(tmp_path)
