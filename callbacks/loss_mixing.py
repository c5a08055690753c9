"""Callback that learns per-sample weights of the label loss and the teacher losses on a clean validation part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from bdistil.boosting.labels import read_labels
from bdistil.boosting.round import BoostingRound
from bdistil.callbacks.fit_state import FitState
from bdistil.data.label_noise import flipped_labels
from bdistil.data.loaders import LOADERS, Index, begin_epoch, check_dataset, indexed_loaders, only_given
from bdistil.data.loaders.fingerprints import Digests, changed, read_digests, spread, stable_digests
from bdistil.data.loaders.order import SEEDED
from bdistil.distillation.last_layer import distilling_loaders, label_key
from bdistil.distillation.loss_mixing import (
    check_boosting,
    draw_weights,
    log_weights,
    mix_round,
    read_mix,
    save_mix,
    update_mix,
    weight_figures,
)
from bdistil.distillation.probes import probe_of, training_rows
from bdistil.errors import RunError, UserError
from bdistil.functional.loss_mixing import MixingSettings, loss_weights, start_mix
from bdistil.reporting.round_tracker import logger_step
from bdistil.utils.modules import eval_mode
from bdistil.utils.seeding import seed_of


class LossMixing(FitState):
    """Learns per-sample weights of label loss and teacher losses on the clean validation part.

    In a LightningModule that implements `bdistil.distillation.Distilling`, batches of the training loader become
    (x, y, index), and the module gets the method ``sample_weights(index)``, which returns weights (B, K) for
    `bdistil.functional.mixed_loss`. In a boosting run, alongside the RoundController, the target of a round becomes a
    mix of label and teacher.

    Checkpoints contain the weights, so a resumed fit continues with them. The learned parameters are written at the end
    of a fit to ``mixing.NNN.f32`` (float32 rows by sample index), from which the next round of a boosting run starts.

    Args:
        settings: mode, schedule and step sizes of the updates.
        folder: folder of this file and a picture; ``mixing`` in the Trainer's default_root_dir by default. In a
            boosting run it is ``mixing`` in the run directory.
        seed: seed of the initial weights of `convex`, and of the order of samples outside a boosting run.

    Raises:
        UserError: the module or its data do not meet the requirements, or the boosting run cannot mix in labels.
        RunError: the weights in the checkpoint or the folder belong to other data or another mode.

    Example:
        >>> import lightning, tempfile, torch
        >>> from torch import nn
        >>> from bdistil.distillation import Distillation
        >>> part = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
        >>> class Data(lightning.LightningDataModule):
        ...     def train_dataloader(self):
        ...         return torch.utils.data.DataLoader(part, batch_size=16)
        ...     val_dataloader = train_dataloader
        >>> mixing = LossMixing(MixingSettings(warmup=0, every=1), folder=tempfile.mkdtemp())
        >>> options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = lightning.Trainer(max_epochs=2, callbacks=[mixing], enable_model_summary=False, **options)
        >>> trainer.fit(Distillation(nn.Linear(4, 3), nn.Linear(4, 3)), datamodule=Data())
        >>> mixing.weights().shape  # labels and one teacher
        torch.Size([64, 2])

        A training step in your own module::

            x, y, index = batch
            terms = kd_terms(self(x), self.teacher_logits(x, index), y, temperature=self.temperature)
            return mixed_loss(terms, self.sample_weights(index))
    """

    def __init__(
        self,
        settings: MixingSettings = MixingSettings(),  # noqa: B008 (frozen)
        folder: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.settings, self.folder, self.seed = settings, folder, seed
        self.history: list[dict[str, float]] = []
        self.mix: Tensor | None = None
        self._samples: Mapping[int, Digests] = {}  # some of the samples that the weights belong to
        self._open = ExitStack()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """The learned parameters of all samples (N, C), how they were learned, and the history of statistics."""
        return {"mix": self.mix, "mode": self.settings.mode, "samples": self._samples, "history": self.history}

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Restores the learned parameters and the history of statistics.

        Raises:
            RunError: they were learned in another mode.
        """
        if (mode := state_dict.get("mode", self.settings.mode)) != self.settings.mode:
            raise RunError(
                f"Expected a checkpoint of mode {self.settings.mode!r} of LossMixing, got one of {mode!r}. Give the "
                "mode that the fit was started with, or start again."
            )
        self.mix, self.history = state_dict["mix"], list(state_dict["history"])
        self._samples = state_dict.get("samples", {})

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks module and data; outside a boosting run adds the index to the training batches."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        folder, self._round = Path(self.folder or Path(trainer.default_root_dir) / "mixing").expanduser(), 0
        if isinstance(pl_module, BoostingRound):
            folder, self._round = pl_module.run_dir / "mixing", pl_module.number
        self._file, self._written = folder / f"mixing.{self._round:03d}.f32", False
        if trainer.global_step == 0:  # not a second fit of a Trainer, which goes on with the weights of the first
            self.mix, self.history, self._samples = None, [], {}
        if isinstance(pl_module, BoostingRound):
            check_boosting(pl_module.settings, self.settings)
            return
        train, val = distilling_loaders(trainer, pl_module, "LossMixing", indexed=True)
        check_dataset(val, LOADERS[1])
        self._loaders = (train, only_given(val, LOADERS[1]))
        with isolate_rng():
            _class_numbers(train, LOADERS[0], training_rows(train))
            _class_numbers(self._loaders[1], LOADERS[1])
        datamodule: pl.LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        order, key = seed_of(self.seed, "mixing"), label_key(pl_module)
        self._open.enter_context(indexed_loaders(datamodule, order, names=LOADERS[:1], labels=key))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the loaders of the data module, and the attribute of the module."""
        self._open.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restores the loaders of the data module, and the attribute of the module."""
        self._open.close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the weights of the checkpoint or of the previous round, or initialises them."""
        with eval_mode(pl_module), torch.no_grad(), isolate_rng():
            if isinstance(pl_module, BoostingRound):
                # Not earlier, as loaders of the previous fit may read closed files.
                self._loaders = (pl_module.train_part.loader, pl_module.val_part.loader)
                self._labels, _ = map(_class_numbers, self._loaders, LOADERS)  # the weights are learned on the latter
            self.probe = probe_of(pl_module, self._loaders)
            first = next(self.probe.batches([[0]]))
            teachers = len(self.probe.mixing(first).residuals) - 1
        start = start_mix(self.probe.samples, teachers, self.settings.mode, self.seed)
        found = self.mix if self.mix is not None else read_mix(self._file)
        if found is not None and found.numel() != start.numel():
            raise RunError(
                f"Expected the checkpoint, or {self._file.parent}, to hold learned weights of {start.shape[0]} samples "
                f"with {start.shape[1]} columns, got {found.numel()} numbers. Use the data and teachers that they were "
                "learned with, or start again without them."
            )
        self.mix = start if found is None else found.view(start.shape)
        if not isinstance(pl_module, BoostingRound):  # the ledger of a boosting run has samples of its own to compare
            dataset: Any = self._loaders[0].dataset
            self._check_samples(dataset)
            with isolate_rng():
                self._samples = stable_digests(dataset, spread(self.probe.samples))
        self.flipped = flipped_labels(self._loaders[0].dataset)
        self._open.enter_context(_restored(pl_module))
        self._used = False  # whether the training step has asked for the weights
        self._attach(pl_module)
        last = trainer.max_epochs or 0
        if last > 0 and not any(map(self.settings.due, range(last))) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"LossMixing learns no weights in this fit (max_epochs={last}): its first update follows epoch "
                f"{self.settings.warmup}. Give a smaller MixingSettings(warmup=…), or more epochs."
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Updates the weights when an update is due, and logs them."""
        if not isinstance(pl_module, BoostingRound):  # whose controller does it
            begin_epoch(trainer.train_dataloader, trainer.current_epoch)
        if self._samples:
            self._check_samples(trainer.train_dataloader.dataset.dataset)  # type: ignore[union-attr]
        if not self.settings.due(trainer.current_epoch):
            return
        assert self.mix is not None
        lr, key = _learning_rate(trainer, pl_module), (self.seed, self._round, trainer.current_epoch)
        with eval_mode(pl_module), torch.no_grad(), isolate_rng():
            self.mix = update_mix(self.probe, self.mix, self.settings, lr=lr, key=key)
        self._attach(pl_module)
        weights, flipped = self._weights_in_training()
        self.history.append({"epoch": trainer.current_epoch, **weight_figures(weights, flipped)})
        log_weights(trainer.loggers, weights, self.history[-1], logger_step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises UserError if the module has not asked for the weights since they were learned."""
        if self.history and not self._used and not isinstance(pl_module, BoostingRound):
            raise UserError(
                f"Expected the training step of {type(pl_module).__name__} to weight its losses by "
                "`self.sample_weights(index)`, which LossMixing learns, but it did not ask for them. See "
                "docs/noisy-labels.md."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the learned parameters, and a histogram of the label weights."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._write()
        if trainer.is_global_zero and self.history:
            draw_weights(self._file.with_name("mixing.png"), *self._weights_in_training())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the learned parameters of a fit that was resumed after its end: `on_train_end` is not called then."""
        if not self._written and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write()

    def _write(self) -> None:
        if self.mix is not None:
            save_mix(self._file, self.mix)
            self._written = True

    def _check_samples(self, dataset: Any) -> None:
        """Raises RunError if a training sample differs from the one that its weights were learned on."""
        with isolate_rng():  # a dataset may augment at random
            now = read_digests(dataset, [row for row in self._samples if row < len(dataset)])
        wrong = [row for row, before in self._samples.items() if row not in now or changed(before, now[row])]
        if wrong:
            raise RunError(
                f"Expected `{LOADERS[0]}()` to give the samples that LossMixing has learned weights of, got another "
                f"sample {wrong[0]}. Where it splits or selects at random, seed it: random_split(dataset, lengths, "
                f"{SEEDED}). A dataset must not change between epochs."
            )

    def weights(self, index: Index | None = None) -> Tensor:
        """Weights (B, K) of samples, the label weight first; of all N samples by default."""
        assert self.mix is not None, "there are no weights before training"
        self._used = True
        rows = self.mix if index is None else self.mix[torch.as_tensor(index)]
        return loss_weights(rows, self.settings.mode)

    def _weights_in_training(self) -> tuple[Tensor, Tensor | None]:
        """Weights of the samples that are trained on, and which of their labels are known to be flipped."""
        assert self.mix is not None
        rows = torch.tensor(self.probe.rows)
        return loss_weights(self.mix[rows], self.settings.mode), None if self.flipped is None else self.flipped[rows]

    def _attach(self, module: Any) -> None:
        assert self.mix is not None
        if isinstance(module, BoostingRound):
            mix_round(module, self.mix, self._labels)
        else:
            module.sample_weights = lambda index: self.weights(index).to(module.device)


def _learning_rate(trainer: pl.Trainer, module: Any) -> float:
    """Learning rate of the last layer, which the look-ahead step changes; of the first group where it has none."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    weight = getattr(getattr(module, "last_layer", None), "weight", None)
    own = (group for group in groups if any(parameter is weight for parameter in group["params"]))
    return float(next(own, groups[0])["lr"])


@contextmanager
def _restored(module: pl.LightningModule) -> Iterator[None]:
    """Context that restores the module's own `sample_weights`, if any, at its end: later fits may use other samples."""
    own = {key: value for key, value in vars(module).items() if key == "sample_weights"}
    try:
        yield
    finally:
        vars(module).pop("sample_weights", None)
        vars(module).update(own)


def _class_numbers(loader: Any, name: str, rows: Sequence[int] | None = None) -> Tensor:
    """Class numbers (N,) of a part. Raises UserError if a sample, or one of `rows`, has no label."""
    labels = read_labels(loader)
    if labels.ndim != 1:
        raise UserError(
            f"Expected class numbers in `{name}()` beside LossMixing, got labels (N, L). Give y.argmax(-1)."
        )
    missing = (labels < 0).nonzero().flatten()
    if rows is not None:
        missing = missing[torch.isin(missing, torch.tensor(rows))]
    if len(missing):
        raise UserError(
            f"LossMixing mixes labels in, but sample {int(missing[0])} of `{name}()` has none (ignore_index). Leave "
            "out such samples, or this callback."
        )
    return labels
