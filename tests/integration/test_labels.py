"""Labels of every kind: of any type, soft, of several classes, missing; unusable ones are named before training."""

import numpy as np
import pytest
import torch
from helpers.toys import CLASSES, FEATURES, TRAIN, Hook, Toys, boost, curve, digests, make_teacher, settings_for
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multilabel_average_precision

from bdistil import AdaptedTeacher, ApiTeacher, Budget, ProgressiveEnsemble, UserError
from bdistil.evaluation import fit_anytime

ONE = {"settings": settings_for(1), "trainer": {"epochs": 1}}


class Labelled(Toys):
    """The toy data with other labels: a function of (y, name of the part)."""

    def __init__(self, change, parts=("train", "val", "test"), collate=None):
        super().__init__()
        self.change, self.changed, self.collate = change, parts, collate

    def loader(self, name, **options):
        x, y = self.parts[name]
        y = self.change(y) if name in self.changed else y
        rows = TensorDataset(x, y) if isinstance(y, torch.Tensor) else list(zip(x, y, strict=True))
        return DataLoader(rows, batch_size=32, collate_fn=self.collate, **options)

    def train_dataloader(self):
        return self.loader("train", shuffle=True)

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The curve of a run with int64 labels."""
    folder = tmp_path_factory.mktemp("usual")
    boost(folder, Labelled(lambda y: y), **ONE)
    return curve(folder, without={"latency_ms", "seconds"})


@pytest.mark.parametrize(
    "change",
    [
        *(lambda y, kind=kind: y.to(kind) for kind in (torch.int32, torch.int16, torch.uint8)),
        lambda y: y[:, None].int(),
        lambda y: y.tolist(),
        lambda y: [np.int32(value) for value in y],
        lambda y: list(y.numpy().astype(np.uint8)[:, None]),
        lambda y: nn.functional.one_hot(y, CLASSES).float(),
        lambda y: nn.functional.one_hot(y, CLASSES),
        lambda y: [[float(k == value) for k in range(CLASSES)] for value in y],
    ],
    ids=["int32", "int16", "uint8", "column", "list", "NumPy scalars", "arrays", "one-hot", "int64 one-hot", "lists"],
)
def test_labels_of_any_type_give_the_figures_of_the_usual_ones(tmp_path, usual, change):
    boost(tmp_path, Labelled(change), **ONE)
    assert curve(tmp_path, without={"latency_ms", "seconds"}) == usual


def test_bool_labels_are_the_classes_0_and_1(tmp_path):
    controller = boost(tmp_path, Labelled(lambda y: y > 1), **ONE)
    assert 0 <= float(curve(tmp_path)[-1]["test_accuracy"]) <= 1
    x, y = Toys().parts["test"]
    right = (controller.ensemble(x).argmax(-1) == (y > 1)).double().mean()
    assert float(curve(tmp_path)[-1]["test_accuracy"]) == pytest.approx(float(right), abs=1e-4)


def put(value, place):
    def change(y):
        y = y.clone()
        y[place] = value
        return y

    return change


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 1, r"0 … 3, as the teacher has 4 outputs, got 4 for sample \d+ of .*give y - 1"),
        (put(-1, 7), r"got -1 for sample 7 of .*ignore_index"),
        (put(255, 40), r"got 255 for sample 40 of .*ignore_index"),
        (lambda y: y.float(), r"got .* \(float32\) for sample 0 of .*y\.long\(\)"),
        (
            lambda y: torch.rand(len(y), CLASSES),
            r"soft labels: 4 numbers >= 0 .* sample 0 of .*multilabel",
        ),
        (lambda y: torch.zeros(len(y), 2, 2), r"soft labels.* for sample 0"),
        (lambda y: ["cat"] * len(y), "labels y that are numbers"),
    ],
    ids=["from 1", "-1", "255", "real", "no sum of 1", "a map", "words"],
)
def test_labels_that_are_no_classes_are_named_before_training(tmp_path, part, change, message):
    with pytest.raises(UserError, match=message) as caught:
        boost(tmp_path, Labelled(change, parts=[part]), **ONE)
    assert f"`{part}_dataloader()`" in str(caught.value) or "numbers, got" in str(caught.value)
    assert not digests(tmp_path)
    assert not (tmp_path / "teacher.json").exists()


def test_labels_behind_a_collate_function_are_looked_at_one_by_one(tmp_path):
    def collate(items):
        x, y = zip(*items, strict=True)
        return torch.stack(x), torch.stack(y) + 1

    with pytest.raises(UserError, match=r"got 4 for sample \d+ of `train_dataloader"):
        boost(tmp_path, Labelled(lambda y: y, collate=collate), **ONE)


def test_an_api_is_not_asked_before_its_labels_are_known_to_fit(tmp_path):
    asked = []

    def ask(batch):
        asked.append(len(batch))
        return batch[:, :CLASSES]

    api = ApiTeacher(ask, CLASSES, tmp_path / "answers.sqlite", name="toy")
    for part in ("train", "val", "test"):
        with pytest.raises(UserError, match=f"got 4 for sample .* of `{part}_dataloader"):
            boost(tmp_path / part, Labelled(lambda y: y + 1, parts=[part]), teacher=api, **ONE)
    assert not asked


@pytest.mark.parametrize("mark", [-1, 255, -100])
def test_samples_without_a_label_are_left_out_of_the_figures(tmp_path, mark):
    settings = settings_for(1, ignore_index=mark)
    without = torch.arange(TRAIN) % 3 == 0
    data = Labelled(lambda y: torch.where(without[: len(y)], mark, y))
    controller = boost(tmp_path, data, settings=settings, trainer={"epochs": 1})
    x, y = data.parts["val"]
    known = ~without[: len(y)]
    logits = controller.ensemble(x[known])
    row = curve(tmp_path)[-1]
    assert float(row["val_accuracy"]) == pytest.approx(float((logits.argmax(-1) == y[known]).double().mean()), abs=1e-5)
    assert float(row["val_loss"]) == pytest.approx(float(nn.functional.cross_entropy(logits, y[known])), rel=1e-4)


def test_a_part_in_which_no_sample_has_a_label_is_refused(tmp_path):
    data = Labelled(lambda y: torch.full_like(y, -100), parts=["val"])
    with pytest.raises(
        UserError, match=r"`val_dataloader\(\)`.* no sample has one\. Give BoostingSettings\(labels=None\)"
    ):
        boost(tmp_path, data, **ONE)
    boost(tmp_path, Labelled(lambda y: torch.full_like(y, -100), parts=["train"]), **ONE)  # it needs none


# ---- the test part


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x, y: [DataLoader(TensorDataset(x, y))] * 2,
            r"`test_dataloader\(\)` to return one torch DataLoader, .* got list",
        ),
        (lambda x, y: DataLoader(TensorDataset(x)), r"`test_dataloader\(\)` to be \(x, y\), got 1 values"),
        (lambda x, y: DataLoader(TensorDataset(x, y + 1000)), r"got 100\d for sample 0 of `test_dataloader"),
    ],
    ids=["two loaders", "no labels", "numbers of files"],
)
def test_the_test_part_is_looked_at_before_training(tmp_path, make, message):
    data = Toys()
    data.test_dataloader = lambda: make(*data.parts["test"])
    with pytest.raises(UserError, match=message):
        boost(tmp_path, data, **ONE)
    assert not digests(tmp_path)


@pytest.mark.parametrize("part", ["val", "test"])
def test_x_of_another_form_in_another_part_is_named_before_training(tmp_path, part):
    data = Toys()
    x, y = data.parts[part]
    data.parts[part] = (torch.cat((x, x[:, :1]), 1), y)
    with pytest.raises(UserError, match=rf"x of `{part}_dataloader\(\)` .*\(9,\).* student fails"):
        boost(tmp_path, data, **ONE)
    assert not digests(tmp_path)


class Vanishing(torch.utils.data.Dataset):
    """Test samples that cannot be read once training has begun."""

    def __init__(self, x, y):
        self.x, self.y, self.gone = x, y, False

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.gone:
            raise OSError("the disk is gone")
        return self.x[index], self.y[index]


def test_a_test_part_that_fails_at_the_end_costs_its_figures_only(tmp_path):
    data = Toys()
    test = Vanishing(*data.parts["test"])
    data.test_dataloader = lambda: DataLoader(test, batch_size=32)
    begin = Hook(on_train_start=lambda *_: setattr(test, "gone", True))
    with pytest.warns(UserWarning, match="test part could not be evaluated .*the disk is gone"):
        controller = boost(tmp_path, data, callbacks=lambda: [begin], **ONE)
    assert len(controller.ensemble) == 1
    assert curve(tmp_path)[-1]["test_accuracy"] == ""
    test.gone = False
    boost(tmp_path, data, **ONE)  # the next start measures it
    assert float(curve(tmp_path)[-1]["test_accuracy"]) > 0


# ---- no labels, and several


class Unlabelled(Toys):
    def train_dataloader(self):
        return DataLoader(TensorDataset(self.parts["train"][0]), batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.parts["val"][0]), batch_size=32)

    def test_dataloader(self):
        return DataLoader(self.parts["test"][0], batch_size=32)  # x alone, without a tuple


def test_without_labels_figures_are_the_agreement_with_the_teacher(tmp_path):
    data, teacher = Unlabelled(), make_teacher()
    controller = boost(tmp_path, data, teacher=teacher, settings=settings_for(2, labels=None), trainer={"epochs": 1})
    with torch.no_grad():
        for part in ("val", "test"):
            x = data.parts[part][0]
            agreement = (controller.ensemble(x).argmax(-1) == teacher.eval()(x).argmax(-1)).double().mean()
            assert float(curve(tmp_path)[-1][f"{part}_accuracy"]) == pytest.approx(float(agreement), abs=1e-5)
            assert float(curve(tmp_path)[0][f"{part}_accuracy"]) == 1
    with pytest.raises(UserError, match="to fit thresholds"):
        fit_anytime(controller.ensemble, data.val_dataloader(), labels=None)


def several(x):
    """Four labels that hold together, the last one rare."""
    return (x[:, :CLASSES] + torch.tensor([0.5, 0.0, -0.3, -1.5]) > 0).long()


class Several(Toys):
    def __init__(self, kind=torch.int64):
        super().__init__()
        self.parts = {name: (x, several(x).to(kind)) for name, (x, _) in self.parts.items()}


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory):
    folder, teacher = tmp_path_factory.mktemp("several"), nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():
        teacher.weight.copy_(3 * torch.eye(CLASSES, FEATURES))
        teacher.bias.copy_(torch.tensor([5.0, 0.0, -1.0, -9.0]))
    settings = settings_for(3, task="multilabel", lr=0.05)
    return boost(folder, Several(), teacher=teacher, settings=settings, trainer={"epochs": 15}), teacher


def test_several_labels_are_scored_by_mean_average_precision(multilabel):
    controller, teacher = multilabel
    run = controller.run
    assert run.task == ProgressiveEnsemble.load(run.root).task == "multilabel"
    for part in ("val", "test"):
        x, y = Several().parts[part]
        for row, logits in zip(curve(run.root)[1:], controller.ensemble.stages(x), strict=True):
            expected = multilabel_average_precision(logits.logits.sigmoid(), y, CLASSES)
            assert float(row[f"{part}_accuracy"]) == pytest.approx(float(expected), abs=1e-5)
            if part == "val":
                entropy = nn.functional.binary_cross_entropy_with_logits(logits.logits, y.float())
                assert float(row["val_loss"]) == pytest.approx(float(entropy), rel=1e-3)
    x, y = Several().parts["val"]
    with torch.no_grad():
        expected = multilabel_average_precision(teacher(x).sigmoid(), y, CLASSES)
    assert float(curve(run.root)[0]["val_accuracy"]) == pytest.approx(float(expected), abs=1e-5)


def test_logits_of_several_labels_are_not_centred(multilabel):
    controller, teacher = multilabel
    x = Several().parts["val"][0]
    with torch.no_grad():
        answers = teacher(x)
    off = (controller.ensemble(x) - answers).square().mean().sqrt()
    assert off < 0.35 * (answers - answers.mean(0)).square().mean().sqrt()  # a mean per sample would be lost otherwise


def test_several_labels_may_be_unknown_in_any_type(tmp_path):
    """Labels of a binary cross entropy are real numbers."""
    for kind in (torch.int64, torch.float32):
        data = Several()
        for part in ("train", "val"):
            x, y = data.parts[part]
            data.parts[part] = (x, torch.where(torch.arange(len(y))[:, None] % 5 == 0, -1, y).to(kind))
        boost(tmp_path / str(kind), data, settings=settings_for(1, task="multilabel", ignore_index=-1))
    one, other = (
        curve(tmp_path / str(kind), without={"latency_ms", "seconds"}) for kind in (torch.int64, torch.float32)
    )
    assert one == other


def sigmoid_api(x):
    return 1 / (1 + np.exp(-x[:, :CLASSES]))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_probabilities_are_no_logits_of_several_labels(task, tmp_path):
    """Their logarithms would be taken for logits: a label of probability 0.9 would have a logit below 0."""
    adapted = AdaptedTeacher(nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.Sigmoid()), probabilities=True)
    with pytest.raises(UserError, match=rf"for task='{task}', got AdaptedTeacher\(..., probabilities=True\)"):
        boost(tmp_path / "adapted", Several(), teacher=adapted, settings=settings_for(1, task=task))
    for answers in ("probabilities", "labels"):
        api = ApiTeacher(sigmoid_api, CLASSES, tmp_path / f"{answers}.sqlite", answers=answers)
        with pytest.raises(UserError, match=f"for task='{task}', got answers='{answers}'"):
            boost(tmp_path / answers, Several(), teacher=api, settings=settings_for(1, task=task))
        assert api.queries == 0


def test_several_labels_have_no_class_probabilities(multilabel):
    controller, _ = multilabel
    x = Several().parts["val"][0]
    assert controller.ensemble.predict(x, Budget(stages=2)).stages.tolist() == [2] * len(x)
    with pytest.raises(UserError, match="without `confidence` for several labels"):
        controller.ensemble.predict(x, Budget(confidence=0.9))
    with pytest.raises(UserError, match="of a multilabel task"):
        fit_anytime(controller.ensemble, Several().val_dataloader())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:, :3], "4 numbers that are 0 or 1"),
        (lambda y: 2 * y, "0 or 1"),
        (lambda y: y[:, 0], "0 or 1.*classification"),
    ],
)
def test_labels_that_are_not_several_are_named(tmp_path, change, message):
    data = Several()
    data.parts["val"] = (data.parts["val"][0], change(data.parts["val"][1]))
    with pytest.raises(UserError, match=message):
        boost(tmp_path, data, settings=settings_for(1, task="multilabel"))


def test_several_labels_of_which_none_holds_are_refused(tmp_path):
    data = Several()
    data.parts["val"] = (data.parts["val"][0], torch.zeros_like(data.parts["val"][1]))
    with pytest.raises(UserError, match=r"Expected a label that holds in `val_dataloader\(\)`"):
        boost(tmp_path, data, settings=settings_for(1, task="multilabel"))


def test_unknown_entries_of_several_labels_are_left_out(tmp_path):
    data = Several()
    for name, (x, y) in data.parts.items():
        data.parts[name] = (x, torch.where(torch.arange(len(y))[:, None] % 5 == torch.arange(CLASSES), -1, y))
    settings = settings_for(1, task="multilabel", ignore_index=-1)
    controller = boost(tmp_path, data, teacher=nn.Linear(FEATURES, CLASSES), settings=settings, trainer={"epochs": 1})
    x, y = data.parts["val"]
    expected = multilabel_average_precision(controller.ensemble(x).sigmoid(), y, CLASSES, ignore_index=-1)
    assert float(curve(tmp_path)[-1]["val_accuracy"]) == pytest.approx(float(expected), abs=1e-5)
