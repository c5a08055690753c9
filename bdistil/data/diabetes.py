"""Diabetes: ten measurements of 442 patients, and the progression of the disease a year later; from `scikit-learn`.

Efron, Hastie, Johnstone and Tibshirani, Least Angle Regression, Annals of Statistics 32 (2004).
"""

from __future__ import annotations

import gzip

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import TensorParts, tensor_parts
from bdistil.data.readers import packaged_file
from bdistil.errors import UserError

FOLDER = "sklearn/datasets/data"
SHA256 = {
    "diabetes_data_raw.csv.gz": "7fc0ded571454b1982210d3bb43f0aca44eae01a0b8654a3b24022bdb6b38009",
    "diabetes_target.csv.gz": "8e53f65eb811df43c206f3534bb3af0e5fed213bc37ed6ba36310157d6023803",
}
PATIENTS = 442


def read_diabetes() -> tuple[Tensor, Tensor]:
    """Measurements (442, 10) and progression (442,), both float32 and not scaled."""
    tables = []
    for name, sha256 in SHA256.items():
        with gzip.open(packaged_file("scikit-learn", f"{FOLDER}/{name}", sha256), "rt") as file:
            tables.append(torch.from_numpy(np.loadtxt(file, dtype=np.float32)))
    return tables[0], tables[1]


class Diabetes(TensorParts):
    """Three random parts; measurements are standardised by the training part, the progression (25 … 346) is not scaled.

    Args:
        batch_size: patients in a training step.
        validation: patients of the validation part.
        test: patients of the test part.
        split_seed: seed of the split, independent of the seed of a run.
    """

    def __init__(self, batch_size: int = 32, validation: int = 89, test: int = 89, split_seed: int = 0) -> None:
        super().__init__(batch_size)
        if min(validation, test) < 1 or validation + test > PATIENTS // 2:
            raise UserError(
                f"Expected `validation` and `test` >= 1, together at most {PATIENTS // 2} of {PATIENTS} patients, got "
                f"{validation}, {test}."
            )
        self.sizes, self.split_seed = (validation, test), split_seed

    def make_parts(self) -> dict[str, TensorDataset]:
        """Standardised measurements and progression."""
        x, y = read_diabetes()
        order = torch.randperm(PATIENTS, generator=torch.Generator().manual_seed(self.split_seed))
        rows = order.split([PATIENTS - sum(self.sizes), *self.sizes])
        return tensor_parts((x - x[rows[0]].mean(0)) / x[rows[0]].std(0), y, rows)
