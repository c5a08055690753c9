"""Settings that are baselines: independent students, and the squared error to what is left."""

import pytest
import torch
from helpers.toys import boost, settings_for

from bdistil import Rung
from bdistil.boosting import round as rounds
from bdistil.errors import UserError

ALONE = {"ladder": [Rung(0)], "start": 0, "independent": True}


def seen_losses(monkeypatch, tmp_path, **settings):
    """Round number, deviation, error and loss of every step of a run."""
    seen = []
    plain = rounds.BoostingRound.loss

    def watched(module, deviation, error, target):
        loss = plain(module, deviation, error, target)
        seen.append((module.number, deviation.detach(), error, target, loss.detach(), module.game))
        return loss

    monkeypatch.setattr(rounds.BoostingRound, "loss", watched)
    boost(tmp_path, settings=settings_for(2, **settings))
    return seen


@pytest.mark.parametrize("loss", ["game", "prefix_kl"])
def test_an_independent_student_has_the_loss_of_a_first_one(monkeypatch, tmp_path, loss):
    seen = seen_losses(monkeypatch, tmp_path, loss=loss, **ALONE)
    _, *_, first = next(step for step in seen if step[0] == 0)
    later = [step for step in seen if step[0] == 1]
    assert later
    for _, _, error, _, _, game in later:
        assert not error.any()
        assert torch.allclose(game.log_z, first.log_z)


def test_a_boosted_student_has_not(monkeypatch, tmp_path):
    seen = seen_losses(monkeypatch, tmp_path, ladder=[Rung(0)], start=0)
    first, later = ([step for step in seen if step[0] == number] for number in (0, 1))
    assert any(step[2].any() for step in later)
    assert not torch.allclose(later[0][-1].log_z, first[0][-1].log_z)


def test_residual_is_the_squared_error_to_what_is_left(monkeypatch, tmp_path):
    for _, deviation, error, target, loss, _ in seen_losses(monkeypatch, tmp_path, loss="residual"):
        student = deviation + target
        assert torch.allclose(loss, (student - (target - error)).square().mean())


def test_independent_students_take_no_links():
    with pytest.raises(UserError, match="`ladder` of the boosting settings to be rungs with links=0 for independent"):
        settings_for(2, independent=True)
