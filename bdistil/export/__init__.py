"""Deployment: one graph per stage, with a runner that needs neither torch nor bdistil."""

from bdistil.export.run import ExportOptions, export_run, export_summary

__all__ = ["ExportOptions", "export_run", "export_summary"]
