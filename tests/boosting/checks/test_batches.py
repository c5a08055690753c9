"""Batches in which a sample is not what it is alone, hooks that change them, and a fit on other data."""

import re
import warnings

import lightning as L
import pytest
import torch
from helpers.toys import (
    BATCH,
    CLASSES,
    FEATURES,
    TRAIN,
    VAL,
    Toys,
    boost,
    control,
    fit,
    make_student,
    make_teacher,
    make_trainer,
    settings_for,
)
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data import TensorDataset as Tensors

from bdistil import Student, UserError
from bdistil.boosting.checks.batches import close
from bdistil.storage.run_directory import RunDirectory

SHORT = {"settings": settings_for(2), "trainer": {"epochs": 1}}


class Loaders(Toys):
    """The toys' parts in loaders with other options."""

    def __init__(self, val=False, **options):
        super().__init__()
        self.options = {"val" if val else "train": options}

    def loader(self, part):
        options = self.options.get(part, {})
        size = {} if "batch_sampler" in options else {"batch_size": BATCH}
        return DataLoader(self.dataset(part), **{**size, **options})

    def dataset(self, part):
        return Tensors(*self.parts[part])

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


# ---- padding


class Sequences(Loaders):
    """x (steps, 2) of 2 to 6 steps, padded to the longest of a batch."""

    def __init__(self, collate, lengths=lambda number: 2 + number % 5):
        super().__init__()
        self.collate, self.lengths = collate, lengths

    def dataset(self, part):
        x, y = self.parts[part]
        return [(x[n].view(4, 2).repeat(2, 1)[: self.lengths(n)], int(y[n])) for n in range(len(x))]

    def loader(self, part):
        return DataLoader(self.dataset(part), BATCH, shuffle=part == "train", collate_fn=self.collate)


def padded(items):
    return pad_sequence([x for x, _ in items], True), torch.tensor([y for _, y in items])


def masked(items):
    """With numbers other than 0 as padding, and a mask."""
    x, y = padded(items)
    lengths = torch.tensor([len(row) for row, _ in items])
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    return {"x": x.masked_fill(~mask[..., None], 7.0), "mask": mask}, y


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(2, 6, batch_first=True)

    def forward(self, x):
        return self.cell(x)[1][-1]


class MaskedMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 6)

    def forward(self, x):
        mask = x["mask"][..., None]
        return (self.inner(x["x"]).tanh() * mask).sum(1) / mask.sum(1)


class MaskedSum(MaskedMean):
    def forward(self, x):
        return (self.inner(x["x"]).tanh() * x["mask"][..., None]).sum(1)


class Blind(MaskedMean):
    """Has the mask, and does not look at it."""

    def forward(self, x):
        return self.inner(x["x"]).tanh().mean(1)


def nets(body, student=None):
    return {
        "teacher": nn.Sequential(body(), nn.Linear(6, CLASSES)),
        "student": lambda round: Student((student or body)(), nn.Linear(6, CLASSES)),
    }


@pytest.mark.parametrize(
    ("collate", "bodies", "who"),
    [(padded, (LastState,), "teacher"), (masked, (Blind,), "teacher"), (masked, (MaskedMean, Blind), "student")],
)
def test_padding_that_a_network_sees_is_refused(tmp_path, collate, bodies, who):
    message = rf"x of a sample of `train_dataloader\(\)` depends on the batch.*the {who} answers differently.*recompute"
    with pytest.raises(UserError, match=message):
        boost(tmp_path / "cached", Sequences(collate), **nets(*bodies), **SHORT)
    assert not RunDirectory(tmp_path / "cached").committed()
    settings = settings_for(2, state="recompute")
    assert len(boost(tmp_path, Sequences(collate), **nets(*bodies), settings=settings).ensemble) == 2


@pytest.mark.parametrize("body", [MaskedMean, MaskedSum])
def test_padding_that_a_mask_hides_works(tmp_path, body):
    ensemble = boost(tmp_path, Sequences(masked), **nets(body), **SHORT).ensemble
    x, _ = masked(Sequences(masked).dataset("val")[:5])
    one = {name: tensor[:1, :2] for name, tensor in x.items()}  # the first one has two steps
    torch.testing.assert_close(ensemble(x)[:1], ensemble(one))


