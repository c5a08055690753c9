"""Students that cannot be trained, saved or evaluated are refused before training; lazy layers get their sizes."""

import lightning as L
import pytest
import torch
from helpers.toys import (
    CLASSES,
    FEATURES,
    ROUNDS,
    WIDTH,
    Hook,
    Killed,
    Toys,
    boost,
    control,
    digests,
    make_plain,
    make_student,
    make_teacher,
    make_trainer,
    settings_for,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import ProgressiveEnsemble, Student, UserError
from bdistil.callbacks import RoundController


class Extra(nn.Linear):
    """Has a state that is no tensor."""

    def get_extra_state(self):
        return {"note": "v1"}

    def set_extra_state(self, state):
        pass


def quantized(round):
    return torch.ao.quantization.quantize_dynamic(make_plain(round), {nn.Linear}, dtype=torch.qint8)


def frozen(round):
    return make_plain(round).requires_grad_(False)


# ---- `student` itself


@pytest.mark.parametrize(
    ("student", "got"),
    [
        (make_plain(0), "got a Sequential. Each round trains a new student"),
        ("mlp", "got a str"),
        (lambda: make_plain(0), "got one that cannot be called with a number"),
        (lambda round, depth: make_plain(0), r"missing a required argument: 'depth'"),
    ],
    ids=["module", "text", "no argument", "two arguments"],
)
def test_student_is_a_function_of_the_round(tmp_path, student, got):
    with pytest.raises(
        UserError, match=r"Expected `student` to be a function of the round, make_student\(round\).*" + got
    ):
        RoundController(tmp_path / "run", teacher=make_plain(0), student=student)
    assert not (tmp_path / "run").exists()


# ---- what it makes


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization", "ignore:.*quantized tensor creation", "ignore:`torch.jit.script`"
)
@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda r: torch.compile(make_plain(r), backend="eager"),
         r"compiled in place, got the result of torch\.compile\(network\) as the student\. Write network\.compile"),
        (lambda r: Student(torch.compile(nn.Linear(FEATURES, 3), backend="eager"), nn.Linear(3, CLASSES)),
         r"torch\.compile\(network\) as `body`"),
        (lambda r: Extra(FEATURES, CLASSES), r"to be tensors of numbers, got a dict as `_extra_state`"),
        (quantized, r"tensors of numbers, got a .* as `.*packed_params.*quantize students when they are exported"),
        (frozen, r"with parameters to train, got a Sequential without one that requires a gradient"),
        (lambda r: make_plain(r).half(), r"weights in float32, got float16 \(`0\.weight`\).*precision='bf16-mixed'"),
        (lambda r: torch.jit.script(make_plain(r)), r"written in Python, got a RecursiveScriptModule of TorchScript"),
        (lambda r: make_plain(r).double(), r"same type as the student's weights \(float64\), got float32"),
        (lambda r: Student(nn.Sequential(nn.LazyLinear(5), nn.ReLU()), head=nn.LazyLinear(CLASSES)),
         r"head whose size is known, got LazyLinear without `features`"),
        (lambda r: Unused(), r"lazy layers are all used, but `spare\.weight` has no size"),
    ],
    ids=["compiled", "compiled body", "extra", "quantized", "frozen", "half", "scripted", "double", "lazy", "unused"],
)  # fmt: skip
def test_students_that_are_refused(tmp_path, student, message):
    with pytest.raises(UserError, match=message):
        control(tmp_path, student=student).boosting.check(Toys())
    assert not (tmp_path / "config.yaml").exists()


class Unused(nn.Linear):
    def __init__(self):
        super().__init__(FEATURES, CLASSES)
        self.spare = nn.LazyLinear(3)


