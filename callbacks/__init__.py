"""Lightning callbacks, one per file. This folder is imported as ``bdistil.callbacks``."""

if __name__ == "callbacks":
    raise ImportError(
        "This folder is part of bdistil and is not imported as plain `callbacks`. "
        "Write `import bdistil.callbacks`, or `from bdistil.callbacks import RoundController`."
    )

from bdistil.callbacks.compute_cost import ComputeCost
from bdistil.callbacks.distill import distill
from bdistil.callbacks.epoch_keeper import EpochKeeper
from bdistil.callbacks.gradient_noise import GradientNoise
from bdistil.callbacks.loss_mixing import LossMixing
from bdistil.callbacks.metric_curves import MetricCurves
from bdistil.callbacks.round_controller import RoundController
from bdistil.callbacks.round_progress import RoundProgressBar

__all__ = [
    "ComputeCost",
    "EpochKeeper",
    "GradientNoise",
    "LossMixing",
    "MetricCurves",
    "RoundController",
    "RoundProgressBar",
    "distill",
]
