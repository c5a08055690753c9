"""ComputeCost in real fits of plain LightningModules, read back from what a logger wrote."""

import csv
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.toys import BODY, boost, make_plain
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdistil.callbacks.compute_cost import ComputeCost
from bdistil.errors import UserError

SAMPLES, BATCH = 10, 4  # the last batch is smaller
MACS = 6 * 8 + 8 * 3


class Samples(Dataset):
    """Samples as a function of (x, y): a tensor, a pair, a dictionary."""

    def __init__(self, form, count=SAMPLES):
        self.form, self.count = form, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.form(torch.full((6,), float(index)), index % 3)


class Plain(L.LightningModule):
    """A linear net with everything that measuring could disturb; knows nothing of bdistil."""

    def __init__(self, example=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
        self.example_input_array = example
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) else batch
        loss = self(x).square().mean()
        self.losses.append(loss.item())
        self.log("train_loss", loss, on_step=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())


class NoForward(Plain):
    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


class Spectral(Plain):
    def forward(self, x):
        return self.net(torch.fft.fft(x).real)


def pair(x, y):
    return x, y


def loader(form=pair, count=SAMPLES):
    return DataLoader(Samples(form, count), batch_size=BATCH, shuffle=True)


def fit(module, callbacks, path, *, data=None, ckpt_path=None, epochs=1, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=CSVLogger(path, name="", version=0), log_every_n_steps=1,
        callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        **{"devices": 1, **options},
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return trainer


def logged(path):
    """All values of each cost, by name."""
    with (path / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name in row if name.startswith("cost/")}
    return {name.removeprefix("cost/"): [float(row[name]) for row in rows if row[name]] for name in names}


def test_a_fit_of_a_plain_module_logs_its_cost(tmp_path):
    callback, module = ComputeCost(), Plain()
    trainer = fit(module, [callback], tmp_path, epochs=3)
    params = 6 * 8 + 8 + 16 + 8 * 3 + 3
    seconds, latency = callback.seconds, logged(tmp_path)["latency_ms"]
    assert callback.cost.macs == MACS
    assert callback.samples_seen == 3 * SAMPLES
    assert 0 < latency[0] < 1000
    assert 0 < seconds < 60
    assert logged(tmp_path) == {
        "macs": [MACS],
        "params": [params],
        "weight_bytes": [4 * params],
        "activation_bytes": [2 * 8 * 4],
        "latency_ms": latency,
        "train_macs": [3 * MACS * 3 * SAMPLES],
        "seconds": [pytest.approx(seconds)],
    }
    assert {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("cost/")} == {
        f"cost/{name}": pytest.approx(values[0]) for name, values in logged(tmp_path).items()
    }


FORMS = {
    "a tensor": lambda x, y: x,
    "a pair": pair,
    "a list with an index": lambda x, y: [x, y, {"index": y}],
}


@pytest.mark.parametrize("form", FORMS)
def test_without_inputs_the_first_sample_is_taken(tmp_path, form):
    callback = ComputeCost(latency=False)
    fit(Plain(), [callback], tmp_path, data=loader(FORMS[form]))
    assert (callback.cost.macs, callback.samples_seen) == (MACS, SAMPLES)
    assert "latency_ms" not in logged(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "example", "macs"),
    [
        (torch.zeros(1, 6), None, MACS),
        ((torch.zeros(2, 6),), torch.zeros(1, 6), 2 * MACS),  # given inputs come first, and are taken as they are
        (None, torch.zeros(5, 6), MACS),  # of the module's example the first row
        (None, (torch.zeros(5, 6),), MACS),
    ],
)
def test_inputs_that_were_given_serve_batches_of_any_form(tmp_path, inputs, example, macs):
    callback = ComputeCost(inputs, latency=False)
    fit(Plain(example), [callback], tmp_path, data=loader(lambda x, y: {"x": x, "y": y}))
    assert callback.cost.macs == macs
    assert callback.samples_seen == SAMPLES
    assert logged(tmp_path)["train_macs"] == [3 * MACS * SAMPLES], "of samples, also if two were measured at once"


def test_training_is_the_same_with_and_without(tmp_path):
    results = []
    for name, callbacks in {"with": [ComputeCost()], "without": []}.items():
        torch.manual_seed(0)
        module = Plain()
        fit(module, callbacks, tmp_path / name, epochs=2)
        results.append((module.losses, {key: value.tolist() for key, value in module.state_dict().items()}))
    assert len(results[0][0]) == 6
    assert results[0] == results[1]


def test_a_part_is_measured_by_its_name(tmp_path):
    whole, part = ComputeCost(latency=False), ComputeCost(torch.zeros(1, 6), attribute="net.0", latency=False)
    fit(Plain(), [whole, part], tmp_path)
    assert (whole.cost.macs, part.cost.macs) == (MACS, 48)
    both = logged(tmp_path)
    assert (both["macs"], both["net.0/macs"]) == ([MACS], [48])
    fit(NoForward(), [part], tmp_path / "no_forward")
    assert part.samples_seen == SAMPLES, "an instance that serves a second fit counts that fit"
    assert logged(tmp_path / "no_forward")["macs"] == [48]


