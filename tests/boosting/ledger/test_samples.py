"""State belongs to the samples that it was kept for: anything that puts another one behind a number is refused."""

import json

import lightning as L
import pytest
import torch
from helpers.toys import (
    BATCH,
    CLASSES,
    FEATURES,
    TRAIN,
    VAL,
    Hook,
    Noisy,
    Toys,
    boost,
    control,
    fit,
    make_teacher,
    settings_for,
)
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from bdistil import Student, UserError
from bdistil.boosting.ledger import samples
from bdistil.storage.run_directory import RunDirectory

SEED = r"generator=torch\.Generator\(\)\.manual_seed\(0\)"
SHORT = {"settings": settings_for(2), "trainer": {"epochs": 2}}


class Parts(Toys):
    """Datasets made once, which a test replaces."""

    def __init__(self, **options):
        super().__init__(**options)
        self.train, self.val = TensorDataset(*self.parts["train"]), TensorDataset(*self.parts["val"])

    def train_dataloader(self):
        return DataLoader(self.train, BATCH, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, BATCH)


class Redrawn(Parts):
    """Splits at random in one of its methods, as most people write it."""

    def __init__(self, where, generator=lambda: None):
        super().__init__()
        self.where, self.generator = where, generator

    def split(self, where):
        if where == self.where:
            x, y = (torch.cat(tensors) for tensors in zip(self.parts["train"], self.parts["val"], strict=True))
            train, self.val = random_split(TensorDataset(x, y), [TRAIN, VAL], generator=self.generator())
            self.train = self.train if where == "val_dataloader" else train

    def setup(self, stage):
        self.split("setup")

    def train_dataloader(self):
        self.split("train_dataloader")
        return super().train_dataloader()

    def val_dataloader(self):
        self.split("val_dataloader")
        return super().val_dataloader()


METHODS = ["setup", "train_dataloader", "val_dataloader"]


@pytest.mark.parametrize("where", METHODS)
def test_parts_that_are_drawn_anew_are_refused_before_training(tmp_path, where):
    with pytest.raises(UserError, match=rf"Sample 0 of `\w+_dataloader\(\)` is not .*x and y have changed.*{SEED}"):
        boost(
            tmp_path, Redrawn(where), callbacks=lambda: [Hook(on_train_batch_start=lambda *_: pytest.fail("trained"))]
        )
    assert {path.name for path in tmp_path.glob("ledger/*")} <= {"test"}  # the teacher was not asked either


@pytest.mark.parametrize("where", METHODS)
def test_a_seeded_split_is_the_same_each_time(tmp_path, where):
    runs = [boost(tmp_path, Redrawn(where, lambda: torch.Generator().manual_seed(0)), **SHORT).run for _ in range(2)]
    assert runs[0].committed() == runs[1].committed() > 0  # the second start finds the samples of the first


def test_parts_that_are_drawn_anew_in_another_start_are_refused(tmp_path):
    class Once(Redrawn):
        def split(self, where):
            if self.train.__class__ is TensorDataset:
                super().split(where)

    boost(tmp_path, Once("setup"), settings=settings_for(1))
    torch.manual_seed(17)
    with pytest.raises(UserError, match=SEED):
        boost(tmp_path, Once("setup"), settings=settings_for(1))


# ---- curricula


class Curriculum(Parts):
    """Reads easy samples first: other ones, or more of them, in each epoch."""

    def __init__(self, grows):
        super().__init__()
        self.grows = grows

    def train_dataloader(self):
        epoch = self.trainer.current_epoch
        low, high = (0, 96 + 32 * epoch) if self.grows else (32 * epoch, 96 + 32 * epoch)
        return DataLoader(Subset(self.train, range(low, high)), BATCH, shuffle=True)


@pytest.mark.parametrize(
    ("grows", "message"),
    [(True, "gives a dataset of 128 samples, but the run was started with 96"), (False, "Sample 0 .* is not the one")],
)
def test_a_curriculum_of_datasets_is_refused(tmp_path, grows, message):
    with pytest.raises(UserError, match=f"{message}.*chooses samples by a sampler"):
        boost(tmp_path, Curriculum(grows), trainer={"epochs": 2, "reload_dataloaders_every_n_epochs": 1})


