"""Which strategies of Lightning a round can be trained with."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy

from bdistil.errors import UserError

# One device, or a process a device that runs the script from its top. `auto` chooses between the two.
NAMES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")


def check_strategy(strategy: Strategy | str) -> None:
    """Refuses a strategy under which a student could not be judged and committed as a whole.

    Args:
        strategy: of a Trainer, or its name in a recipe.

    Raises:
        UserError: it splits the weights of a module, or starts its processes in the middle of the script.
    """
    if isinstance(strategy, str):
        name, known = strategy, strategy in NAMES
    else:
        started = getattr(strategy, "_start_method", "popen")  # of DDP; there is no public way to ask (lightning 2.6)
        name = type(strategy).__name__ if started == "popen" else f"ddp_{started}"
        whole = isinstance(strategy, DDPStrategy | SingleDeviceStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        known = whole and started == "popen"
    if known:
        return
    raise UserError(
        f"Expected `strategy` of the Trainer to be 'auto' or 'ddp', got {name}. FSDP, DeepSpeed and other strategies "
        "that split a module leave no process a whole student, which a round judges, commits and links to; ddp_spawn, "
        "ddp_fork and ddp_notebook start new processes for every round. Give strategy='ddp': every process then holds "
        "one student in training, and the frozen ones and the teacher in eval mode."
    )


def check_precision(precision: str) -> None:
    """Weights stay float32: a student is judged, committed and linked to outside the Trainer's precision.

    Args:
        precision: of a Trainer.

    Raises:
        UserError: a Trainer that turns the weights into another type.
    """
    if precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise UserError(
            f"Expected `precision` of the Trainer to be '32-true', '16-mixed' or 'bf16-mixed', got {precision!r}. "
            "With the mixed ones the network's products are in half precision; weights, loss and ledger are float32."
        )
