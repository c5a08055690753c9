"""DataLoaders that carry each sample's index, checks of datasets, and fixed random views."""

from bdistil.data.loaders.checks import check_dataset, distinct_samples, first_samples, is_random, single_loader
from bdistil.data.loaders.indexing import (
    LOADERS,
    Index,
    IndexedDataset,
    indexed_loaders,
    rows_loader,
    sequential_loader,
    training_loader,
    with_dataset,
)
from bdistil.data.loaders.views import CANONICAL, ViewPlan, Views, ViewSampler

__all__ = [
    "CANONICAL",
    "LOADERS",
    "Index",
    "IndexedDataset",
    "ViewPlan",
    "ViewSampler",
    "Views",
    "check_dataset",
    "distinct_samples",
    "first_samples",
    "indexed_loaders",
    "is_random",
    "rows_loader",
    "sequential_loader",
    "single_loader",
    "training_loader",
    "with_dataset",
]
