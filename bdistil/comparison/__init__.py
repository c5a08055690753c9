"""Comparison of bdistil with other ways to train the same students, on the same data, teacher and epochs."""

from bdistil.comparison.methods import METHODS, cells_of
from bdistil.comparison.report import write_comparison
from bdistil.comparison.running import CellRunner
from bdistil.comparison.students import plan_students

__all__ = ["METHODS", "CellRunner", "cells_of", "plan_students", "write_comparison"]
