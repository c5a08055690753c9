"""A module as JSON and back: the same bits out, and nothing run that the file names."""

import contextlib
import functools
import importlib
import json
import math
import operator
import sys
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from bdistil.errors import UserError
from bdistil.models.student import Rung, Student, run_student
from bdistil.storage.blueprint import IndescribableError, describe, rebuild


def again(module):
    """The module, through text and back."""
    plan, tensors = describe(module)
    return rebuild(json.loads(json.dumps(plan)), {name: value.clone() for name, value in tensors.items()})


def conv_net():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4), nn.Hardswish(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    net(torch.randn(8, 3, 8, 8) + 1)  # statistics that are not those of the start
    return net


class Recurrent(nn.Module):
    """Logits from the last step."""

    def __init__(self, kind, **options):
        super().__init__()
        self.net = kind(5, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.head(self.net(x)[0][:, -1])


class Shared(nn.Module):
    """One layer in two places, one parameter in two layers, and one that a plain list holds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inside = nn.ModuleDict({"again": self.first})
        self.embed, self.out = nn.Linear(4, 6, bias=False), nn.Linear(4, 6)
        self.out.weight = self.embed.weight
        self.weights = [self.embed.weight]

    def forward(self, x):
        return self.out(self.inside["again"](self.first(x))) + F.linear(x, self.weights[0])


class Odd(nn.Module):
    """Every kind of attribute that JSON cannot say as it is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("passing", torch.randn(4), persistent=False)
        self.register_buffer("same", self.kept)
        self.register_buffer("none", None)
        self.register_parameter("bias", None)
        self.plain = torch.randn(4)
        self.pair = (2.0, torch.randn(4))
        self.sizes, self.names, self.frozen = torch.Size((1, 4)), {"b", "a"}, frozenset({3})
        self.options = {"eps": 0.5, "inner": {"shift": torch.ones(4)}}
        self.kind, self.where = torch.float64, torch.device("cpu")
        self.squash, self.leak = math.tanh, functools.partial(F.leaky_relu, negative_slope=0.3)
        self.limit, self.nothing, self.text, self.layer = math.inf, None, 'ö, "x"', nn.Linear
        self.frozen_weight = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x):
        shift = self.options["inner"]["shift"] * self.options["eps"] * self.pair[0]
        x = self.leak(x + self.kept + self.passing + self.same + self.plain + self.pair[1] + shift)
        return x.reshape(-1, *self.sizes[1:]).to(self.kind) * self.squash(0.5) * self.frozen_weight


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True)


