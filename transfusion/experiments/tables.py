"""Markdown tables of trials: the mean over seeds, and how far they lie apart."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .trials import Question


# Heading, key of a result, and how to write it.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("scene drawn", "drawn_all", "percent"),
    ("cells drawn", "drawn_cells", "percent"),
    ("scene captioned", "captioned_all", "percent"),
    ("cells captioned", "captioned_cells", "percent"),
    ("image loss", "image_loss", "number"),
    ("perplexity", "perplexity", "number"),
)


# Fields that change at which noise levels the image loss is taken, or of what: such losses do not compare.
_OF_NOISE = frozenset(("noise_limit", "objective", "timestep_density", "timestep_mean", "timestep_std"))


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and half the distance between the lowest and the highest of several: "41 ± 3 %"."""
    mean, half = statistics.mean(values), (max(values) - min(values)) / 2
    digits, scale, unit = (0, 100, " %") if form == "percent" else (1 if mean >= 10 else 3, 1, "")
    deviation = f" ± {scale * half:.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean:.{digits}f}{deviation}{unit}"


def cell(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """One score of the runs of a trial; a dash for an image loss that is not that of the base."""
    if key == "image_loss" and _OF_NOISE & set(runs[0]["config"]):
        return "-"
    return spread([run[key] for run in runs], form)


def comparison_table(question: Question, results: Sequence[Mapping[str, Any]]) -> str:
    """The table of `question`; trials without results are left out."""
    headings = ["trial", "parameters", "seeds", *(heading for heading, _, _ in COLUMNS), "CPU ms a step"]
    lines = [f"| {' | '.join(headings)} |", "|" + " --- |" * len(headings)]
    for name in question.trials:
        runs = [result for result in results if result["trial"] == name]
        if not runs:
            continue
        milliseconds = [1000 * run["cpu_seconds"] / run["settings"]["steps"] for run in runs]
        cells = [
            name,
            f"{runs[0]['parameters'] / 1e6:.2f} M",
            str(len(runs)),
            *(cell(runs, key, form) for _, key, form in COLUMNS),
            f"{statistics.mean(milliseconds):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


__all__ = ["COLUMNS", "comparison_table", "spread"]
