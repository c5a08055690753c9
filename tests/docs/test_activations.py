"""docs/activations.md is true: its block runs, and what it builds can be trained."""

import re
from pathlib import Path

import lightning as L
import torch
from helpers.toys import boost, curve
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

GUIDE = (Path(__file__).parents[2] / "docs" / "activations.md").read_text(encoding="utf-8")


class Images(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(96, 3, 16, 16, generator=generator), torch.randint(5, (96,), generator=generator)
        self.parts = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])

    def train_dataloader(self):
        return DataLoader(self.parts[0], batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], batch_size=32)


def test_its_block_describes_a_run(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    made = {}
    exec(compile(block, "activations.md", "exec"), made)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    boost(tmp_path, Images(), teacher=teacher, student=made["make_student"], settings=made["settings"])
    rows = curve(tmp_path)[1:]
    assert {row["accepted_class"] for row in rows[1:]} <= {"F1-deep2", "F1-deep"}