def test_padding_that_is_found_in_a_fit_is_a_warning(tmp_path):
    """Only a few samples, none of which is looked at before, are longer than the others."""
    data = Sequences(masked, lambda number: 6 if 0 < number < 9 else 3)
    with pytest.warns(UserWarning, match=r"has tensors of \[.*\] alone, and of \[.*\] in a batch.*see the padding"):
        assert len(boost(tmp_path, data, **nets(MaskedMean), **SHORT).ensemble) == 2


def standardised(items):
    """By the statistics of the batch."""
    x, y = torch.utils.data.default_collate(items)
    return x / x.abs().mean(), y


def mixed(items):
    """MixUp: x of two samples, in random shares."""
    x, y = torch.utils.data.default_collate(items)
    return x.lerp(x.roll(1, 0), torch.rand(())), y


@pytest.mark.parametrize("val", [False, True])
@pytest.mark.parametrize(
    ("collate", "message"),
    [(standardised, "statistics of the batch.*the teacher"), (mixed, r"MixUp.*state='recompute'")],
)
def test_a_collate_function_that_mixes_samples_is_refused(tmp_path, collate, message, val):
    with pytest.raises(UserError, match=message):
        boost(tmp_path, Loaders(val, collate_fn=collate), **SHORT)


# ---- hooks and loaders that change batches


HOOKS = ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]


def brighter(self, batch):
    return batch[0] + 1, *batch[1:]


def brighter_in_place(self, batch):
    batch[0].add_(1)
    return batch


def brighter_in_training(self, batch):
    return brighter(self, batch) if self.trainer.training else batch


def brighter_at_random(self, batch):
    return brighter(self, batch) if torch.rand(()) < 0.7 else batch


def other_labels(self, batch):
    return batch[0], 1 - batch[1], batch[2]


CHANGES = [brighter, brighter_in_place, brighter_in_training, brighter_at_random, other_labels]


@pytest.mark.parametrize(("hook", "change"), [*[(hook, brighter) for hook in HOOKS], *[(HOOKS[2], c) for c in CHANGES]])
def test_hooks_of_a_data_module_that_change_batches_are_refused(tmp_path, hook, change):
    class Hooked(Toys):
        pass

    setattr(Hooked, hook, lambda self, batch, *args: change(self, batch))
    with pytest.raises(UserError, match=rf"`Hooked\.{hook}` changes batches.*dataset or the collate function"):
        boost(tmp_path, Hooked())


def test_a_hook_that_takes_batches_for_pairs_is_refused_before_training(tmp_path):
    class Hooked(Toys):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return x, y

    with pytest.raises(UserError, match=r"on_after_batch_transfer` fails on a batch \(x, y, index\).*too many values"):
        boost(tmp_path, Hooked())


@pytest.mark.parametrize("with_controller", [True, False])
def test_validation_on_other_loaders_is_refused(tmp_path, with_controller):
    controller, data = control(tmp_path), Toys()
    rounds = controller.rounds(data)
    module = next(rounds)
    trainer = make_trainer(controller)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    trainer = trainer if with_controller else make_trainer(enable_checkpointing=False)
    with pytest.raises(UserError, match=r"batch \(x, y, index\) of the data module that `controller.rounds"):
        trainer.validate(module, Toys(), verbose=False)


