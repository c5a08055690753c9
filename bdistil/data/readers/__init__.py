"""Readers of the file formats that the data modules use."""

from bdistil.data.readers.audio import log_mel, mel_filters, read_wav
from bdistil.data.readers.feature_cache import cached_features
from bdistil.data.readers.images import ArrayImages, ImageFiles, normalised, pad_crop_flip
from bdistil.data.readers.pickles import load_arrays
from bdistil.data.readers.series import moments, windows
from bdistil.data.readers.sources import Source, packaged_file
from bdistil.data.readers.splits import check_subjects, stratified_split

__all__ = [
    "ArrayImages",
    "ImageFiles",
    "Source",
    "cached_features",
    "check_subjects",
    "load_arrays",
    "log_mel",
    "mel_filters",
    "moments",
    "normalised",
    "packaged_file",
    "pad_crop_flip",
    "read_wav",
    "stratified_split",
    "windows",
]
