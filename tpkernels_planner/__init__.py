"""Predict the memory, communication and step time of every layout of a model, without torch."""

from .advice import advice
from .api import plan
from .errors import PlanError
from .job import Job, make_job
from .layout import Layout
from .model import Model
from .model_config import load_model
from .search import LayoutChoice, Prediction, predict, search

__all__ = [
    "Job",
    "Layout",
    "LayoutChoice",
    "Model",
    "PlanError",
    "Prediction",
    "advice",
    "load_model",
    "make_job",
    "plan",
    "predict",
    "search",
]
