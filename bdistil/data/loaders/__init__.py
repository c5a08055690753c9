"""DataLoaders that carry each sample's index, checks of datasets, and fixed random views."""

from bdistil.data.loaders.batches import PairCollate, as_labels, paired, pairs_of
from bdistil.data.loaders.checks import (
    check_dataset,
    distinct_samples,
    first_samples,
    is_indexed,
    is_random,
    same_x,
    single_loader,
)
from bdistil.data.loaders.early_trainer import with_trainer
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
from bdistil.data.loaders.order import begin_epoch, check_drawn, largest_batch, only_given
from bdistil.data.loaders.views import CANONICAL, ViewPlan, Views, ViewSampler

__all__ = [
    "CANONICAL",
    "LOADERS",
    "Index",
    "IndexedDataset",
    "PairCollate",
    "ViewPlan",
    "ViewSampler",
    "Views",
    "as_labels",
    "begin_epoch",
    "check_dataset",
    "check_drawn",
    "distinct_samples",
    "first_samples",
    "indexed_loaders",
    "is_indexed",
    "is_random",
    "largest_batch",
    "only_given",
    "paired",
    "pairs_of",
    "rows_loader",
    "same_x",
    "sequential_loader",
    "single_loader",
    "training_loader",
    "with_dataset",
    "with_trainer",
]