ERRORS = {
    "no input": (
        ComputeCost(), Plain, lambda x, y: {"x": x},
        r"no input to measure .*ComputeCost\(inputs=\.\.\.\), or the module's `example_input_array`",
    ),
    "no such part": (
        ComputeCost(attribute="student"), Plain, pair, r"attribute='student'.* no module .*\['net'\]",
    ),
    "no forward": (ComputeCost(), NoForward, pair, r"attribute=None.*module with a `forward` .*\['net'\]"),
    "uncounted operator": (ComputeCost(), Spectral, pair, r"_fft_\w+ x1.*uncounted=\"record\""),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_comes_before_the_first_step(tmp_path, name):
    callback, make, form, message = ERRORS[name]
    module = make()
    with pytest.raises(UserError, match=message):
        fit(module, [callback], tmp_path, data=loader(form))
    assert not module.losses


def test_an_uncounted_operator_can_be_recorded(tmp_path):
    callback = ComputeCost(uncounted="record", latency=False)
    fit(Spectral(), [callback], tmp_path)
    assert (callback.cost.macs, callback.cost.uncounted) == (MACS, {"aten::_fft_r2c": 1})


def test_a_resumed_fit_goes_on_counting(tmp_path):
    first, second, file = ComputeCost(latency=False), ComputeCost(latency=False), tmp_path / "one.ckpt"
    fit(Plain(), [first], tmp_path / "a").save_checkpoint(file)
    saved = torch.load(file, weights_only=True)
    state = saved["callbacks"][first.state_key]
    assert state["samples_seen"] == SAMPLES
    assert {type(value) for value in state.values()} == {int, float}
    state["seconds"] = 1000.0
    torch.save(saved, file)
    fit(Plain(), [second], tmp_path / "b", epochs=3, ckpt_path=file)
    assert second.samples_seen == 3 * SAMPLES
    assert 1000 < second.seconds < 1060
    assert logged(tmp_path / "b")["train_macs"] == [3 * MACS * 3 * SAMPLES]


def test_the_sanity_check_does_not_clear_the_figures(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[ComputeCost(latency=False)],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(Validated(), loader(), DataLoader(Samples(pair), batch_size=BATCH))
    assert trainer.callback_metrics["cost/macs"] == MACS
    assert "val_loss" in trainer.callback_metrics


def test_samples_of_all_ranks_are_summed_and_rank_zero_logs():
    """Two ranks, the second with one batch less; `reduce` gives both what both together have."""
    lines, ranks = [], []
    for rank, batches in enumerate(([4, 4], [4])):
        callback = ComputeCost()
        trainer = SimpleNamespace(
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
            global_step=0, world_size=2, is_global_zero=rank == 0, callback_metrics={}, callbacks=[],
            loggers=[SimpleNamespace(log_metrics=lambda figures, step, rank=rank: lines.append((rank, figures)))],
        )  # fmt: skip
        callback.on_train_start(trainer, Plain())
        callback.cost = SimpleNamespace(macs=MACS)
        for size in batches:
            callback.on_train_batch_end(trainer, Plain(), None, [torch.zeros(size, 6)], 0)
        ranks.append((callback, trainer))
    assert ranks[0][0].state_dict()["samples_seen"] == 16, "a checkpoint of rank zero speaks for all"
    total = sum(callback.samples_seen for callback, _ in ranks)
    for callback, trainer in ranks:
        trainer.strategy = SimpleNamespace(reduce=lambda value, reduce_op: torch.tensor({"sum": total}[reduce_op]))
        callback.on_train_end(trainer, Plain())
        assert callback.samples_seen == 12
    assert [(rank, figures["cost/train_macs"]) for rank, figures in lines] == [(0, 3 * MACS * 12)]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_count_together(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(find_free_network_port()))
    callback = ComputeCost(latency=False)
    fit(Plain(), [callback], tmp_path, data=loader(count=12), strategy="ddp_spawn", devices=2)
    assert logged(tmp_path)["train_macs"] == [3 * MACS * 12]


class Batch:
    """Has no tensor that Lightning's or torch's trees would find."""

    def __init__(self, pairs):
        self.x = torch.stack([x for x, _ in pairs])


def test_batches_without_a_tensor_are_refused():
    class Own(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.x, batch_idx)

    loader = DataLoader(Samples(lambda x, y: (x, y)), BATCH, collate_fn=Batch)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ComputeCost(inputs=torch.zeros(1, 6))],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"counts samples by the first tensor of a batch .*, got a Batch without one"):
        trainer.fit(Own(), loader)


def test_in_a_boosting_run(tmp_path, caplog):
    with caplog.at_level("INFO"):
        boost(tmp_path / "whole", callbacks=lambda: [ComputeCost(latency=False)])
    assert "also counts the parts of earlier students" in caplog.text
    with pytest.raises(UserError, match=r"reads x alone, got 'student', which also reads earlier"):
        boost(tmp_path / "part", callbacks=lambda: [ComputeCost(attribute="student", latency=False)])
    body = ComputeCost(attribute="student.body", latency=False)
    boost(tmp_path / "body", callbacks=lambda: [body])
    assert body.cost.macs == BODY
    of_plain = ComputeCost(attribute="student", latency=False)
    rows = boost(tmp_path / "plain", student=make_plain, callbacks=lambda: [of_plain]).run.rows()
    assert of_plain.cost.macs == rows[1]["macs"]


class OfTwo(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


@pytest.mark.filterwarnings("ignore:.*self.log.* but `Trainer.barebones=True")
def test_samples_of_further_loaders_are_warned_of():
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, barebones=True, callbacks=[callback := ComputeCost(latency=False)]
    )
    with pytest.warns(UserWarning, match=r"counts the samples of the first of 2 training loaders"):
        trainer.fit(OfTwo(torch.zeros(1, 6)), {"a": loader(), "b": loader()})
    assert callback.samples_seen == SAMPLES