def test_a_callback_that_takes_batches_for_pairs_is_told(tmp_path):
    class Unpack(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            _x, _y = batch

    with (
        pytest.warns(UserWarning, match=r"Batches of a round are \(x, y, index\).*`x, y = batch\[:2\]`"),
        pytest.raises(ValueError, match="too many values to unpack"),
    ):
        boost(tmp_path, callbacks=lambda: [Unpack()])


def test_hooks_of_a_data_module_that_change_nothing_are_called(tmp_path):
    called = []

    class Hooked(Toys):
        pass

    def counted(hook):
        def call(self, *args):
            called.append(hook)
            return getattr(Toys, hook)(self, *args)

        return call

    for hook in HOOKS:
        setattr(Hooked, hook, counted(hook))
    ensemble = boost(tmp_path / "hooked", Hooked(), **SHORT).ensemble
    assert min(called.count(hook) for hook in HOOKS) > 20
    expected = boost(tmp_path / "plain", **SHORT).ensemble
    for found, wanted in zip(ensemble.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


class Brighter(DataLoader):
    def __iter__(self):
        return ((x + 1, y) for x, y in super().__iter__())


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_loader_with_an_iterator_of_its_own_is_refused(tmp_path, part):
    data = Toys()
    loader = Brighter(Tensors(*data.parts[part]), BATCH)
    setattr(data, f"{part}_dataloader", lambda: loader)
    with pytest.raises(
        UserError, match=rf"`{part}_dataloader\(\)` to iterate as a torch DataLoader does, got Brighter"
    ):
        boost(tmp_path, data)


# ---- samplers, batch samplers, batch sizes


class Sizes(nn.Module):
    """Keeps the size of the largest batch."""

    def __init__(self, net, kept):
        super().__init__()
        self.net, self.kept = net, kept

    def forward(self, x):
        self.kept.append(len(x))
        return self.net(x)


def test_no_network_is_given_more_samples_at_once_than_the_loaders_give(tmp_path):
    taught, studied = [], []

    class Small(Loaders):
        def loader(self, part):
            return DataLoader(self.dataset(part), 6 if part == "train" else 7, shuffle=part == "train")

    def student(round):
        made = make_student(round)
        made.body = Sizes(made.body, studied)
        return made

    boost(tmp_path, Small(), teacher=Sizes(make_teacher(), taught), student=student, **SHORT)
    assert max(taught) == max(studied) == 7


class Own(BatchSampler):
    pass


@pytest.mark.parametrize("make", [BatchSampler, Own])
def test_any_batch_sampler_works(tmp_path, make):
    sizes = []

    class See(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, number):
            sizes.append(len(batch[2]))

    data = Loaders(batch_sampler=make(RandomSampler(range(TRAIN)), 12, False))
    boost(tmp_path, data, settings=settings_for(1), callbacks=lambda: [See()], trainer={"epochs": 1})
    assert sizes == [12] * (TRAIN // 12)


def test_torchs_batch_sampler_is_that_of_an_ordinary_loader(tmp_path):
    plain = boost(tmp_path / "plain", Loaders(batch_size=12, shuffle=True), **SHORT).ensemble
    given = Loaders(batch_sampler=BatchSampler(RandomSampler(range(TRAIN)), 12, False))
    ensemble = boost(tmp_path / "given", given, **SHORT).ensemble
    x = torch.randn(5, FEATURES)
    assert torch.equal(plain(x), ensemble(x))


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({"sampler": SubsetRandomSampler(range(9, 159))}, 150),
        ({"sampler": SubsetRandomSampler(torch.tensor([*range(50), 1, 1]))}, 50),
        ({"sampler": [*range(100), *range(100)]}, 100),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(range(64)), 4, False)}, 64),
        ({"sampler": SubsetRandomSampler(range(TRAIN))}, None),
        ({"sampler": WeightedRandomSampler(torch.ones(TRAIN), 64)}, None),
        ({"sampler": RandomSampler(range(TRAIN), num_samples=64)}, None),
    ],
    ids=["subset", "tensor", "list", "batches", "all", "weighted", "some of all"],
)
def test_training_samples_that_are_not_drawn_are_a_warning(tmp_path, options, drawn):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(boost(tmp_path, Loaders(**options), settings=settings_for(1)).ensemble) == 1
    found = [str(one.message) for one in caught if "The sampler of `train_dataloader()`" in str(one.message)]
    assert len(found) == (drawn is not None)
    if found:
        assert re.search(rf"gives {drawn} of the 192 samples .* asked about all 192.*Subset\(dataset", found[0])