NETS = {
    "conv": (conv_net, (2, 3, 8, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.1), (2, 6, 5)),
    "lstm with projection": (lambda: nn.Sequential(Recurrent(nn.LSTM)), (2, 6, 5)),
    "gru, two ways": (lambda: Recurrent(nn.GRU, bidirectional=True), (2, 6, 5)),
    "transformer": (encoder, (2, 7, 8)),
    "shared": (Shared, (2, 4)),
    "odd": (Odd, (2, 4)),
    "resnet": (lambda: timm.create_model("test_resnet", pretrained=False, num_classes=4), (2, 3, 32, 32)),
    "vit": (lambda: timm.create_model("test_vit", pretrained=False, num_classes=4, img_size=32), (2, 3, 32, 32)),
    "efficientnet": (lambda: timm.create_model("test_efficientnet", pretrained=False, num_classes=4), (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_same_bits_out(name):
    make, shape = NETS[name]
    module, x = make().eval(), torch.randn(shape)
    rebuilt = again(module)
    assert type(rebuilt) is type(module)
    assert not rebuilt.training
    assert torch.equal(rebuilt(x), module(x))
    ours, theirs = rebuilt.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", ["concat", "residual", "hidden"])
def test_a_student_with_links(kind):
    earlier = [Student(nn.Linear(4, width), nn.Linear(width, 3)).eval() for width in (5, 2)]
    student = Student(nn.Linear(4, 6), nn.Linear(6, 3)).link(earlier, Rung(2, kind)).eval()
    x = torch.randn(3, 4)
    rebuilt = again(student)
    assert rebuilt.links == 2
    assert torch.equal(run_student(rebuilt, [again(s) for s in earlier], x), run_student(student, earlier, x))


def test_what_is_shared_stays_shared():
    rebuilt = again(Shared().eval())
    assert rebuilt.inside["again"] is rebuilt.first
    assert rebuilt.out.weight is rebuilt.embed.weight
    assert rebuilt.weights[0] is rebuilt.embed.weight
    assert len(list(rebuilt.parameters())) == len(list(Shared().parameters())) == 4


def test_attributes_keep_their_kind():
    module = Odd().eval()
    rebuilt = again(module)
    assert {name for name, _ in rebuilt.named_buffers()} == {"kept", "passing"}  # `same` is `kept`
    assert set(rebuilt.state_dict()) == {"kept", "same", "frozen_weight"}
    assert rebuilt.same is rebuilt.kept
    assert rebuilt.none is rebuilt.bias is rebuilt.nothing is None
    plain = ("sizes", "names", "frozen", "kind", "where", "squash", "limit", "text", "layer")
    for name in plain:
        assert getattr(rebuilt, name) == getattr(module, name), name
        assert type(getattr(rebuilt, name)) is type(getattr(module, name)), name
    assert isinstance(rebuilt.pair, tuple)
    assert isinstance(rebuilt.leak, functools.partial)
    assert not isinstance(rebuilt.plain, nn.Parameter)
    assert not rebuilt.frozen_weight.requires_grad
    assert all(torch.equal(*pair) for pair in ((rebuilt.plain, module.plain), (rebuilt.passing, module.passing)))


def test_rebuilt_tensors_are_its_own():
    module = nn.Linear(2, 2).eval()
    before = module.weight.detach().clone()
    plan, tensors = describe(module)
    tensors["weight"].zero_()
    assert torch.equal(module.weight, before)
    assert set(tensors) == {"weight", "bias"}
    assert plan["class"] == "torch.nn.Linear"


def test_training_mode_is_kept():
    assert again(nn.Sequential(nn.Dropout())).training
    frozen_norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    assert [m.training for m in again(frozen_norm).modules()] == [True, True, False]


def test_a_recurrent_net_can_be_trained_further():
    rebuilt = again(Recurrent(nn.LSTM))
    rebuilt(torch.randn(2, 6, 5)).sum().backward()
    assert all(p.grad is not None for p in rebuilt.parameters())
    assert rebuilt.double()(torch.randn(2, 6, 5).double()).dtype == torch.float64


# ---- names that stay when files are moved

PACKAGE = {
    "__init__.py": "from shelf.inner import Listed, Unlisted, _Hidden\n__all__ = ['Listed']",
    "inner/__init__.py": "from shelf.inner.nets import Listed, Unlisted, _Hidden",
    "inner/nets.py": """
from torch import nn
class Listed(nn.Module): pass
class Unlisted(nn.Module): pass
class _Hidden(nn.Module): pass
class Deep(nn.Module):
    class Inner(nn.Module): pass
""",
    "_private/__init__.py": "from torch import nn\nclass Net(nn.Module): pass",
}


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package of the user's own, with classes that it exports from its top, from a folder, and not at all."""
    for name, text in PACKAGE.items():
        (tmp_path / "shelf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shelf" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "shelf"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("defined", "name", "named"),
    [
        ("bdistil.models.convnets", "ConvStudent", "bdistil.models.ConvStudent"),
        ("bdistil.models.student", "Student", "bdistil.Student"),
        ("bdistil.models.student", "Join", "bdistil.models.student.Join"),
        ("torch.nn.modules.linear", "Linear", "torch.nn.Linear"),
        ("timm.models.resnet", "ResNet", "timm.models.ResNet"),
        ("shelf.inner.nets", "Listed", "shelf.Listed"),
        ("shelf.inner.nets", "Unlisted", "shelf.inner.Unlisted"),
        ("shelf.inner.nets", "_Hidden", "shelf.inner.nets._Hidden"),
        ("shelf.inner.nets", "Deep.Inner", "shelf.inner.nets.Deep.Inner"),
        ("shelf._private", "Net", "shelf._private.Net"),
    ],
)
@pytest.mark.usefixtures("shelf")
def test_a_class_has_its_shortest_public_name(defined, name, named):
    kind = operator.attrgetter(name)(importlib.import_module(defined))
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    plan, tensors = describe(module)
    assert plan["class"] == named
    assert type(rebuild(plan, tensors)) is kind


# ---- what JSON cannot say


class Part(nn.Module):
    """A module of this file's own."""


class Holder(nn.Module):
    """Something in an attribute."""

    def __init__(self, thing):
        super().__init__()
        self.part = Part()
        self.part.thing = thing


class NamedShape(NamedTuple):
    """A tuple that would lose its names."""

    side: int


def half(x):
    """A function beside the class that names it."""
    return x / 2


class Settings:
    """Neither plain data nor a class or function itself."""


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (Settings(), "attribute part.thing is a Settings"),
        ({"a": [Settings()]}, r"attribute part.thing.a.0 is a Settings"),
        (lambda x: x, "cannot be imported by name"),
        (nn.Linear(2, 2).forward, "cannot be imported by name"),
        ([nn.Linear(2, 2)], "attribute part.thing.0 is a Linear"),
        ({1: 2}, "attribute part.thing is a dict"),
        (torch.Generator(), "attribute part.thing is a Generator"),
        (F.gelu, None),
        (half, None),
        (open, "builtins.open|io.open"),
        (NamedShape(1), "is a NamedShape"),
    ],
    ids=[
        "object",
        "object inside",
        "lambda",
        "bound method",
        "module in a list",
        "keys",
        "generator",
        "of torch.nn",
        "of the package",
        "builtin",
        "named tuple",
    ],
)
def test_attributes(thing, message):
    if message is None:
        assert again(Holder(thing)).part.thing is thing
        return
    with pytest.raises(IndescribableError, match=message):
        describe(Holder(thing))


def test_a_class_inside_a_function():
    class Local(nn.Module):
        pass

    with pytest.raises(IndescribableError, match=r"test_a_class_inside_a_function\.<locals>\.Local cannot be imported"):
        describe(nn.Sequential(Local()))


class Switched(nn.Module):
    """Chooses one of its methods when it is made."""

    act = staticmethod(F.relu)

    def __init__(self):
        super().__init__()
        self.act = F.gelu

    def forward(self, x):
        return self.act(x)


def test_a_replaced_method():
    # Refused here, so that the run says so in time: `rebuild` takes no such file.
    with pytest.raises(IndescribableError, match=r"0\.act|Switched\.act"):
        describe(nn.Sequential(Switched()))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks(kind):
    module = nn.Sequential(nn.Linear(2, 2))
    getattr(module[0], kind)(print)
    with pytest.raises(IndescribableError, match=r"^0 has _\w+_hooks"):
        describe(module)


# ---- a file that nobody should trust


def plan_of(module):
    return json.loads(json.dumps(describe(module)[0])), describe(module)[1]


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "builtins.object",
        "bdistil.models.student.Rung",
        "nowhere.Net",
        "bdistil.Net",
        "Net",
    ],
)
def test_a_class_that_is_no_module(path):
    plan, tensors = plan_of(nn.Sequential(nn.Linear(2, 2)))
    plan["modules"]["0"]["class"] = path
    message = rf"The student is a {path}, which cannot be imported as a torch module here\. .*student=make_student"
    with pytest.raises(UserError, match=message):
        rebuild(plan, tensors)