class Casts(nn.Module):
    """Weights in half precision, and an x that it converts itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES).bfloat16()

    def forward(self, x):
        return self.net(x.bfloat16()).float()


def test_weights_in_half_precision(tmp_path):
    with pytest.raises(UserError, match=r"weights in float32, got bfloat16 \(`net\.weight`\).*precision='bf16-mixed'"):
        control(tmp_path, student=lambda round: Casts()).boosting.check(Toys())


def test_a_student_of_a_later_round_is_checked_before_it_is_trained(tmp_path):
    with pytest.raises(UserError, match="got a dict as `_extra_state`"):
        boost(tmp_path, student=lambda round: Extra(FEATURES, CLASSES) if round else make_plain(round))
    assert not list(digests(tmp_path))


# ---- what works


@pytest.mark.parametrize(
    "student",
    [
        lambda r: nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(CLASSES)),
        lambda r: Student(nn.Sequential(nn.LazyLinear(5), nn.ReLU()), head=nn.Linear(5, CLASSES)),
        lambda r: Student(nn.Sequential(nn.LazyLinear(5), nn.ReLU()), head=nn.LazyLinear(CLASSES), features=5),
    ],
    ids=["plain", "body", "head"],
)
def test_lazy_layers_get_their_sizes(tmp_path, student):
    boost(tmp_path / "whole", student=student)
    assert len(digests(tmp_path / "whole")) == ROUNDS

    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (1, 1):
            raise Killed

    with pytest.raises(Killed):
        boost(tmp_path / "run", student=student, callbacks=lambda: [Hook(on_train_epoch_start=stop)])
    controller = boost(tmp_path / "run", student=student)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    x = torch.randn(4, FEATURES)
    assert torch.equal(ProgressiveEnsemble.load(tmp_path / "run")(x), controller.ensemble(x))


class Doubles(Toys):
    """x in float64."""

    def _loader(self, part, **options):
        x, y = self.parts[part]
        return DataLoader(TensorDataset(x.double(), y), batch_size=32, **options)

    def train_dataloader(self):
        return self._loader("train", shuffle=True)

    def val_dataloader(self):
        return self._loader("val")

    def test_dataloader(self):
        return self._loader("test")


def test_students_in_float64_on_x_in_float64(tmp_path):
    teacher = nn.Linear(FEATURES, CLASSES).double()
    boost(tmp_path, Doubles(), teacher=teacher, student=lambda round: make_plain(round).double())
    ensemble = ProgressiveEnsemble.load(tmp_path)
    assert len(ensemble) == ROUNDS
    assert {p.dtype for p in ensemble.parameters()} == {torch.float64}
    assert ensemble(torch.randn(2, FEATURES, dtype=torch.float64)).isfinite().all()


def test_students_that_are_compiled_in_place(tmp_path):
    def student(round):
        made = Student(nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU()), nn.Linear(WIDTH, CLASSES))
        made.body.compile(backend="eager")
        return made

    boost(tmp_path, student=student)
    ensemble = ProgressiveEnsemble.load(tmp_path)
    assert [s.links for s in ensemble.students] == [0, 1, 1]
    assert not any("_orig_mod" in name for name in ensemble.state_dict())


def test_a_module_that_is_used_twice(tmp_path):
    def student(round):
        twice = nn.Linear(FEATURES, FEATURES)
        return nn.Sequential(twice, nn.ReLU(), twice, nn.Linear(FEATURES, CLASSES))

    controller = boost(tmp_path, student=student)
    x = torch.randn(4, FEATURES)
    assert len(controller.ensemble) == ROUNDS
    assert torch.equal(ProgressiveEnsemble.load(tmp_path)(x), controller.ensemble(x))


# ---- a round under way that belongs to another student


@pytest.mark.parametrize(
    "other",
    [lambda r: nn.Sequential(nn.Linear(FEATURES, 9), nn.Linear(9, CLASSES)), lambda r: nn.Linear(FEATURES, CLASSES)],
)
def test_a_round_under_way_of_another_student(tmp_path, other):
    def stop(trainer, module):
        if trainer.current_epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        boost(tmp_path, student=make_plain, callbacks=lambda: [Hook(on_train_epoch_start=stop)])
    with pytest.raises(
        UserError, match=r"student of round 1, which is under way in .*, differs from what `student` makes now"
    ):
        boost(tmp_path, student=other)
    assert len(boost(tmp_path, student=make_plain).ensemble) == ROUNDS


def test_a_round_under_way_of_a_student_with_the_same_shapes(tmp_path):
    def other(round):
        made = make_plain(round)
        made[2] = nn.Tanh()
        return made

    def stop(trainer, module):
        if (module.number, trainer.current_epoch) == (where, 1):
            raise Killed

    for where in (0, 1):  # nothing is committed; a round is  # noqa: B007
        with pytest.raises(Killed):
            boost(tmp_path, student=make_plain, callbacks=lambda: [Hook(on_train_epoch_start=stop)])
        with pytest.raises(
            UserError, match=r"student of round 1.* `student` makes now: 2 is ReLU\(\) there, Tanh\(\) now"
        ):
            boost(tmp_path, student=other)
    assert len(boost(tmp_path, student=make_plain).ensemble) == ROUNDS


def test_a_round_under_way_of_another_length(tmp_path):
    """The cosine of its checkpoint would end before the fit does, and rise again."""

    def stop(trainer, module):
        if trainer.current_epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        boost(tmp_path, callbacks=lambda: [Hook(on_train_epoch_start=stop)])
    with pytest.raises(UserError, match=r"started with a cosine over 2 epochs or steps, now the Trainer ends after 5"):
        boost(tmp_path, trainer={"epochs": 5})
    assert len(boost(tmp_path).ensemble) == ROUNDS


def test_the_module_of_a_round_is_not_compiled_as_a_whole(tmp_path):
    controller, data = control(tmp_path), Toys()
    rounds = controller.rounds(data)
    module = next(rounds)
    with pytest.raises(UserError, match=r"got torch\.compile\(module\)\. Compile .*: module\.student\.compile\(\)"):
        make_trainer(controller).fit(torch.compile(module, backend="eager"), data)
    module.student.compile(backend="eager")
    make_trainer(controller).fit(module, data)
    rounds.close()
    assert list(digests(tmp_path)) == ["000"]


class Listed(nn.Module):
    """Its first layer is no submodule, so that no state dict has it."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = [nn.Linear(FEATURES, WIDTH)] if kind == "list" else []
        self.matrix = torch.randn(FEATURES, WIDTH)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))  # cannot be described

    def forward(self, x):
        return self.norm(self.blocks[0](x) if self.blocks else x @ self.matrix)


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_state_outside_of_the_state_dict_is_refused(tmp_path, kind):
    """The loaded ensemble would not be the one that was trained."""
    with pytest.raises(UserError, match=r"depend on its weights and buffers alone.*register_buffer"):
        boost(tmp_path, student=lambda round: Student(Listed(kind), nn.Linear(WIDTH, CLASSES)))


