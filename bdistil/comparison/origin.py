"""Data that all trainings and starts of a comparison share: the samples of each part, and the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from bdistil.boosting.checks.data import TEST, loaders_of, test_loader_of
from bdistil.boosting.labels import read_labels
from bdistil.boosting.ledger.samples import check_known, read_known
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import LOADERS, check_dataset, is_indexed, only_given
from bdistil.data.loaders.fingerprints import spread, stable_digests
from bdistil.errors import UserError
from bdistil.storage.weights import load_weights
from bdistil.teachers.training import TeacherSpec
from bdistil.teachers.wrappers import FrozenTeacher, comes_trained

FILE, FIRST_START = "origin.json", "at the first start of this comparison"
ONE_SPLIT = (
    "A comparison has one teacher, whose training samples may be among those that this training validates and tests "
    "with. Split with a fixed seed, not with that of the run: "
    "random_split(dataset, lengths, generator=torch.Generator().manual_seed(0))."
)
Origin = Mapping[str, Any]
Parts = Mapping[str, Any]  # loaders by the name of the method that returns them


def parts_of(datamodule: LightningDataModule, settings: BoostingSettings) -> Parts:
    """The loaders of a data module by the method that returns them; None for a missing test part."""
    found = dict(zip(LOADERS, loaders_of(datamodule, settings), strict=True))
    for name, loader in found.items():
        check_dataset(loader, name)
    found[LOADERS[1]] = only_given(found[LOADERS[1]], LOADERS[1])
    return {**found, TEST: test_loader_of(datamodule, settings)}


def _datasets(parts: Parts) -> dict[str, Any]:
    return {name: loader.dataset for name, loader in parts.items() if loader is not None and is_indexed(loader.dataset)}


def origin_of(parts: Parts, spec: TeacherSpec) -> Origin:
    """Digests of some samples of each part and of all test labels, and the fingerprint of a trained teacher."""
    samples = {name: stable_digests(items, spread(len(items))) for name, items in _datasets(parts).items()}
    return {"samples": samples, "labels": _test_labels(parts), "teacher": _fingerprint(spec)}


def _test_labels(parts: Parts) -> str | None:
    """Digest of all labels of the test part, which every training reads anew; None if its samples have no numbers."""
    if TEST not in _datasets(parts):
        return None
    labels = read_labels(parts[TEST])
    return hashlib.sha256(labels.to(torch.float64).numpy().tobytes()).hexdigest()  # NumPy has no bfloat16


def _fingerprint(spec: TeacherSpec) -> str | None:
    if spec.checkpoint:
        load_weights(spec.network, Path(spec.checkpoint), "model.teacher.network")
    elif not comes_trained(spec.network):
        return None
    return FrozenTeacher(spec.network).fingerprint


def read_origin(output: Path) -> Origin | None:
    """Reads the origin stored by the first start of a comparison; None if there is none."""
    file = output / FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def check_split(origin: Origin, parts: Parts) -> None:
    """Raises UserError if the parts of a training differ from those of the teacher."""
    _check_samples(origin, parts, "in another training of this comparison", ONE_SPLIT)


def check_start(output: Path, parts: Parts, now: Origin) -> None:
    """Raises UserError if a comparison was started with other data or another teacher."""
    if (before := read_origin(output)) is None:
        return
    way = f"Put the data back, or choose another `output` than {output}."
    _check_samples(before, parts, FIRST_START, way)
    _check_labels(before, now["labels"], way)
    if before["teacher"] != now["teacher"]:
        raise UserError(
            f"Expected `model.teacher` to be the teacher of the comparison in {output}, got other weights. Put the "
            "weights back, or choose another `output`."
        )


def check_test_labels(origin: Origin, parts: Parts) -> None:
    """Raises UserError if the test labels that a training reads are not those of the comparison."""
    _check_labels(origin, _test_labels(parts), "Put the data back, or choose another `output`.")


def _check_labels(origin: Origin, now: str | None, way: str) -> None:
    if origin.get("labels") not in (None, now):
        raise UserError(f"Expected `{TEST}()` to give the labels that it gave {FIRST_START}, got others. {way}")


def _check_samples(origin: Origin, parts: Parts, where: str, way: str) -> None:
    for name, items in _datasets(parts).items():
        check_known(read_known(origin["samples"].get(name, {})), name, items, where, way)
