"""An update of what mixing has learned: a pass over the validation and the training part."""

from __future__ import annotations

import torch

from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.functional.loss_mixing import MixingSettings, learn_mix, outer_loss
from bdistil.mixing_store import MixingStore
from bdistil.observing import View
from bdistil.utils import distributed
from bdistil.utils.seeding import seed_of


def mixed_groups(samples: int, *key: object) -> list[list[int]]:
    """The samples of this process in groups of mixed classes, whatever the order of the dataset.

    Groups are the same for any number of processes, so what is learned is too.

    Args:
        samples: N.
        key: of the draw.
    """
    generator = torch.Generator().manual_seed(seed_of(*key))
    order = torch.randperm(samples, generator=generator).tolist()
    return [order[low:high] for low, high in distributed.my_blocks(samples, BLOCK)]


def update_mix(view: View, store: MixingStore, settings: MixingSettings, *, lr: float, seed: int) -> None:
    """Learns the next version of the numbers of all samples, group by group.

    Args:
        view: of a module in eval mode.
        store: of the numbers (N, C).
        settings: how they are learned.
        lr: learning rate of the module.
        seed: of the groups.
    """
    validation = view.validation()
    store.begin()
    for batch in view.batches(mixed_groups(view.samples, seed, store.round, store.version)):
        seen, index = view.mixing(batch), batch[2]
        outer = outer_loss(validation, view.outer(batch, seen), settings.share)
        mix = store.rows(index).to(seen.logits.device)
        store.write(index, learn_mix(mix, seen.residuals, seen.activations, outer, settings, lr))
    store.keep()