def test_a_student_that_grows_is_refused(tmp_path):
    sizes = iter(range(8, 99))

    def make(round):
        return nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, next(sizes))), nn.LazyLinear(CLASSES)
        )

    with pytest.raises(UserError, match=r"(?s)`student` to make the same student again .*size mismatch"):
        boost(tmp_path, student=make)


def test_a_student_that_is_a_lightning_module_is_loaded_from_its_files(tmp_path):
    boost(tmp_path, student=Attached)
    ensemble, x = ProgressiveEnsemble.load(tmp_path), torch.randn(5, FEATURES)
    again = ProgressiveEnsemble.load(tmp_path, student=Attached)
    assert torch.equal(ensemble(x), again(x))


class Attached(L.LightningModule):
    def __init__(self, round):
        super().__init__()
        self.net = make_plain(round)

    def forward(self, x):
        return self.net(x)


def test_x_of_another_size_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"reads x as it is, x of shape .*7.* `features` or `in_channels`"):
        boost(tmp_path, student=lambda round: nn.Linear(FEATURES - 1, CLASSES))


# ---- layers shared with others


def lazy_plain(round):
    return nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize("make", [make_plain, make_student, lazy_plain], ids=["plain", "linked", "lazy"])
def test_a_frozen_backbone_of_all_rounds_keeps_its_statistics_for_each(tmp_path, make):
    """A callback that sets train mode after an evaluation moves the batch statistics of this round's student only."""
    backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES)).requires_grad_(False)

    def student(round):
        if make is not make_student:
            return nn.Sequential(backbone, make(round))
        own = make(round)
        return Student(nn.Sequential(backbone, own.body), own.head)

    def to_train_mode(trainer, module):
        module.train()

    controller = boost(
        tmp_path, student=student, callbacks=lambda: [Hook(on_train_epoch_start=to_train_mode)], settings=settings_for()
    )
    by_factory, by_files = controller.ensemble, ProgressiveEnsemble.load(tmp_path)
    x, y = Toys().parts["val"]
    for ensemble in (by_factory, by_files):
        accuracies = [float((stage.logits.argmax(-1) == y).float().mean()) for stage in ensemble.stages(x)]
        assert accuracies == pytest.approx([row["val_accuracy"] for row in controller.run.rows()[1:]], abs=1e-6)
    for one, other in zip(by_factory.stages(x), by_files.stages(x), strict=True):
        torch.testing.assert_close(one.logits, other.logits)


class Adapted(nn.Module):
    """A hook adds to a layer; a copy of it would go on with the layers of the original."""

    def __init__(self):
        super().__init__()
        self.net, self.adapter = make_plain(0), nn.Linear(WIDTH, WIDTH)
        self.net[0].register_forward_hook(lambda module, args, answer: answer + self.adapter(answer.tanh()))

    def forward(self, x):
        return self.net(x)


def pretrained(round):
    """It is trained for a step when it is made."""
    net = make_plain(round)
    x, y = Toys().parts["train"]
    nn.functional.cross_entropy(net(x), y).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    return net


@pytest.mark.parametrize("student", [lambda round: Adapted(), pretrained], ids=["hook", "pretrained"])
def test_students_that_a_copy_would_change_are_restored_as_they_are(tmp_path, student):
    controller = boost(tmp_path, student=student)
    x, y = Toys().parts["val"]
    accuracies = [float((stage.logits.argmax(-1) == y).float().mean()) for stage in controller.ensemble.stages(x)]
    assert accuracies == pytest.approx([row["val_accuracy"] for row in controller.run.rows()[1:]], abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_layers_of_the_teacher_are_not_a_students_unless_frozen_before(tmp_path):
    def run(folder, teacher):
        def student(round):
            return Student(nn.Sequential(teacher[0], nn.ReLU(), nn.Linear(24, WIDTH)), nn.Linear(WIDTH, CLASSES))

        return boost(folder, student=student, teacher=teacher, settings=settings_for(1))

    teacher = make_teacher()
    for _ in range(2):  # in a notebook, the second time with the same teacher
        with pytest.raises(UserError, match=r"own, got `body.0.weight` that the teacher holds.*deepcopy"):
            run(tmp_path / "a", teacher)
    assert len(run(tmp_path / "b", make_teacher().requires_grad_(False)).ensemble) == 1


def test_a_body_that_returns_a_tuple_is_named(tmp_path):
    def student(round):
        return Student(nn.LSTM(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES))

    with pytest.raises(UserError, match=rf"to return features \(B, {WIDTH}\), got a tuple"):
        boost(tmp_path, student=student)
