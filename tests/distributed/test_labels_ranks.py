"""Labels on two real processes: mean average precision over the samples of both, and a wrong label ends the job."""

import json
import os

import lightning as L
import pytest
import torch
from helpers.toys import CLASSES, FEATURES, Hook, boost, curve, on_ranks, samples, settings_for
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multilabel_average_precision

from bdistil import ProgressiveEnsemble, UserError

pytestmark = pytest.mark.distributed

TRAIN, VAL = 301, 2201  # of blocks of 512 rows, one and five: one process has none of the training part


def labels_of(x):
    return (x[:, :CLASSES] > 0.3).long()


class Mappings(L.LightningDataModule):
    """Batches that are mappings, with several labels; with a wrong one where it is told so."""

    def __init__(self, wrong=False):
        super().__init__()
        self.wrong = wrong

    def loader(self, count, seed, **options):
        x = samples(count, seed)[0]
        y = labels_of(x) + 2 * self.wrong
        return DataLoader([{"a": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=32, **options)

    def train_dataloader(self):
        return self.loader(TRAIN, 11, shuffle=True)

    def val_dataloader(self):
        return self.loader(VAL, 12)


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.layer(x["a"])


def teacher():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Read()


def script(folder):
    found = []
    record = Hook(on_train_end=lambda trainer, _: found.append(float(trainer.callback_metrics["val_accuracy"])))
    settings = settings_for(1, task="multilabel")
    trainer = {"strategy": "ddp", "devices": 2, "epochs": 1}
    boost(
        folder / "run", Mappings(), teacher=teacher(), student=lambda round: Read(), settings=settings,
        callbacks=lambda: [record], trainer=trainer,
    )  # fmt: skip
    (folder / f"rank{os.environ['RANK']}").write_text(json.dumps(found))
    try:
        boost(
            folder / "wrong", Mappings(wrong=True), teacher=teacher(), student=lambda round: Read(), settings=settings,
            trainer=trainer,
        )  # fmt: skip
    except UserError as error:
        (folder / "error").write_text(str(error))
        raise


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, on_ranks(folder, script, folder)


def test_mean_average_precision_is_that_of_all_samples(job):
    folder, _ = job
    x = samples(VAL, 12)[0]
    with torch.no_grad():
        logits = [teacher()({"a": x}), ProgressiveEnsemble.load(folder / "run", student=lambda _: Read())({"a": x})]
    rows = curve(folder / "run")
    for row, answers in zip(rows, logits, strict=True):
        expected = multilabel_average_precision(answers.sigmoid(), labels_of(x), CLASSES)
        assert float(row["val_accuracy"]) == pytest.approx(float(expected), abs=1e-5)
    logged = [json.loads((folder / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert logged[0] == logged[1] == [pytest.approx(float(rows[1]["val_accuracy"]), abs=1e-5)]


def test_a_wrong_label_ends_the_job(job):
    folder, statuses = job
    assert 1 in statuses
    assert "0 or 1" in (folder / "error").read_text()
    assert not list((folder / "wrong").glob("rounds/*"))
