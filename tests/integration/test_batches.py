"""Batches of every form: mappings, items that a collate function puts together, x of several tensors, other lengths."""

import math
from collections import UserDict
from dataclasses import dataclass

import lightning as L
import pytest
import torch
from helpers.toys import CLASSES, FEATURES, boost, curve, samples, settings_for
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2

from bdistil import Budget, ProgressiveEnsemble, Student, UserError
from bdistil.callbacks import GradientNoise, LossMixing
from bdistil.distillation import MixingSettings
from bdistil.ensemble.timing import BATCHES
from bdistil.evaluation import ExitTarget, fit_anytime, profile_run
from bdistil.utils.trees import take_rows

WIDTH = 6
LAYER, HEAD = FEATURES * WIDTH, WIDTH * CLASSES  # multiply-adds of a student without links


class Data(L.LightningDataModule):
    """Three parts of items, put together by a collate function."""

    def __init__(self, item, collate=None, batch_size=32, train=None):
        super().__init__()
        self.item, self.collate, self.batch_size, self.train = item, collate, batch_size, train

    def loader(self, count, seed, **options):
        x, y = samples(count, seed)
        items = [self.item(x[i], y[i], i) for i in range(count)]
        return DataLoader(items, batch_size=self.batch_size, **{"collate_fn": self.collate, **options})

    def train_dataloader(self):
        return self.loader(128, 11, shuffle=True, **({"collate_fn": self.train} if self.train else {}))

    def val_dataloader(self):
        return self.loader(64, 12)

    def test_dataloader(self):
        return self.loader(64, 13)


class Read(nn.Module):
    """A layer on what a function reads of x."""

    def __init__(self, read, outputs, inputs=FEATURES):
        super().__init__()
        self.read, self.layer = read, nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.layer(self.read(x))


def run(folder, data, read, inputs=FEATURES, **settings):
    """A run of two rounds whose networks read x by a function."""
    return boost(
        folder,
        data,
        teacher=Read(read, CLASSES, inputs),
        student=lambda round: Student(Read(read, WIDTH, inputs), nn.Linear(WIDTH, CLASSES)),
        settings=settings_for(2, **settings),
        trainer={"epochs": 1},
    )


@dataclass
class Pair:
    a: torch.Tensor
    b: torch.Tensor


class Encoding(UserDict):
    """As `BatchEncoding` of transformers."""

    def to(self, device):
        return Encoding({key: value.to(device) for key, value in self.data.items()})


def collated(make):
    """A collate function of items (x, y, number)."""

    def collate(items):
        x, y, _ = zip(*items, strict=True)
        return make(torch.stack(x)), torch.stack(y)

    return collate


def whole(x, y, i):
    return x, y, i


def both(x):
    return x["a"] + x["b"]


