"""A data module of a user's with options that look like fields of a rung."""

from typing import Any

from helpers.toys import Toys


class Layered(Toys):
    def __init__(self, layers: list[dict[str, Any]]) -> None:
        super().__init__()
        self.layers = layers
