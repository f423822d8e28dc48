"""Splitting a model that is already there: plans, styles, and tpk.parallelize."""

from .parallelize import parallelize
from .plans import auto_plan
from .styles import STYLES

__all__ = ["STYLES", "auto_plan", "parallelize"]
