"""Networks of timm by name: the same answers as timm's own, in committed students too."""

import json

import lightning as L
import pytest
import timm
import torch
from helpers.toys import boost, settings_for
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import ProgressiveEnsemble, Rung, UserError
from bdistil.models.stages import StagedBody
from bdistil.models.student import build_student, run_student
from bdistil.models.timm import TimmStudent, TimmTeacher
from bdistil.storage.blueprint import describe, rebuild
from bdistil.storage.weights import load_weights

SIDE, CLASSES = 32, 4
SMALL_VIT = {"img_size": SIDE, "patch_size": 16}
NAMES = timm.list_models("test_*")


class Images(L.LightningDataModule):
    """96 random images whose class is the quadrant that is brightest."""

    def __init__(self):
        super().__init__()
        x = torch.randn(96, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
        bright = x.mean(1).reshape(96, 2, 16, 2, 16).mean((2, 4)).flatten(1)
        self.data = TensorDataset(x, bright.argmax(1))

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=32)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_answers_as_timm_does(name):
    student = TimmStudent(name, CLASSES).eval()
    network = timm.create_model(name, num_classes=CLASSES).eval()
    place = next(place for place, module in network.named_modules() if module is network.get_classifier())
    body, head = student.body.state_dict(), student.head.state_dict()
    names = [name for name in network.state_dict() if name.rpartition(".")[0] != place]
    weights = dict(zip(names, body.values(), strict=True))  # stages have other names, in the same order
    network.load_state_dict(weights | {f"{place}.{key}": value for key, value in head.items()})
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(student(x), network(x))
        assert student.features(x).shape == (2, student.width)


def test_a_classifier_that_is_a_convolution_becomes_linear():
    torch.manual_seed(3)
    network = timm.create_model("resnetv2_18", num_classes=CLASSES).eval()
    torch.manual_seed(3)
    student = TimmStudent("resnetv2_18", CLASSES).eval()
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(network.get_classifier(), nn.Conv2d)
    torch.testing.assert_close(student(x), network(x))


def test_there_are_conv_nets_and_transformers_among_them():
    assert len(NAMES) > 12
    assert {"test_vit", "test_resnet", "test_convnext", "test_efficientnet"} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "options", "norm"),
    [
        ("test_vit", SMALL_VIT, nn.LayerNorm),
        ("test_efficientnet", {}, nn.BatchNorm2d),
        ("test_convnext", {}, nn.LayerNorm),
    ],
)
def test_a_committed_student_of_timm_is_loaded_without_recipe_and_answers_the_same(tmp_path, name, options, norm):
    def make_student(round):
        return TimmStudent(name, CLASSES, options=options)

    settings = settings_for(2, ladder=[Rung(0), Rung(1)], lr=1e-3)
    teacher = TimmTeacher("test_resnet", CLASSES)
    controller = boost(
        tmp_path, Images(), teacher=teacher, student=make_student, settings=settings, trainer={"epochs": 1}
    )
    loaded = ProgressiveEnsemble.load(tmp_path)
    assert any(isinstance(module, norm) for module in loaded.modules())
    assert loaded.students[1].links == 1
    x = torch.randn(3, 3, SIDE, SIDE)
    for here, there in zip(controller.ensemble.stages(x), loaded.stages(x), strict=True):
        torch.testing.assert_close(here.logits, there.logits, rtol=1e-5, atol=1e-6)  # memory of another alignment
        assert there.macs > 0
    moved = [m for m in loaded.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean.abs().sum() > 0]
    assert bool(moved) == (norm is nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["test_vit3", "test_mambaout", "test_byobnet", "tiny_vit_5m_224"])
def test_blueprints_describe_other_families(name):
    student = TimmStudent(name, CLASSES).eval()
    plan, tensors = describe(student)
    x = torch.randn(1, 3, 224 if "224" in name else 160, 224 if "224" in name else 160)
    with torch.no_grad():
        assert torch.equal(rebuild(json.loads(json.dumps(plan)), tensors)(x), student(x))


# ---- wider ones


@pytest.mark.parametrize(
    ("name", "options"), [("test_vit", SMALL_VIT), ("test_resnet", {}), ("test_convnext", {}), ("resnet10t", {})]
)
def test_a_wider_rung_gives_a_wider_student(name, options):
    plain = TimmStudent(name, CLASSES, options=options)
    wide = TimmStudent(name, CLASSES, options=options, width=1.5)
    assert wide.width == plain.width * 1.5
    assert wide(torch.randn(2, 3, SIDE, SIDE)).shape == (2, CLASSES)