FORMS = {
    "mapping": (lambda x, y, i: {"a": x / 2, "b": x / 2, "labels": y}, None, both),
    "numbers": (lambda x, y, i: {"a": x, "labels": int(y)}, None, lambda x: x["a"]),
    "names": (lambda x, y, i: ({"a": x, "name": f"file {i}"}, y), None, lambda x: x["a"]),
    "tuple": (lambda x, y, i: ((x / 2, x / 2), y), None, lambda x: x[0] + x[1]),
    "nested": (lambda x, y, i: ((x / 2, {"b": x / 2}), y), None, lambda x: x[0] + x[1]["b"]),
    "UserDict": (whole, collated(lambda x: Encoding(a=x)), lambda x: x["a"]),
    "dataclass": (whole, collated(lambda x: Pair(x / 2, x / 2)), lambda x: x.a + x.b),
    "image, label, file": (whole, collated(lambda x: x), lambda x: x),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def test_x_of_any_structure_is_trained_on_and_answered(tmp_path, form):
    item, collate, read = form
    data = Data(item, collate)
    controller = run(tmp_path, data, read)
    rows = curve(tmp_path)
    assert [int(row["macs"]) for row in rows] == [FEATURES * CLASSES, LAYER + HEAD, 2 * (LAYER + HEAD) + HEAD]
    batch = next(iter(data.test_dataloader()))
    x, y = (batch, batch.pop("labels")) if isinstance(batch, dict) else batch
    ensemble = controller.ensemble
    logits = ensemble(x)
    assert logits.shape == (len(y), CLASSES)
    for number, stage in enumerate(ensemble.stages(x), 1):
        assert torch.equal(ensemble(x, stages=number), stage.logits)
    confidence = torch.softmax(ensemble(x, stages=1), -1).amax(-1).sort().values[len(y) // 2]
    prediction = ensemble.predict(x, Budget(confidence=float(confidence)))
    stages = prediction.stages
    assert 0 < int((stages == 1).sum()) < len(y)  # some samples are taken out of x, some stay
    for number in (1, 2):
        expected = ensemble(x, stages=number)[stages == number]
        torch.testing.assert_close(prediction.logits[stages == number], expected)
    assert ensemble.predict(x, Budget(seconds=10.0)).stages.tolist() == [2] * len(y)


def test_exits_are_fitted_and_stages_profiled_where_x_has_several_tensors(tmp_path):
    item, _, read = FORMS["mapping"]
    data = Data(item)
    controller = run(tmp_path, data, read)
    ensemble = controller.ensemble
    calibration = fit_anytime(ensemble, data.val_dataloader(), ExitTarget(max_loss=1.0))
    assert [times.batch for times in calibration.times] == sorted(BATCHES)
    rows = profile_run(controller.run, batch_size=3)
    assert [row["macs"] for row in rows] == [FEATURES * CLASSES, LAYER + HEAD, LAYER + 2 * HEAD]
    loaded = ProgressiveEnsemble.load(tmp_path, student=controller.boosting.make)
    x = {"a": torch.zeros(3, FEATURES), "b": torch.zeros(3, FEATURES)}
    assert loaded(x).shape == (3, CLASSES)
    with pytest.raises(UserError, match=r"`x` to be a mapping with 'a', 'b', as in training, got 'a'"):
        loaded({"a": x["a"]})
    with pytest.raises(UserError, match=r"`x\['b'\]` of shape \(B, 8\), as in training, got \(3, 7\)"):
        loaded({**x, "b": torch.zeros(3, 7)})
    with pytest.raises(UserError, match=r"`x\['a'\]` without NaN"):
        loaded({**x, "a": torch.full((3, FEATURES), torch.nan)})
    with pytest.raises(UserError, match="mapping with 'a', 'b', as in training, got Tensor"):
        loaded(x["a"])


def test_the_key_of_the_labels_has_a_name(tmp_path):
    item = lambda x, y, i: {"a": x, "target": y}  # noqa: E731
    with pytest.raises(UserError, match=r"key 'labels' in batches .* got 'a', 'target'.*BoostingSettings"):
        run(tmp_path / "unnamed", Data(item), lambda x: x["a"])
    assert run(tmp_path / "named", Data(item), lambda x: x["a"], labels="target").run.committed() == 2


class Keywords(nn.Module):
    """A network as those of transformers: it names its inputs, and its answer has logits in it."""

    def __init__(self, answer):
        super().__init__()
        self.layer, self.answer = nn.Linear(FEATURES, CLASSES), answer

    def forward(self, ids, mask=None, **options):
        return self.answer(self.layer(ids * mask))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(
    "answer",
    [
        lambda logits: (logits, logits[:, :1]),
        lambda logits: [logits],
        lambda logits: {"loss": logits.sum(), "logits": logits},
        lambda logits: {"out": logits},
        lambda logits: Output(logits, logits),
    ],
    ids=["tuple", "list", "mapping", "only value", "attribute"],
)
def test_teachers_with_logits_in_a_larger_answer(tmp_path, answer):
    torch.manual_seed(0)
    teacher, data = Keywords(answer), Data(lambda x, y, i: {"ids": x, "mask": torch.ones(FEATURES), "labels": y})
    controller = boost(
        tmp_path,
        data,
        teacher=teacher,
        student=lambda round: Student(Read(lambda x: x["ids"] * x["mask"], WIDTH), nn.Linear(WIDTH, CLASSES)),
        settings=settings_for(1),
        trainer={"epochs": 1},
    )
    x, y = samples(64, 12)
    right = (teacher.layer(x).argmax(-1) == y).double().mean()
    assert float(curve(tmp_path)[0]["val_accuracy"]) == pytest.approx(float(right), abs=1e-5)
    assert controller.run.committed() == 1


def test_an_answer_without_logits_is_named(tmp_path):
    teacher = Keywords(lambda logits: {"a": logits, "b": logits})
    with pytest.raises(UserError, match=r"teacher Keywords, alone, as `logits` .*got dict with 'a', 'b'"):
        boost(
            tmp_path,
            Data(lambda x, y, i: {"ids": x, "mask": x, "labels": y}),
            teacher=teacher,
            student=lambda round: Read(lambda x: x["ids"], CLASSES),
        )


def test_a_student_that_names_its_keys_is_a_body(tmp_path):
    data = Data(lambda x, y, i: {"ids": x, "mask": x, "labels": y})
    with pytest.raises(UserError, match=r"got Keywords, whose `forward` takes its parts\. Make it the body"):
        boost(tmp_path, data, teacher=Keywords(lambda x: x), student=lambda round: Keywords(lambda x: x))


class Graph:
    """An object of tensors that no general code knows."""

    def __init__(self, x):
        self.nodes = x

    def to(self, device):
        return Graph(self.nodes.to(device))


def test_the_cost_of_one_sample_is_that_of_a_batch_of_one(tmp_path):
    data = Data(whole, collated(Graph))
    controller = run(tmp_path, data, lambda x: x.nodes)
    assert [int(row["macs"]) for row in curve(tmp_path)[:2]] == [FEATURES * CLASSES, LAYER + HEAD]
    x, _ = next(iter(data.test_dataloader()))
    assert controller.ensemble(x).shape == controller.ensemble.predict(x).logits.shape == (32, CLASSES)
    first = controller.ensemble(x, stages=1)
    confidence = float(torch.softmax(first, -1).amax(-1).median())
    for budget in (Budget(confidence=confidence), Budget(confidence=confidence, seconds=10.0)):
        prediction = controller.ensemble.predict(x, budget)  # decided samples stay in x, which changes no answer
        assert set(prediction.stages.tolist()) == {1, 2}
        torch.testing.assert_close(prediction.logits[prediction.stages == 1], first[prediction.stages == 1])
    for cut in (lambda: take_rows(x, slice(1)), lambda: fit_anytime(controller.ensemble, data.val_dataloader())):
        with pytest.raises(UserError, match=r"got Graph .*one sample cannot be cut out of it"):
            cut()


# ---- sequences of different lengths


def steps(x, y, i):
    """A sequence of 2 … 6 steps."""
    return x.repeat(2 + i % 5, 1), y


def padded(items):
    x, y = zip(*items, strict=True)
    return pad_sequence(x, batch_first=True), torch.stack(y)


def with_lengths(items):
    x, y = zip(*items, strict=True)
    return {"x": pad_sequence(x, batch_first=True), "lengths": torch.tensor([len(row) for row in x]), "labels": list(y)}


def packed(items):
    x, y = zip(*items, strict=True)
    return pack_sequence(x, enforce_sorted=False), torch.stack(y)


class Recurrent(nn.Module):
    """Reads the last step of a packed sequence, of a padded one with its lengths, or the first of a padded one."""

    def __init__(self, outputs):
        super().__init__()
        self.net, self.layer = nn.GRU(FEATURES, WIDTH, batch_first=True), nn.Linear(WIDTH, outputs)

    def forward(self, x):
        if isinstance(x, dict):
            states, _ = self.net(x["x"])
            return self.layer(states[torch.arange(len(states)), x["lengths"] - 1])
        states, last = self.net(x)
        return self.layer(last[-1] if isinstance(x, nn.utils.rnn.PackedSequence) else states[:, 0])


@pytest.mark.parametrize("collate", [padded, with_lengths, packed])
def test_sequences_of_different_lengths_are_trained_on_and_answered(tmp_path, collate):
    data = Data(steps, collate, batch_size=8)
    controller = boost(
        tmp_path,
        data,
        teacher=Recurrent(CLASSES),
        student=lambda round: Student(Recurrent(WIDTH), nn.Linear(WIDTH, CLASSES)),
        settings=settings_for(2),
        trainer={"epochs": 1},
    )
    assert float(curve(tmp_path)[-1]["test_accuracy"]) > 0
    ensemble = ProgressiveEnsemble.load(tmp_path, student=controller.boosting.make)
    for length in (1, 4, 9):
        items = [(row.repeat(length, 1), label) for row, label in zip(*samples(5, 14), strict=True)]
        batch = collate(items)
        x = {key: batch[key] for key in ("x", "lengths")} if isinstance(batch, dict) else batch[0]
        logits = ensemble(x)
        assert logits.shape == (5, CLASSES)
        confidence = torch.softmax(ensemble(x, stages=1), -1).amax(-1).sort().values[2]
        prediction = ensemble.predict(x, Budget(confidence=float(confidence)))
        assert set(prediction.stages.tolist()) == {1, 2}
        stayed = prediction.stages == 2
        torch.testing.assert_close(prediction.logits[stayed], logits[stayed])
    fit_anytime(ensemble, data.val_dataloader())
    assert ensemble.calibration.times


def test_rows_of_a_packed_sequence():
    rows = [torch.arange(float(n))[:, None] + 10 * n for n in (3, 1, 4, 2)]
    taken = take_rows(pack_sequence(rows, enforce_sorted=False), torch.tensor([2, 0]))
    values, lengths = pad_packed_sequence(taken, batch_first=True)
    assert lengths.tolist() == [4, 3]
    assert torch.equal(values[0], rows[2])
    assert torch.equal(values[1, :3], rows[0])


def test_lengths_that_only_another_part_has_are_free(tmp_path):
    def item(x, y, i):
        return x.repeat(3, 1), y

    class Longer(Data):
        def test_dataloader(self):
            self.item = lambda x, y, i: (x.repeat(5, 1), y)
            loader = super().test_dataloader()
            self.item = item
            return loader

    controller = boost(
        tmp_path, Longer(item), teacher=Recurrent(CLASSES), student=lambda round: Recurrent(CLASSES),
        settings=settings_for(1), trainer={"epochs": 1},
    )  # fmt: skip
    assert controller.run.record(0)["input_shape"] == [[3, 5], FEATURES]
    assert controller.run.read("test")


def test_one_shape_stays_one_shape(tmp_path):
    controller = run(tmp_path, Data(lambda x, y, i: (x, y)), lambda x: x)
    with pytest.raises(UserError, match=r"of shape \(B, 8\), as in training, got \(2, 9\)"):
        controller.ensemble(torch.zeros(2, 9))


# ---- beside the callbacks


@pytest.mark.parametrize("settings", [{"labels": None}, {"task": "multilabel"}, {}])
def test_gradient_noise_beside_other_batches(tmp_path, settings):
    def item(x, y, i):
        y = nn.functional.one_hot(y, CLASSES)
        return {"a": x} if settings.get("labels", "") is None else {"a": x, "labels": y}

    noise = []
    boost(
        tmp_path, Data(item), teacher=Read(lambda x: x["a"], CLASSES), settings=settings_for(1, **settings),
        student=lambda round: Student(Read(lambda x: x["a"], WIDTH), nn.Linear(WIDTH, CLASSES)), trainer={"epochs": 1},
        callbacks=lambda: [noise.append(GradientNoise(every=1, samples=32)) or noise[-1]],
    )  # fmt: skip
    labelled = not settings
    assert [math.isnan(row["label_loss"]) for row in noise[0].history] == [not labelled] * 2


def test_labels_are_mixed_in_where_batches_are_mappings(tmp_path):
    mixing = MixingSettings(warmup=0, every=1, mode="convex")
    data, read = Data(lambda x, y, i: {"a": x, "labels": int(y)}), lambda x: x["a"]
    controller = boost(
        tmp_path, data, teacher=Read(read, CLASSES), settings=settings_for(1), trainer={"epochs": 2},
        student=lambda round: Student(Read(read, WIDTH), nn.Linear(WIDTH, CLASSES)),
        callbacks=lambda: [LossMixing(mixing)],
    )  # fmt: skip
    assert (controller.run.root / "mixing" / "mixing.000.f32").stat().st_size > 0
    unlabelled = Data(lambda x, y, i: {"a": x, "labels": -1 if i == 5 else int(y)})
    with pytest.raises(UserError, match=r"LossMixing mixes labels in, but sample 5 of `train_dataloader\(\)` has none"):
        boost(
            tmp_path / "unlabelled", unlabelled, teacher=Read(read, CLASSES), trainer={"epochs": 1},
            student=lambda round: Student(Read(read, WIDTH), nn.Linear(WIDTH, CLASSES)),
            callbacks=lambda: [LossMixing(mixing)], settings=settings_for(1, ignore_index=-1),
        )  # fmt: skip


# ---- mixed samples


@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
def test_mixed_images_are_trained_on_with_a_recomputed_state(tmp_path, mix):
    mixed = mix(num_classes=CLASSES)

    def image(x, y, i):
        return x.repeat(8).view(1, 8, 8), y

    data = Data(image, train=lambda items: mixed(*default_collate(items)))
    controller = run(tmp_path, data, lambda x: x.flatten(1), 64, state="recompute")
    assert controller.run.committed() == 2


def test_tensors_alone_without_labels(tmp_path):
    class Alone(Data):
        def loader(self, count, seed, **options):
            return DataLoader(TensorDataset(samples(count, seed)[0]), 32)

    assert run(tmp_path, Alone(None), lambda x: x, labels=None).run.committed() == 2
    with pytest.raises(UserError, match=r"got 1 values.*labels=None"):
        run(tmp_path / "labelled", Alone(None), lambda x: x)
