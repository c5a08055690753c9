"""What MEKD is worth on digits: students from an API and 280 unlabelled images, against the number of queries.

    python -m pytest -m slow -s tests/bench/test_mekd_claims.py

Every result is a file in BDISTIL_BENCH_DIR (`runs/bench-mekd` by default), so that an interrupted bench goes on.
"""

import itertools
import json
import os
import shutil
import statistics
from pathlib import Path

import lightning as L
import pytest
import torch

from bdistil import ApiTeacher, BoostingSettings
from bdistil.callbacks import RoundController
from bdistil.data.attach import indexed_loaders
from bdistil.data.digits import Digits
from bdistil.data.local_digits import LocalDigits
from bdistil.disk import write_atomically
from bdistil.distiller import TeacherSpec, TeacherTraining
from bdistil.mekd import MappingEmulation
from bdistil.mekd_data import AnsweredSamples, GeneratedSamples, answers_of
from bdistil.mekd_run import Emulation, Mekd, agreement_score
from bdistil.mekd_stage import run_stage
from bdistil.run_directory import RunDirectory
from bdistil.seeding import seed_of
from bdistil.weight_files import load_weights, save_weights
from bdistil.zoo import ConvStudent, StridedConvNet

pytestmark = pytest.mark.slow

SEEDS, KINDS = (0, 1, 2), ("soft", "hard")
QUERIES = (1_000, 10_000, 100_000)
FIRST = 300  # queries of stage 1
BATCH = 64
# About as many steps for all: 100 epochs of 10 steps, 5 of 150; one epoch of the largest is twice that.
EPOCHS = {1_000: 70, 10_000: 5, 100_000: 1}
ROUNDS = 4
FOLDER = Path(os.environ.get("BDISTIL_BENCH_DIR", "runs/bench-mekd"))
# A generator of a sixteenth of the paper's width, and a shorter stage 1: two cores are to do all of this.
SMALL = {"first_queries": FIRST, "width": 8, "critic_width": 8, "gan_epochs": 100, "gan_lr": 1e-3, "batch_size": BATCH}


def make_trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, **quiet, **options)


def network():
    """The network behind the API: trained once, on the 3,500 digits that nobody else sees."""
    net, path = StridedConvNet((16, 32, 64), dropout=0.3), FOLDER / "teacher.safetensors"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        L.seed_everything(0, verbose=False)
        trainer = make_trainer(max_epochs=12, enable_checkpointing=False)
        data = Digits()
        with indexed_loaders(data, 0):
            trainer.fit(TeacherTraining(TeacherSpec(net, epochs=12)), data)
        save_weights(net, path)
    load_weights(net, path, "teacher")
    return net.requires_grad_(False).eval()


def api(net, kind, folder):
    """The network as an API; in this process, as loopback would only cost time here."""

    def ask(batch):
        logits = net(torch.from_numpy(batch))
        return logits.softmax(-1) if kind == "soft" else logits.argmax(-1)

    answers = "probabilities" if kind == "soft" else "labels"
    return ApiTeacher(ask, 10, folder / "answers.sqlite", answers=answers, name="digits", batch_size=512)


def student_of(seed):
    torch.manual_seed(seed_of(seed, "student"))
    return ConvStudent((3, 6))


def accuracy_of(student):
    data = Digits()
    data.setup("test")
    x, y = data.parts["test"].tensors
    with torch.no_grad():
        return float((student.eval()(x).argmax(-1) == y).float().mean())


def once(name, make):
    """The result of a run, made once."""
    path = FOLDER / "results" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        result = make()
        write_atomically(path, json.dumps(result))
        print(name, result, flush=True)
    return json.loads(path.read_text())


def emulation(net, kind, seed, queries, source="mnist"):
    """One run of MEKD; budgets share stage 1, which is made with the smallest."""
    folder = FOLDER / f"{source}-{kind}-{seed}-{queries}"
    settings = Mekd(queries=queries, epochs=EPOCHS[queries], **SMALL)
    local = LocalDigits(source=source, split_seed=0)
    first = FOLDER / f"{source}-{kind}-{seed}-first"
    if not (first / "stage1" / "done.json").exists():
        Emulation(settings, api(net, kind, first), local, first, seed=seed, make_trainer=make_trainer).generator()
    if not (folder / "stage1").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(first / "answers.sqlite", folder)
        shutil.copytree(first / "stage1", folder / "stage1")
    return Emulation(settings, api(net, kind, folder), local, folder, seed=seed, make_trainer=make_trainer)


def mekd(net, kind, seed, queries, source="mnist"):
    run = emulation(net, kind, seed, queries, source)
    generator = run.generator()
    train, val = run.answered(generator)
    student = student_of(seed)
    figures = run.student(student, generator, train, val)
    confident = float(train[1].softmax(-1).amax(-1).mean())
    classes = train[1].argmax(-1).bincount(minlength=10).tolist()
    return {"accuracy": figures["test_accuracy"], "queries": figures["queries"], "sure": confident, "classes": classes}


