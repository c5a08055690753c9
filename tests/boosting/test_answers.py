"""Refused before training: networks that answer to more than x, students that do not fit a later round."""

import pytest
import torch
from helpers.toys import CLASSES, FEATURES, Hook, Toys, boost, control, digests, make_plain, make_teacher, settings_for
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bdistil import BoostingSettings, ProgressiveEnsemble, Rung, Student, UserError

WIDTH = 6
SIZES = {"features": WIDTH, "outputs": CLASSES}


def linear(width=WIDTH, outputs=CLASSES, **sizes):
    return Student(nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU()), nn.Linear(width, outputs), **sizes)


class InPlace(nn.Module):
    def forward(self, x):
        x -= 0.5
        return x


class Random(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Scaled(Student):
    def forward(self, x, linked=()):
        return super().forward(2 * x, linked)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class OfTwo(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


def refused(folder, message, **options):
    with pytest.raises(UserError, match=message):
        control(folder, **options).boosting.check(Toys())
    assert not (folder / "config.yaml").exists()


@pytest.mark.parametrize(
    ("layer", "message"), [(InPlace, "changes x in place"), (Random, "the same answer to the same x")]
)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_network_whose_second_answer_is_another(tmp_path, layer, message, whose):
    made = {"student": lambda round: nn.Sequential(layer(), make_plain(0))}
    if whose == "teacher":
        made = {"teacher": nn.Sequential(layer(), make_teacher().eval())}
        control(tmp_path / "cached", **made).boosting.check(Toys())  # each sample is answered once
        made["settings"] = settings_for(state="recompute")
    refused(tmp_path, f"Expected the {whose} .*{message}", **made)


class Pops(nn.Module):
    """Changes the mapping that it is given."""

    def __init__(self):
        super().__init__()
        self.net = make_plain(0)

    def forward(self, batch):
        return self.net(batch.pop("x"))


@pytest.mark.parametrize(
    ("layer", "how"),
    [
        (Centred, "answers it differently"),
        (lambda: nn.BatchNorm1d(FEATURES, track_running_stats=False), "fails on it .Expected more than 1 value"),
        (OfTwo, "fails on it"),
    ],
)
def test_a_student_that_reads_the_whole_batch(tmp_path, layer, how):
    refused(tmp_path, f"answers a sample by itself.* got one that {how}", student=lambda round: Student(
        nn.Sequential(layer(), nn.Linear(FEATURES, WIDTH)), nn.Linear(WIDTH, CLASSES)))  # fmt: skip


def mappings(key):
    """A data module whose x are mappings of one key."""
    x, y = torch.randn(8, FEATURES), torch.zeros(8, dtype=torch.long)
    loader = DataLoader([({key: row}, label) for row, label in zip(x, y, strict=True)], 4)
    data = LightningDataModule()
    data.train_dataloader = data.val_dataloader = lambda: loader
    return data


def test_a_student_that_changes_the_mapping_that_it_is_given(tmp_path):
    teacher = Student(Reads(), nn.Linear(FEATURES, CLASSES))
    with pytest.raises(UserError, match="Expected the student to leave x as it is"):
        control(tmp_path, student=lambda round: Pops(), teacher=teacher).boosting.check(mappings("x"))


def test_keys_of_x_that_are_no_strings(tmp_path):
    class First(nn.Linear):
        def forward(self, x):
            return super().forward(x[0] if isinstance(x, dict) else x)

    networks = {"student": lambda round: First(FEATURES, CLASSES), "teacher": First(FEATURES, CLASSES)}
    with pytest.raises(UserError, match="Expected the keys of `x`, a mapping, to be strings, got 0"):
        control(tmp_path, **networks).boosting.check(mappings(0))


class Reads(nn.Module):
    def forward(self, x):
        return x["x"] if isinstance(x, dict) else x


def test_a_student_whose_head_returns_several_outputs(tmp_path):
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    make = lambda round: Student(nn.Linear(FEATURES, WIDTH), Two(WIDTH, CLASSES))  # noqa: E731
    refused(tmp_path, r"Expected logits of shape \(2, L\) from the student .* got tuple", student=make)


def test_a_forward_that_does_more_than_its_parts(tmp_path):
    body = lambda: nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU())  # noqa: E731
    refused(tmp_path, "Expected `forward` of Scaled", student=lambda round: Scaled(body(), nn.Linear(WIDTH, CLASSES)))


@pytest.mark.parametrize("layer", [nn.Softmax(-1), nn.LogSoftmax(-1)])
def test_a_student_that_ends_with_a_softmax_is_a_warning(tmp_path, layer):
    make = lambda round: Student(linear().body, nn.Sequential(nn.Linear(WIDTH, CLASSES), layer), **SIZES)  # noqa: E731
    with pytest.warns(UserWarning, match=r"student's outputs look like those of a (log_)?softmax.*Leave that layer"):
        control(tmp_path, student=make).boosting.check(Toys())


def test_layers_that_the_students_of_all_rounds_share_are_frozen(tmp_path):
    """Trainable ones were trained in the first round, in eval mode, and frozen in all others."""
    stem = nn.Linear(FEATURES, WIDTH)
    make = lambda round: Student(nn.Sequential(stem, nn.ReLU()), nn.Linear(WIDTH, CLASSES))  # noqa: E731
    refused(
        tmp_path, r"round 2, of class F1.*got `body\.0\.weight` that an earlier student holds.*deepcopy", student=make
    )
    stem.requires_grad_(False)
    control(tmp_path, student=make).boosting.check(Toys())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda round: linear((6, 7)[round]), "student of round 3, of class F1 after one of class F1, .* IndexError"),
        (
            lambda round: linear(outputs=CLASSES if round < 2 else 3),
            r"round 3.* Expected logits \(B, 4\) .*got \(2, 3\)",
        ),
        (
            lambda round: linear(outputs=CLASSES if round < 2 else 1),
            r"round 3.* Expected logits \(B, 4\) .*got \(2, 1\)",
        ),
        (lambda round, width=1: linear() if width == 1 else linear(3, 5), r"of class F1 x2 after .* got \(2, 5\)"),
    ],
)
def test_students_of_later_rounds_and_classes_are_built_before_training(tmp_path, make, message):
    wider = [Rung(1, width=2)] if "x2" in message else []
    refused(tmp_path, message, student=make, settings=settings_for(3, ladder=[Rung(0), Rung(1), *wider]))