@pytest.mark.filterwarnings("ignore:The sampler of `train_dataloader")
def test_a_curriculum_of_samplers_works(tmp_path):
    class Sampled(Parts):
        def train_dataloader(self):
            chosen = range(96 + 32 * self.trainer.current_epoch)
            return DataLoader(self.train, BATCH, sampler=torch.utils.data.SubsetRandomSampler(chosen))

    counts = []
    boost(
        tmp_path, Sampled(), settings=settings_for(1), trainer={"epochs": 2, "reload_dataloaders_every_n_epochs": 1},
        callbacks=lambda: [Hook(on_train_epoch_end=lambda trainer, _: counts.append(trainer.num_training_batches))],
    )  # fmt: skip
    assert counts == [3, 4]


class ByEpoch(TensorDataset):
    """Changes with the epoch, which a callback sets."""

    epoch = 0

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + self.epoch, y


def test_a_dataset_that_changes_with_the_epoch_is_refused(tmp_path):
    data = Parts()
    data.train = ByEpoch(*data.parts["train"])

    def advance(trainer, module):
        data.train.epoch = trainer.current_epoch

    with pytest.raises(UserError, match=rf"Sample \d+ of `train_dataloader\(\)` .*its x has changed.*{SEED}"):
        boost(tmp_path, data, callbacks=lambda: [Hook(on_train_epoch_start=advance)])


# ---- data that were edited between two starts


def scaled(x, y):
    x *= 2


def shuffled(x, y):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x[:], y[:] = x[order], y[order]


def relabelled(x, y):
    y[:] = (y + 1) % CLASSES


def one_sample(x, y):
    x[7, 3] += 1


def one_label(x, y):
    y[9] = (y[9] + 1) % CLASSES


def interrupted(run_dir, **options):
    """A run that was stopped in its second round."""

    def stop(trainer, module):
        if module.number:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        boost(run_dir, Parts(), callbacks=lambda: [Hook(on_train_start=stop)], **{**SHORT, **options})


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("edit", [scaled, shuffled, relabelled, one_sample, one_label])
def test_edited_data_of_equal_size_are_refused(tmp_path, part, edit):
    interrupted(tmp_path)
    data = Parts()
    edit(*data.parts[part])
    elements = {scaled: "x has", one_sample: "x has", shuffled: "x and y have"}.get(edit, "y has")
    with pytest.raises(
        UserError, match=rf"of `{part}_dataloader\(\)` is not .*its {elements} changed.*another `run_dir`"
    ):
        boost(tmp_path, data, **SHORT)
    assert RunDirectory(tmp_path).committed() == 1


def test_a_run_that_was_started_without_fingerprints_gets_them(tmp_path):
    """As those of version 0.1.0."""
    interrupted(tmp_path)
    files = sorted(file for part in ("train", "val") for file in tmp_path.glob(f"ledger/{part}/samples.*"))
    assert [file.name for file in files] == ["samples.f32", "samples.json"] * 2
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    interrupted(tmp_path)
    assert [file.read_bytes() for file in files] == before


def test_other_rounding_of_another_processor_is_no_change(tmp_path):
    interrupted(tmp_path)
    data = Parts()
    for part in ("train", "val"):
        data.parts[part][0].mul_(1 + 2e-7)
    assert len(boost(tmp_path, data, **SHORT).ensemble) == 2


# ---- batches that change on their way


class SomeNoisy(Noisy):
    """Random for ten samples, none of which is looked at before training."""

    def __getitem__(self, index):
        return super().__getitem__(index) if 0 < index <= 10 else (self.tensors[0][index], self.tensors[1][index])


def test_a_dataset_that_is_random_for_some_samples_is_refused(tmp_path):
    data = Parts()
    data.train = SomeNoisy(*data.parts["train"])
    with pytest.raises(
        UserError, match=r"Two readings of sample \d+ of `train_dataloader\(\)` give two x\..*recompute"
    ):
        boost(tmp_path, data)
    assert not RunDirectory(tmp_path).committed()


