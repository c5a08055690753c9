"""The command line."""

from bdistil.cli.app import main

__all__ = ["main"]
