"""Measuring a model: does it draw what was asked, name what it sees, and predict text."""

from .frechet import frechet_distance, real_floor
from .pictures import caption_score, nearest_score
from .report import EvaluationSettings, evaluate_demo
from .shapes import caption_following, prompt_following
from .shapes_report import evaluate_shapes
from .text import TrigramBaseline, text_perplexity


__all__ = [
    "EvaluationSettings",
    "TrigramBaseline",
    "caption_following",
    "caption_score",
    "evaluate_demo",
    "evaluate_shapes",
    "frechet_distance",
    "nearest_score",
    "prompt_following",
    "real_floor",
    "text_perplexity",
]
