"""Controlled comparisons on the shapes world: declared trials, their runs, and tables of mean and spread."""

from .runs import RunSettings, run_trial
from .tables import comparison_table
from .trials import QUESTIONS, TRIALS, Question, Trial


__all__ = ["QUESTIONS", "TRIALS", "Question", "RunSettings", "Trial", "comparison_table", "run_trial"]
