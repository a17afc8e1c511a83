"""Measuring a model: does it draw what was asked, name what it sees, and predict text."""

from .pictures import caption_score, nearest_score
from .report import EvaluationSettings, evaluate_demo
from .text import TrigramBaseline, text_perplexity


__all__ = [
    "EvaluationSettings",
    "TrigramBaseline",
    "caption_score",
    "evaluate_demo",
    "nearest_score",
    "text_perplexity",
]
