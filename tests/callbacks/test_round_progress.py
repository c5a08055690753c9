"""The bar names the round and the accuracy of the prefix in a real fit."""

import lightning.pytorch as L
import pytest
from helpers.toys import Toys, make_student, make_teacher

from bdistil import BoostingSettings
from bdistil.callbacks import RoundController, RoundProgressBar


@pytest.mark.filterwarnings("ignore:.*")
def test_the_bar_names_round_and_prefix_accuracy(tmp_path):
    seen = []

    class Watched(RoundProgressBar):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            seen.append(self.get_metrics(trainer, pl_module))

    settings = BoostingSettings(rounds=2, accept="margin", margin_share=0.0)
    controller = RoundController(tmp_path, teacher=make_teacher(), student=make_student, settings=settings)
    data = Toys()
    for module in controller.rounds(data):
        bars = [Watched(), controller]
        L.Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=bars, enable_model_summary=False).fit(
            module, data
        )
    assert [metrics["round"] for metrics in seen] == ["1/2", "1/2", "2/2", "2/2"]
    assert all(set(metrics) == {"round", "prefix accuracy", "rms"} for metrics in seen)
    assert 0 <= float(seen[-1]["prefix accuracy"]) <= 1