CHOSEN = range(3, VAL, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler(CHOSEN)},
        {"sampler": [*CHOSEN, *CHOSEN]},
        {"batch_sampler": BatchSampler(SubsetRandomSampler(CHOSEN), 4, False)},
        {"batch_sampler": [[*CHOSEN]]},
        {"sampler": SequentialSampler(range(VAL))},
    ],
    ids=["subset", "twice", "batches", "one batch", "all"],
)
def test_a_sampler_chooses_the_validation_samples(tmp_path, options):
    data, count = (
        Loaders(True, **options),
        VAL if isinstance(options.get("sampler"), SequentialSampler) else len(CHOSEN),
    )
    rows, chosen = [*range(VAL)] if count == VAL else [*CHOSEN], []

    class See(L.Callback):
        def on_validation_batch_start(self, trainer, module, batch, number, dataloader_idx=0):
            chosen.append(batch[0])

    controller = boost(tmp_path, data, settings=settings_for(1), callbacks=lambda: [See()])
    epochs = torch.cat(chosen)[-2 * count :]
    assert torch.equal(epochs[:count], data.parts["val"][0][rows])
    x, y = (tensor[rows] for tensor in data.parts["val"])
    teacher, student = controller.run.rows()
    assert teacher["val_accuracy"] == pytest.approx(float((make_teacher().eval()(x).argmax(1) == y).float().mean()))
    right = (controller.ensemble(x).argmax(1) == y).float().mean()
    assert student["val_accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (RandomSampler(range(VAL), num_samples=9), "the same samples at each reading, got a RandomSampler"),
        (RandomSampler(range(VAL), replacement=True), "torch.utils.data.Subset of the dataset"),
        ([], "to give samples, got a list that gives none"),
    ],
)
def test_a_sampler_that_does_not_choose_is_refused(tmp_path, sampler, message):
    with pytest.raises(UserError, match=rf"sampler of `val_dataloader\(\)` .*{message}"):
        boost(tmp_path, Loaders(True, sampler=sampler))


# ---- the data of a fit


def test_loaders_may_be_asked_for_in_the_loop(tmp_path):
    data, controller, counts = Toys(), control(tmp_path, settings=settings_for(2)), []
    for module in controller.rounds(data):
        for loader in (data.train_dataloader(), data.val_dataloader()):
            counts.append(len(loader))
            assert len(next(iter(loader))) == 2
        make_trainer(controller).fit(module, data)
    assert counts == [TRAIN // BATCH, VAL // BATCH] * 2


@pytest.mark.parametrize(
    "given", [lambda data: (data.train_dataloader(), data.val_dataloader()), lambda data: [Toys()]]
)
def test_a_fit_on_other_data_is_refused(tmp_path, given):
    data, controller = Toys(), control(tmp_path)
    for module in controller.rounds(data):
        with pytest.raises(UserError, match=r"data module that `controller\.rounds\(datamodule\)` was given"):
            make_trainer(controller).fit(module, *given(data))
        break


def test_overfit_batches_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"`overfit_batches` of the Trainer to be 0, got 2.*limit_train_batches"):
        boost(tmp_path, trainer={"overfit_batches": 2})


class WithTrainer(Loaders):
    """Divides the batch among the processes, as many data modules do."""

    def setup(self, stage):
        self.each = BATCH // self.trainer.world_size

    def loader(self, part):
        return DataLoader(self.dataset(part), self.each)


def test_a_data_module_may_ask_for_its_trainer(tmp_path, capsys):
    data = WithTrainer()
    controller = control(tmp_path, settings=settings_for(1))
    rounds = controller.rounds(data)
    module = next(rounds)
    assert data.trainer is None
    assert "GPU" not in "".join(capsys.readouterr())
    make_trainer(controller).fit(module, data)
    assert next(rounds, None) is None
    assert controller.run.read("test")
    (tmp_path / "test.json").unlink()
    fit(control(tmp_path, settings=settings_for(1)), WithTrainer())  # a finished run
    assert controller.run.read("test")


def test_a_data_module_that_needs_connected_processes_is_refused(tmp_path):
    class Connected(Toys):
        def train_dataloader(self):
            data = Tensors(*self.parts["train"])
            return DataLoader(data, BATCH, sampler=torch.utils.data.DistributedSampler(data))

    with pytest.raises(
        UserError, match=r"`Connected` needs processes that are connected.*leave the DistributedSampler"
    ):
        boost(tmp_path, Connected())


def test_logits_of_no_output_are_compared():
    """A student without outputs is refused for their number, with a sentence."""
    assert close(torch.empty(2, 0), torch.empty(2, 0))
    assert not close(torch.empty(2, 0), torch.empty(2, 1))