ran = []


def intruder(*args, **_):
    """What a hostile file names."""
    ran.append(args)
    return torch.zeros(2, 2)


NAMED = {"name": f"{__name__}.intruder"}
BOUND = {"partial": [NAMED, ["anything"], {"dict": {}}]}
HOOK = {"dict": {"0": NAMED}}
CALLED_BY_MACHINERY = ("train", "requires_grad_", "_init_flat_weights", "register_parameter", "add_module", "__class__")


@pytest.mark.parametrize("value", [NAMED, BOUND], ids=["name", "partial"])
@pytest.mark.parametrize("attribute", ["activation", *CALLED_BY_MACHINERY])
def test_rebuilding_runs_nothing_that_the_file_names(attribute, value):
    ran.clear()
    for module in (nn.Linear(2, 2).eval(), nn.LSTM(2, 2).eval(), nn.Sequential(nn.LSTM(2, 2)).eval()):
        plan, tensors = plan_of(module)
        for part in (plan, *plan["modules"].values()):
            part["attributes"][attribute] = value
        with contextlib.suppress(Exception):
            rebuild(plan, tensors).requires_grad_(False).train(False)  # as an ensemble does
    assert ran == []


@pytest.mark.parametrize(
    "thing",
    [
        {"name": "os.system"},
        {"name": "torch.os.system"},
        {"name": "torch.load"},
        {"partial": [{"name": "builtins.exec"}, ["ran.append(1)", {"dict": {}}], {"dict": {}}]},
    ],
    ids=["os", "os through torch", "torch.load", "partial"],
)
def test_a_function_that_is_not_made_for_networks_is_refused(thing):
    plan, tensors = plan_of(nn.TransformerEncoderLayer(4, 2, 4).eval())
    plan["attributes"] |= {"activation": thing, "activation_relu_or_gelu": 0}
    with pytest.raises(UserError, match="do not trust it"):
        rebuild(plan, tensors)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("forward", NAMED), ("forward", BOUND), ("_forward_pre_hooks", HOOK), ("_forward_hooks", HOOK)],
    ids=["forward", "bound forward", "pre-hook", "hook"],
)
def test_answering_runs_no_method_that_the_file_replaced(attribute, value):
    ran.clear()
    plan, tensors = plan_of(nn.Linear(2, 2).eval())
    plan["attributes"][attribute] = value
    with contextlib.suppress(Exception):
        rebuild(plan, tensors)(torch.zeros(2, 2))
    assert ran == []
    plan["attributes"][attribute] = 0  # whatever it is replaced by
    with pytest.raises(UserError, match=rf"replaces torch\.nn\.Linear\.{attribute}"):
        rebuild(plan, tensors)
