"""DataLoaders that carry each sample's index, checks of datasets, and fixed random views."""

from bdistil.data.loaders.attach import indexed_loaders, single_loader
from bdistil.data.loaders.checks import check_dataset, distinct_samples, is_random
from bdistil.data.loaders.indexing import (
    Index,
    IndexedDataset,
    block_loader,
    rows_loader,
    sequential_loader,
    training_loader,
    with_dataset,
)
from bdistil.data.loaders.views import ViewPlan, Views, ViewSampler

__all__ = [
    "Index",
    "IndexedDataset",
    "ViewPlan",
    "ViewSampler",
    "Views",
    "block_loader",
    "check_dataset",
    "distinct_samples",
    "indexed_loaders",
    "is_random",
    "rows_loader",
    "sequential_loader",
    "single_loader",
    "training_loader",
    "with_dataset",
]
