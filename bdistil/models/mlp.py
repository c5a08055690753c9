"""Multi-layer perceptrons for tables, as teachers and as students."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.student import Student, scaled


def mlp_stages(features: int, hidden: Sequence[int]) -> list[nn.Sequential]:
    """Linear layers with ReLU: (B, features) -> (B, hidden[-1]).

    Raises:
        UserError: no hidden layer, or a width below 1.
    """
    if not hidden or min(features, *hidden) < 1:
        raise UserError(f"Expected `features` and each of `hidden` to be >= 1, got {features} and {list(hidden)}.")
    return [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in zip([features, *hidden], hidden, strict=False)]


class MLP(nn.Module):
    """A multi-layer perceptron, as a teacher. Its output is mean + std * (output of the last layer).

    Args:
        features: number of features of a sample.
        hidden: width of each hidden layer.
        outputs: L.
        dropout: probability of the dropout after each hidden layer.
        mean: mean of the labels of a regression, so that training starts in their units; 0 for classes.
        std: standard deviation of the labels of a regression; 1 for classes.

    Example:
        >>> import torch
        >>> MLP(features=8)(torch.zeros(2, 8)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 1,
        dropout: float = 0.0,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise UserError(f"Expected `dropout` in 0 … 1, got {dropout}.")
        layers = [layer for stage in mlp_stages(features, hidden) for layer in (*stage, nn.Dropout(dropout))]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(hidden[-1], outputs)
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (B, L) of x (B, features)."""
        outputs: Tensor = self.head(self.body(x))
        return self.mean + self.std * outputs


class MLPStudent(Student):
    """A tiny multi-layer perceptron as a student; each hidden layer is a stage.

    Args:
        features: number of features of a sample.
        hidden: width of each hidden layer.
        outputs: L.
        width: factor on the hidden widths, for wider rungs of the ladder.

    Example:
        >>> import torch
        >>> MLPStudent(features=8, width=2.0).features(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, features: int, hidden: Sequence[int] = (4,), outputs: int = 1, width: float = 1.0) -> None:
        wide = scaled(hidden, width)
        super().__init__(stages=mlp_stages(features, wide), head=nn.Linear(wide[-1], outputs))
