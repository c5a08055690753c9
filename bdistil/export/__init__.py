"""Deployment: one graph a stage, with a runner that needs neither torch nor bdistil."""

from bdistil.export.run import export_run, export_summary

__all__ = [
    "export_run",
    "export_summary",
]
