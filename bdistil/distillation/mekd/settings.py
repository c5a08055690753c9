"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from bdistil.distillation.mekd.mapping_emulation import Optimizer
from bdistil.errors import UserError


@dataclass(frozen=True)
class Mekd:
    """Settings of MEKD: two stages and the queries between them.

    Attributes:
        queries: all of them: those of stage 1, those about local samples, and the rest about generated ones.
        first_queries: of stage 1.
        width: channels of the generator.
        critic_width: channels of the discriminator's first convolution.
        share: of the teacher's term in the generator's loss.
        gan_epochs: of stage 1.
        gan_batch_size: of stage 1.
        gan_lr: of stage 1.
        average: decay of the running mean of the generator's weights, such as 0.99; 0 is the last weights.
        shift: pixels or steps by which the discriminator's inputs are moved at random; for few local samples.
        epochs: of stage 2.
        batch_size: of stage 2, and of a boosting run on its samples.
        optimizer: of stage 2, `sgd` or `adamw`; see `MappingEmulation`.
        lr: of stage 2.
        tau: temperature of stage 2, for soft answers.
        kl: weight of the answers against the images in stage 2.
        local_share: of the training samples of stage 2 and of the rounds that are local ones, asked about as well and
            repeated to make up the share; 0, the paper's, is generated ones alone.
        student: whether to train one student by stage 2, before the boosting run.
    """

    queries: int = 10_000
    first_queries: int = 500
    width: int = 128
    critic_width: int = 16
    share: float = 0.5
    gan_epochs: int = 200
    gan_batch_size: int = 64
    gan_lr: float = 2e-4
    average: float = 0.0
    shift: int = 0
    epochs: int = 60
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    lr: float = 0.1
    tau: float = 5.0
    kl: float = 1.0
    local_share: float = 0.0
    student: bool = True

    def __post_init__(self) -> None:
        counts = ("queries", "first_queries", "gan_epochs", "epochs", "gan_batch_size", "batch_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"Expected `{name}` of MEKD to be >= 1, got {getattr(self, name)}.")
        if not 0 <= self.local_share < 1:
            raise UserError(f"Expected `local_share` of MEKD in [0, 1), got {self.local_share}.")
        if self.first_queries >= self.queries:
            raise UserError(
                f"Expected `first_queries` < `queries` of MEKD, got {self.first_queries} and {self.queries}: the "
                "second stage needs answers as well."
            )