def test_a_student_that_says_another_number_of_outputs(tmp_path):
    def make(round):
        body, head = nn.Linear(FEATURES, WIDTH), nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, CLASSES))
        return Student(body, head, features=WIDTH, outputs=7)

    refused(tmp_path, "Expected `outputs` of the student to be 4, .* got 7", student=make)


def test_linked_students_in_float64(tmp_path):
    data = Toys()
    data.parts = {name: (x.double(), y) for name, (x, y) in data.parts.items()}
    options = {"student": lambda round: linear().double(), "teacher": make_teacher().double()}
    with pytest.raises(UserError, match=r"float64.*ladder=\[Rung\(0\)\]"):
        control(tmp_path, **options).boosting.check(data)
    control(tmp_path, settings=settings_for(ladder=[Rung(0)]), **options).boosting.check(data)


def test_a_student_in_which_no_multiply_add_is_counted(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(CLASSES))

        def forward(self, x):
            return x[:, :CLASSES] * self.scale

    with pytest.raises(UserError, match=r"Expected a student with multiply-adds.* got Scale"):
        boost(tmp_path, student=lambda round: Scale())
    assert not list(digests(tmp_path))


class Fourier(nn.Module):
    """Random features, drawn once: no parameters, and not in the state dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 0.4 * torch.randn(FEATURES, 16), persistent=False)

    def forward(self, x):
        return torch.cos(x @ self.frequencies)


def test_what_a_student_drew_at_random_is_what_it_answers_with(tmp_path):
    controller = boost(tmp_path, student=lambda round: Student(Fourier(), nn.Linear(16, CLASSES)))
    x, loaded = torch.randn(20, FEATURES), ProgressiveEnsemble.load(tmp_path)
    assert torch.equal(controller.ensemble(x), loaded(x))
    assert all(
        torch.equal(one.body.frequencies, other.body.frequencies)
        for one, other in zip(controller.boosting.students, loaded.students, strict=False)
    )


class Tracked(nn.Module):
    """Follows the mean of x in training, by a number and by a buffer, both outside the state dict."""

    def __init__(self):
        super().__init__()
        self.mean = 0.0
        self.register_buffer("means", torch.zeros(FEATURES), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + float(x.mean())
            self.means = 0.9 * self.means + x.mean(0)
        return x - self.mean - self.means


@pytest.mark.parametrize("local", [False, True])
def test_what_a_student_learned_outside_its_state_dict_is_kept(tmp_path, local):
    """The number of a class that cannot be imported is not."""

    class Local(Tracked):
        def forward(self, x):
            self.mean = 0.0
            return super().forward(x)

    live, kind = [], Local if local else Tracked
    controller = boost(
        tmp_path,
        student=lambda round: Student(nn.Sequential(kind(), nn.Linear(FEATURES, WIDTH)), nn.Linear(WIDTH, CLASSES)),
        settings=settings_for(1),
        callbacks=lambda: [Hook(on_train_end=lambda trainer, module: live.append(module.student))],
    )
    x, (student,) = torch.randn(20, FEATURES), live
    ensemble = controller.ensemble
    torch.testing.assert_close(ensemble(x), ensemble.scale * student.eval()(x))


def test_a_regression_has_no_number_for_missing_labels():
    with pytest.raises(UserError, match="Expected no `ignore_index` for task 'regression'"):
        BoostingSettings(task="regression", ignore_index=-1)


def test_nan_in_x_is_named_before_the_first_step(tmp_path):
    data = Toys()
    data.parts["val"][0][37, 3] = torch.nan
    teacher = nn.Sequential(Zeros(), make_teacher())
    with pytest.raises(UserError, match=r"x of `val_dataloader\(\)` without NaN or infinity, got some in sample 37"):
        boost(tmp_path, data, teacher=teacher)
    assert not list(digests(tmp_path))


class Zeros(nn.Module):
    def forward(self, x):
        return x.nan_to_num()


def test_a_student_that_files_cannot_describe_is_announced(tmp_path, caplog):
    class Local(nn.Linear):
        pass

    with caplog.at_level("INFO"):
        boost(tmp_path, student=lambda round: Local(FEATURES, CLASSES), settings=settings_for(1))
    assert [r.message for r in caplog.records if "cannot be built from the files of the run" in r.message]
