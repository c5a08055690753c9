"""Sentences of token ids: batches are mappings with a mask, padded to the longest sentence."""

import lightning as L
import torch
from helpers.toys import boost, settings_for
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from bdistil import Student

WORDS, CLASSES, WIDTH = 12, 3, 5


def sentences(count, seed, shortest=2, longest=7):
    """Items of `count` sentences; the class is that of the first word."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]
    return [{"ids": row, "target": int(row[0]) % CLASSES} for row in ids]


def padded(items):
    ids = [item["ids"] for item in items]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    target = torch.tensor([item["target"] for item in items])
    return {"ids": pad_sequence(ids, batch_first=True), "mask": mask, "target": target}


class Sentences(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(sentences(200, 1), batch_size=20, shuffle=True, collate_fn=padded)

    def val_dataloader(self):
        return DataLoader(sentences(80, 2), batch_size=20, collate_fn=padded)

    def test_dataloader(self):
        return DataLoader(sentences(60, 3), batch_size=20, collate_fn=padded)


class WordMean(nn.Module):
    """Mean of word vectors; reads x by keywords."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.embed, self.mix = nn.Embedding(WORDS, width), nn.Linear(width, width)

    def forward(self, ids, mask):
        weight = mask[..., None].float()
        return (torch.tanh(self.mix(self.embed(ids))) * weight).sum(1) / weight.sum(1)


class Classifier(nn.Module):
    """A teacher whose answer is a mapping."""

    def __init__(self):
        super().__init__()
        self.body, self.head = WordMean(16), nn.Linear(16, CLASSES)

    def forward(self, ids, mask):
        return {"logits": 3 * self.head(self.body(ids, mask)), "hidden": mask}


def make_student(round):
    return Student(WordMean(), nn.Linear(WIDTH, CLASSES))


class WordStudent(Student):
    """A student of a recipe, which makes it without arguments."""

    def __init__(self, width=WIDTH):
        super().__init__(WordMean(width), nn.Linear(width, CLASSES))


class Unlabelled(Sentences):
    def train_dataloader(self):
        return DataLoader(sentences(200, 1), batch_size=20, shuffle=True, collate_fn=alone)

    def val_dataloader(self):
        return DataLoader(sentences(80, 2), batch_size=20, collate_fn=alone)

    def test_dataloader(self):
        return DataLoader(sentences(60, 3), batch_size=20, collate_fn=alone)


def alone(items):
    return {key: value for key, value in padded(items).items() if key != "target"}


class Tagged(Sentences):
    """Several labels that hold together: which of three words occur."""

    def train_dataloader(self):
        return DataLoader(sentences(200, 1), batch_size=20, shuffle=True, collate_fn=tagged)

    def val_dataloader(self):
        return DataLoader(sentences(80, 2), batch_size=20, collate_fn=tagged)

    def test_dataloader(self):
        return DataLoader(sentences(60, 3), batch_size=20, collate_fn=tagged)


def tagged(items):
    batch = padded(items)
    batch["target"] = torch.stack([(batch["ids"] == word).any(1) for word in range(1, CLASSES + 1)], 1)
    return batch


def run_of_sentences(folder, rounds=2, **options):
    """A run whose configuration names the data, as that of a recipe does."""
    torch.manual_seed(3)
    settings = settings_for(rounds, labels="target")
    config = {"data": {"class_path": "helpers.sentences.Sentences"}, "boosting": settings.to_dict(), "seed": 0}
    return boost(
        folder, Sentences(), teacher=Classifier(), student=make_student, settings=settings, config=config,
        trainer={"epochs": 4}, **options,
    )  # fmt: skip