def plain(net, kind, seed, name, x, held_out, epochs):
    """Plain distillation on images x, its best epoch chosen by the same held-out local images."""
    folder = FOLDER / f"plain-{name}-{kind}-{seed}-{len(x)}"
    teacher = api(net, kind, folder)
    train, val = (x, answers_of(teacher, x)), (held_out, answers_of(teacher, held_out))
    stage = MappingEmulation(student_of(seed), None, hard=kind == "hard", seed=seed)
    run_stage(stage, AnsweredSamples(train, val, BATCH), folder / "stage2", epochs=epochs, seed=seed,
              score=agreement_score, make_trainer=make_trainer)  # fmt: skip
    return {"accuracy": accuracy_of(stage.student), "queries": teacher.queries}


def local_images(source="mnist"):
    local = LocalDigits(source=source)
    local.setup("fit")
    return (local.parts[name].tensors[0] for name in ("train", "val"))


def noise(samples, count, seed):
    """Normal, with mean and sd of the local images, cut to their range."""
    made = torch.randn(count, *samples.shape[1:], generator=torch.Generator().manual_seed(seed_of(seed, "noise")))
    return (made * samples.std() + samples.mean()).clamp(samples.min(), samples.max())


def baselines(net, kind, seed, queries):
    """By name: on the 10 % images, on noise."""
    x, held_out = local_images()
    results = {"plain": once(f"plain-{kind}-{seed}", lambda: plain(net, kind, seed, "local", x, held_out, 140))}
    count = queries - len(held_out)
    name = f"noise-{kind}-{seed}-{queries}"
    results["noise"] = once(
        name, lambda: plain(net, kind, seed, "noise", noise(x, count, seed), held_out, EPOCHS[queries])
    )  # fmt: skip
    return results


def white_box(net, seed):
    """The teacher's logits on all the 3,500 images that it was trained on."""
    data = Digits()
    data.setup("fit")
    _, held_out = local_images()
    return once(
        f"white-{seed}", lambda: plain(net, "soft", seed, "white", data.parts["train"].tensors[0], held_out, 13)
    )


def boosted(net, seed):
    """Test accuracies of the prefixes of a run on generated images and the API's answers."""
    run = emulation(net, "soft", seed, 10_000)
    train, val = run.answered(run.generator())
    settings = BoostingSettings(rounds=ROUNDS, lr=0.03)
    controller = RoundController(
        run.folder / "boosted", teacher=run.teacher, student=lambda _: ConvStudent((3, 6)), settings=settings, seed=seed
    )
    data = GeneratedSamples(train, val, 128, run.local)
    for module in controller.rounds(data):
        trainer = make_trainer(max_epochs=8, callbacks=[controller])
        trainer.fit(module, data, ckpt_path=controller.ckpt_path)
    rows = RunDirectory(run.folder / "boosted").read_curve()[1:]
    return {"accuracy": [float(row["test_accuracy"]) for row in rows], "queries": run.teacher.queries}


def mean_sd(values):
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def over_seeds(make):
    return [make(seed)["accuracy"] for seed in SEEDS]


@pytest.fixture(scope="module")
def net():
    torch.set_num_threads(1)
    return network()


def table_rows(net, queries):
    for kind, budget in itertools.product(KINDS, queries):
        ours = over_seeds(lambda s: once(f"mekd-{kind}-{s}-{budget}", lambda: mekd(net, kind, s, budget)))  # noqa: B023
        others = [baselines(net, kind, seed, budget) for seed in SEEDS]
        yield kind, budget, ours, *([o[name]["accuracy"] for o in others] for name in ("plain", "noise"))


@pytest.mark.parametrize("queries", QUERIES[:2])
def test_students_against_the_number_of_queries(net, queries):
    upper = over_seeds(lambda seed: white_box(net, seed))
    print(f"\nteacher {100 * accuracy_of(net):.1f} %, white box {mean_sd(upper)}")
    for kind, budget, ours, local, random in table_rows(net, [queries]):
        print(f"| {kind} | {budget:,} | {mean_sd(ours)} | {mean_sd(local)} | {mean_sd(random)} |")
        assert statistics.mean(ours) > statistics.mean(random)
        assert statistics.mean(ours) <= statistics.mean(upper) + 0.01


def test_the_boosted_run_climbs(net):
    curves = over_seeds(lambda seed: once(f"boosted-{seed}", lambda: boosted(net, seed)))
    print("\nboosted", *(mean_sd(values) for values in zip(*curves, strict=True)))
    assert len(curves[0]) == ROUNDS
    assert statistics.mean(c[-1] for c in curves) > statistics.mean(c[0] for c in curves) + 0.01


def test_a_domain_gap(net):
    x, held_out = local_images("other")
    ours = over_seeds(lambda s: once(f"gap-mekd-{s}", lambda: mekd(net, "soft", s, 10_000, "other")))
    local = over_seeds(lambda s: once(f"gap-plain-{s}", lambda: plain(net, "soft", s, "other", x, held_out, 140)))
    print(f"\nother digits at hand: MEKD {mean_sd(ours)}, plain {mean_sd(local)}")
    assert statistics.mean(ours) > 0.3


def test_students_of_a_hundred_thousand_queries(net):
    for kind, budget, ours, local, random in table_rows(net, QUERIES[2:]):
        print(f"| {kind} | {budget:,} | {mean_sd(ours)} | {mean_sd(local)} | {mean_sd(random)} |")
        assert statistics.mean(ours) > statistics.mean(random)
