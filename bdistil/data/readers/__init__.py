"""Readers and preparation of the data that the data modules use."""

from bdistil.data.readers.feature_cache import cached_features
from bdistil.data.readers.files import Source, load_arrays, packaged_file, read_numbers
from bdistil.data.readers.images import (
    ArrayImages,
    GreyFiles,
    ImageFiles,
    encoded,
    image_size,
    normalised,
    pad_crop_flip,
)
from bdistil.data.readers.preparation import (
    check_subjects,
    moments,
    share_split,
    stratified_split,
    validation_split,
    windows,
)

__all__ = [
    "ArrayImages",
    "GreyFiles",
    "ImageFiles",
    "Source",
    "cached_features",
    "check_subjects",
    "encoded",
    "image_size",
    "load_arrays",
    "moments",
    "normalised",
    "packaged_file",
    "pad_crop_flip",
    "read_numbers",
    "share_split",
    "stratified_split",
    "validation_split",
    "windows",
]
