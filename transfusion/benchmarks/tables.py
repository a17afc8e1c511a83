"""Tables of results: in Markdown for documents, by rich on a terminal."""

import sys
from collections.abc import Callable, Sequence

from .flops import Peak
from .results import PEER, PLAIN, Place, Result, fastest, grouped, ratio


WIDTH = 200  # of a table that goes into a file
Cell = Callable[[Result, Sequence[Result], Peak | None], str]


def cost(result: Result, *_: object) -> str:
    """The median, in a unit that suits it."""
    if result.samples is None:
        return "failed"
    value = result.samples.median
    return f"{value:,.0f} MB" if result.place.unit == "MB" else seconds(value)


def seconds(value: float) -> str:
    """Milliseconds with three digits, or seconds from ten on."""
    if value >= 10:
        return f"{value:.1f} s"
    milliseconds = 1000 * value
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2
    return f"{milliseconds:.{digits}f} ms"


def extent(result: Result, *_: object) -> str:
    """The lowest and the highest value."""
    if result.samples is None or len(result.samples.values) < 2:
        return ""
    low, high = min(result.samples.values), max(result.samples.values)
    if result.place.unit == "MB":
        return f"{low:,.0f} to {high:,.0f}"
    return f"{seconds(low)} to {seconds(high)}"


def noise(result: Result, *_: object) -> str:
    """The difference between odd and even rounds."""
    share = result.samples.noise if result.samples else None
    return "" if share is None else f"{100 * share:.1f} %"


def parameters(result: Result, *_: object) -> str:
    """In millions."""
    return "" if result.parameters is None else f"{result.parameters / 1e6:.3g} M"


def token_rate(result: Result, *_: object) -> str:
    """Real tokens in a second."""
    return f"{result.tokens / result.samples.median:,.0f}" if result.tokens and result.samples else ""


def flop_rate(result: Result, members: Sequence[Result], peak: Peak | None) -> str:
    """GFLOP/s, and the share of the best matrix product."""
    if not result.flops or not result.samples:
        return ""
    rate = result.flops / result.samples.median
    best = peak.matmul.get(result.place.dtype) if peak else None
    return f"{rate / 1e9:,.0f}" + (f" ({100 * rate / best:.0f} %)" if best else "")


def byte_rate(result: Result, members: Sequence[Result], peak: Peak | None) -> str:
    """GB/s that the unit has to read at least, and the share of the best reading."""
    if not result.bytes or not result.samples:
        return ""
    rate = result.bytes / result.samples.median
    return f"{rate / 1e9:,.1f}" + (f" ({100 * rate / peak.read:.0f} %)" if peak else "")


def times_of(system: str) -> Cell:
    """How much more the fastest of `system` costs than this one."""

    def cell(result: Result, members: Sequence[Result], peak: Peak | None) -> str:
        value = ratio(fastest(members, system), result)
        return "" if value is None else f"{value:.2f}"

    return cell


def note(result: Result, *_: object) -> str:
    """As it is."""
    return result.note


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("", lambda result, *_: result.system),
    ("parameters", parameters),
    ("median", cost),
    ("lowest to highest", extent),
    ("odd to even rounds", noise),
    ("real tokens/s", token_rate),
    ("GFLOP/s (of the best product)", flop_rate),
    ("GB/s (of the best reading)", byte_rate),
    ("peer / this", times_of(PEER)),
    ("plain / this", times_of(PLAIN)),
    ("note", note),
)


def title(place: Place) -> str:
    """What the table of a place is about."""
    parts = (f"{place.suite}: {place.workload}", place.size, place.dtype)
    return ", ".join(filter(None, parts)) + ("" if place.unit == "MB" else f", per {place.unit}")


def cells(members: Sequence[Result], peak: Peak | None) -> list[list[str]]:
    """Headings, then a row for each result; columns that nobody fills are left out."""
    columns = [[heading, *(cell(result, members, peak) for result in members)] for heading, cell in COLUMNS]
    kept = [column for column in columns if any(column[1:])]
    return [list(row) for row in zip(*kept, strict=True)]


def markdown(results: Sequence[Result], peak: Peak | None = None) -> str:
    """A table for each place, with its title."""
    tables = []
    for place, members in grouped(results).items():
        headings, *rows = cells(members, peak)
        lines = [f"**{title(place)}**", "", f"| {' | '.join(headings)} |"]
        lines.append("| --- |" + " ---: |" * (len(headings) - 1))
        lines += [f"| {' | '.join(row)} |" for row in rows]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def print_tables(results: Sequence[Result], peak: Peak | None = None) -> None:
    """To the terminal."""
    from rich.console import Console  # of the extra `train`
    from rich.table import Table

    for place, members in grouped(results).items():
        headings, *rows = cells(members, peak)
        table = Table(title=title(place), title_justify="left")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


__all__ = ["COLUMNS", "cells", "markdown", "print_tables", "seconds", "title"]
