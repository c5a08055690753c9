"""Multi-layer perceptrons for tables, as teachers and as students."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.student import Student, scaled


def mlp_body(features: int, hidden: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU and dropout: (B, features) -> (B, hidden[-1]).

    Raises:
        UserError: no hidden layer, or a width below 1.
    """
    if not hidden or min(features, *hidden) < 1:
        raise UserError(f"Expected `features` and each of `hidden` to be >= 1, got {features} and {list(hidden)}.")
    layers: list[nn.Module] = []
    for inside, outside in zip([features, *hidden], hidden, strict=False):
        layers += [nn.Linear(inside, outside), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """A multi-layer perceptron, as a teacher. It answers mean + std * (output of the last layer).

    Args:
        features: of a sample.
        hidden: width of each hidden layer.
        outputs: L.
        dropout: probability of the dropout after each hidden layer.
        mean: of the labels of a regression, so that training starts in their units; 0 for classes.
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
        self.body, self.head = mlp_body(features, hidden, dropout), nn.Linear(hidden[-1], outputs)
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (B, L) of x (B, features)."""
        outputs: Tensor = self.head(self.body(x))
        return self.mean + self.std * outputs


class MLPStudent(Student):
    """A tiny multi-layer perceptron as a student.

    Args:
        features: of a sample.
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
        super().__init__(mlp_body(features, wide), nn.Linear(wide[-1], outputs))
