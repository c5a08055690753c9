"""A run on two real processes, as torchrun starts them: one decision, one commit, one ledger."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.processes import BUSY, started
from helpers.toys import (
    BATCH,
    CLASSES,
    FEATURES,
    Hook,
    Toys,
    boost,
    by_hand,
    control,
    curve,
    fit,
    make_teacher,
    samples,
    settings_for,
)
from torch import nn

from bdistil import ErrorLedger, ProgressiveEnsemble, Rung
from bdistil.boosting import commit

TRAIN, VAL = 1101, 601  # odd, so that a sampler repeats one; of blocks of 512 rows, one and two, one and one
SETTINGS = settings_for(2, ladder=[Rung(0), Rung(1), Rung(1, width=2)])


def steady(round):
    """A student without batch statistics, which are those of the rank until the round ends."""
    return nn.Linear(FEATURES, CLASSES)


def accuracy_of(trainer):
    return float(trainer.callback_metrics["val_accuracy"])


def script(folder):
    """What each of the processes runs. The first try of round 1 is rejected, by the order of the test."""

    def say(*what):
        with open(folder / f"rank{os.environ['RANK']}", "a") as file:
            file.write(json.dumps(what) + "\n")

    def judged(settings, number, training, validation):
        first = (number, controller.plan.attempt) == (1, 0)
        verdict = (False, "not wanted") if first else decide(settings, number, training, validation)
        say("verdict", number, controller.plan.rung.name, verdict, asdict(training), asdict(validation))
        return verdict

    def committed(number, *args):
        say("commit", number)
        write(number, *args)

    controller = control(folder / "run", settings=SETTINGS)
    decide, commit.decide = commit.decide, judged
    write, controller.run.commit = controller.run.commit, committed
    # Without a validation at the end, which would happen to bring the batch statistics of the ranks together.
    fit(controller, Toys(train=TRAIN, val=VAL), strategy="ddp", devices=2, check_val_every_n_epoch=3)
    commit.decide = decide
    answers = controller.ensemble(samples(64, 13)[0])
    seen = fit(
        control(folder / "validated", settings=settings_for(1), student=steady),
        Toys(train=TRAIN, val=VAL), strategy="ddp", devices=2, epochs=1, limit_train_batches=2,
        callbacks=lambda: [Hook(on_train_end=lambda trainer, _: say("metrics", accuracy_of(trainer)))],
    )  # fmt: skip
    say("starts", len(json.loads((seen.run.root / "environment.json").read_text())))
    say("end", len(controller.ensemble), hashlib.sha256(answers.numpy().tobytes()).hexdigest())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the run; in `rank0` and `rank1`, what each process said."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, folder]
    environment, log = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}, folder / "log"
    with open(log, "w") as file, started(command, env=environment, stdout=file, stderr=file) as process:
        try:
            process.wait(BUSY)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the ranks hang:\n{log.read_text()[-5000:]}\n{heard(folder)}")
    assert process.returncode == 0, log.read_text()[-5000:]
    return folder


def heard(folder):
    """What the two processes said."""
    files = [folder / "rank0", folder / "rank1"]
    return [[json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [] for file in files]


@pytest.mark.distributed
def test_both_ranks_take_the_same_decisions(run):
    first, second = ([line for line in lines if line[0] == "verdict"] for lines in heard(run))
    assert first == second
    assert [(number, rung, verdict[0]) for _, number, rung, verdict, *_ in first] == [
        (0, "F0", True), (1, "F1", False), (1, "F1 x2", True)
    ]  # fmt: skip


@pytest.mark.distributed
def test_a_round_is_committed_once_and_both_ranks_end(run):
    first, second = heard(run)
    assert [line[1] for line in first if line[0] == "commit"] == [0, 1]
    assert not [line for line in second if line[0] == "commit"]
    assert first[-1] == second[-1]
    assert first[-1][:2] == ["end", 2]
    rows = curve(run / "run")
    assert [row["accepted_class"] for row in rows] == ["", "F0", "F1 x2"]
    assert all(row["test_accuracy"] for row in rows)
    a_round = 2 * TRAIN * 3  # epochs, samples, passes
    assert [int(row["train_macs"]) for row in rows[1:]] == [a_round * 72, a_round * (144 + 24)]
    assert json.loads((run / "run/rounds/001/round.json").read_text())["tries"] == ["F1: not wanted"]


@pytest.mark.distributed
def test_validation_counts_each_sample_once(run):
    """601 samples on two ranks: as many right answers as in the pass over all of them at the end of the round."""
    first, second = ([line[1] for line in lines if line[0] == "metrics"] for lines in heard(run))
    row = json.loads((run / "validated/rounds/000/round.json").read_text())["curve"]
    assert first == second == [pytest.approx(row["val_accuracy"], abs=1e-6)]
    assert 0.1 < row["val_accuracy"] < 0.99
    assert row["train_macs"] == 2 * 2 * BATCH * 3 * FEATURES * CLASSES


@pytest.mark.distributed
def test_a_start_is_recorded_once(run):
    (start,) = json.loads((run / "run/environment.json").read_text())
    assert (start["launcher"], start["processes"]) == ("torchrun", 2)
    assert start["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [line for lines in heard(run) for line in lines if line[0] == "starts"] == [["starts", 1]] * 2


@pytest.mark.distributed
@pytest.mark.parametrize(("part", "count", "seed"), [("train", TRAIN, 11), ("val", VAL, 12)])
def test_the_ledger_is_that_of_the_committed_students(run, part, count, seed):
    ledger = ErrorLedger(run / "run/ledger" / part)
    ledger.open(count)
    ledger.use(2)
    g, error = ledger.rows(torch.arange(count))
    x, y = samples(count, seed)
    ensemble = ProgressiveEnsemble.load(run / "run")
    truth = by_hand(ensemble, make_teacher(), x)
    torch.testing.assert_close(g, truth.g, atol=1e-6, rtol=0)
    torch.testing.assert_close(error, truth.error, atol=5e-6, rtol=0)
    if part == "val":
        right = float((ensemble(x).argmax(-1) == y).double().mean())
        assert float(curve(run / "run")[-1]["val_accuracy"]) == pytest.approx(right, abs=1e-5)


@pytest.mark.distributed
def test_one_process_finds_the_run_finished(run):
    before = ProgressiveEnsemble.load(run / "run").macs
    assert boost(run / "run", Toys(train=TRAIN, val=VAL), settings=SETTINGS).ensemble.macs == before


if __name__ == "__main__":
    torch.set_num_threads(1)
    script(Path(sys.argv[1]))
