"""Readers and preparation of the data that the data modules use."""

from bdistil.data.readers.feature_cache import cached_features
from bdistil.data.readers.files import Source, load_arrays, packaged_file, read_numbers
from bdistil.data.readers.images import ArrayImages, ImageFiles, normalised, pad_crop_flip
from bdistil.data.readers.preparation import check_subjects, moments, stratified_split, validation_split, windows

__all__ = [
    "ArrayImages",
    "ImageFiles",
    "Source",
    "cached_features",
    "check_subjects",
    "load_arrays",
    "moments",
    "normalised",
    "packaged_file",
    "pad_crop_flip",
    "read_numbers",
    "stratified_split",
    "validation_split",
    "windows",
]