def test_a_family_that_cannot_be_widened_says_so():
    with pytest.raises(UserError, match=r"width x2, got 'test_efficientnet', a EfficientNet.*Leave such rungs out"):
        TimmStudent("test_efficientnet", CLASSES, width=2.0)


# ---- names, options, files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, r"got 'resnet81'\. Did you mean .*'resnet18'"),
        ({"name": "test_resnet", "options": {"colour": 1}}, r"'test_resnet' with the options .*colour"),
        ({"name": "test_resnet", "checkpoint": "no.safetensors"}, r"`checkpoint` to be a file, got 'no\.safetensors'"),
        ({"name": "test_resnet", "checkpoint": "x.pt", "pretrained": True}, r"`checkpoint` or `pretrained`, got both"),
        ({"name": "deit_tiny_distilled_patch16_224"}, r"'deit_tiny_distilled_patch16_224': its classifier is a tuple"),
        ({"name": "volo_d1_224"}, r"'volo_d1_224': the two together answer otherwise"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        TimmStudent(outputs=CLASSES, **arguments)


def test_without_a_hub_a_local_checkpoint_is_asked_for(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"weights of 'test_resnet' cannot be had here.*Give `checkpoint`, a file"):
        TimmTeacher("test_resnet", pretrained=True)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_local_checkpoint_is_read(tmp_path, suffix):
    network = timm.create_model("test_efficientnet", num_classes=7).eval()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    x = torch.randn(1, 3, 64, 64)
    teacher, later = TimmTeacher("test_efficientnet", 7, checkpoint=str(path)), TimmTeacher("test_efficientnet", 7)
    load_weights(later, path, "model.teacher.network")
    student = TimmStudent("test_efficientnet", CLASSES, checkpoint=str(path)).eval()  # of other classes
    whole = TimmStudent("test_efficientnet", 7, checkpoint=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(teacher.eval()(x), network(x))
        assert torch.equal(later.eval()(x), network(x))
        torch.testing.assert_close(whole(x), network(x))
        assert torch.equal(student.features(x), network.forward_head(network.forward_features(x), pre_logits=True))
    with pytest.raises(UserError, match=r"not those that `checkpoint` needs: [\s\S]*of another shape"):
        TimmTeacher("test_efficientnet", CLASSES, checkpoint=str(path))


class Harmful:
    """Would be executed by a full unpickling."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [Harmful(), [1, 2]])
def test_a_checkpoint_that_holds_no_weights_is_refused_and_not_executed(tmp_path, content, capsys):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="`checkpoint` to hold"):
        TimmTeacher("test_efficientnet", checkpoint=str(tmp_path / "bad.pt"))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "counts"), [("test_resnet", 6), ("test_convnext", 5), ("test_efficientnet", 6), ("test_vit", 0)]
)
@pytest.mark.parametrize("rung", [Rung(1, "deep"), Rung(1, "start", at=2)])
def test_stages_are_those_of_feature_info(name, counts, rung):
    """The network answers as in one piece, and a second student reads the first one's activations."""
    x, students = torch.randn(2, 3, 32, 32), []
    for number in range(2):
        torch.manual_seed(number)
        students.append(build_student(lambda number: TimmStudent(name, outputs=5), number, students, rung, x).eval())
    first, second = students
    network = timm.create_model(name, num_classes=0)
    assert (len(first.body.stages) if isinstance(first.body, StagedBody) else 0) == counts
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval()
    network.reset_classifier(0)
    assert torch.equal(first.features(x), network(x))
    assert (second.stage_reads != ()) == bool(counts)
    assert run_student(second, [first], x).shape == (2, 5)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_dropout_that_timm_calls_as_a_function_is_kept(name):
    student = TimmStudent(name, outputs=5, options={"drop_rate": 0.5})
    network = timm.create_model(name, num_classes=0, drop_rate=0.5)
    network.load_state_dict(dict(zip(network.state_dict(), student.body.state_dict().values(), strict=True)))
    x = torch.randn(4, 3, 32, 32)
    answers = []
    for net in (student.body, network):
        torch.manual_seed(0)
        answers.append(net(x))
    assert isinstance(student.body, StagedBody)
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], student.body(x))  # other features are dropped