def test_a_callback_that_changes_batches_is_refused(tmp_path):
    class Adds(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batch[0].add_(1)

    with pytest.raises(
        UserError, match=r"The x of sample \d+ in a batch of `train_dataloader\(\)` has changed\. A hook"
    ):
        boost(tmp_path, callbacks=lambda: [Adds()])


def test_the_first_batches_and_a_few_of_the_others_are_compared(tmp_path, monkeypatch):
    compared, rows = [], samples.SampleSketches.rows

    def count(sketches, index):
        compared.append(len(index))
        return rows(sketches, index)

    monkeypatch.setattr(samples.SampleSketches, "rows", count)
    boost(tmp_path, settings=settings_for(1), trainer={"epochs": 6})
    train, val = 6 * TRAIN // BATCH, 6 * VAL // BATCH + 2  # two to try validation
    assert compared == [BATCH] * sum(8 + len(range(32, batches, 32)) for batches in (train, val))


# ---- where samples augment


def test_parts_that_are_drawn_anew_are_refused_where_views_are_cached(tmp_path):
    class Augmented(Redrawn):
        def train_dataloader(self):
            dataset = super().train_dataloader().dataset
            return DataLoader(Noisy(*zip(*dataset, strict=True)), BATCH, shuffle=True)

    with pytest.raises(UserError, match=SEED):
        boost(tmp_path, Augmented("setup"), settings=settings_for(2, views=2))


def test_with_a_recomputed_state_labels_tell_samples_apart_and_another_x_is_a_warning(tmp_path):
    with pytest.raises(UserError, match=rf"y have changed.*{SEED}"):
        boost(tmp_path / "split", Redrawn("setup"), settings=settings_for(1, state="recompute"))

    class Generated(Parts):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(TRAIN, FEATURES), self.parts["train"][1]), BATCH)

    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"Sample 0 of `train_dataloader\(\)` has another x than before"):
        boost(tmp_path / "x", Generated(), settings=settings_for(1, state="recompute"))


class Drawing(Dataset):
    """Augments from a generator of its own, which no view fixes."""

    def __init__(self, tensors):
        self.tensors, self.generator = tensors, torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        x, y = (tensor[index] for tensor in self.tensors)
        return x + 0.1 * torch.randn(FEATURES, generator=self.generator), y


def test_augmentation_by_a_generator_of_its_own_is_trained_on_with_a_recomputed_state(tmp_path):
    data = Parts()
    data.train = Drawing(data.parts["train"])
    for rounds in (1, 2):  # a start, and one that goes on
        assert len(boost(tmp_path, data, settings=settings_for(rounds, state="recompute")).ensemble) == rounds
    stored = json.loads((tmp_path / "ledger/train/samples.json").read_text())
    assert all(found["x"] is None and found["y"] for found in stored.values())


@pytest.mark.parametrize("settings", [{}, {"state": "recompute"}, {"views": 2}], ids=str)
def test_a_validation_part_with_a_generator_of_its_own_is_refused(tmp_path, settings):
    """The teacher's logits of this part are cached in any case, and would be of another x than the students'."""
    data = Parts(noisy=bool(settings))
    data.train, data.val = (Noisy if settings else TensorDataset)(*data.parts["train"]), Drawing(data.parts["val"])
    with pytest.raises(UserError, match=r"`val_dataloader\(\)` twice gives two different x, even if the generators"):
        boost(tmp_path, data, settings=settings_for(1, **settings))


def test_a_fit_goes_on_with_loaders_of_its_own(tmp_path):
    """Files that `teardown` has closed stay closed."""

    class File(TensorDataset):
        open = True

        def __getitem__(self, index):
            if not self.open:
                raise ValueError("I/O operation on closed file")
            return super().__getitem__(index)

    class Files(Parts):
        def setup(self, stage):
            self.train, self.val = File(*self.parts["train"]), File(*self.parts["val"])

        def teardown(self, stage):
            self.train.open = self.val.open = False

    controller = control(tmp_path)
    assert len(fit(controller, Files()).ensemble) == 3


class Longer(Dataset):
    """One sample is longer than the others, which are all of one length."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        row = self.x[index]
        return (torch.cat([row, row[:2]]) if index == 10 else row), self.y[index]


def pad_with_ones(items):
    x = torch.nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True, padding_value=1.0)
    return x, torch.stack([y for _, y in items])


class Head(torch.nn.Module):
    """Reads what all samples have: padding changes no answer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x[:, :FEATURES])


def test_samples_that_a_longer_one_pads_are_the_same(tmp_path):
    """In the pass of the teacher, sample 10 has padded the others of its batch; in a fit it pads other ones."""
    data = Toys()
    longer = Longer(*data.parts["train"])
    data.train_dataloader = lambda: DataLoader(longer, batch_size=BATCH, shuffle=True, collate_fn=pad_with_ones)
    options = {
        "teacher": Head(make_teacher()),
        "student": lambda number: Student(Head(torch.nn.Linear(FEATURES, 3)), torch.nn.Linear(3, CLASSES)),
        "settings": settings_for(2),
        "trainer": {"epochs": 4},
    }
    with pytest.warns(UserWarning, match=r"has tensors of .*8,.* alone, and of .*10,.* in a batch"):
        controller = boost(tmp_path, data, **options)
    assert controller.run.committed() == 2
