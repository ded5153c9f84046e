"""The rows of `peers.py` as tables, for the terminal or in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from peer_gradients import GradientRow
from peer_solves import SolveRow
from peer_targets import Target
from reporting import format_table

Formatter = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [list(header), ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def formatter(markdown: bool) -> Formatter:
    """What makes a table of a header and rows."""
    return markdown_table if markdown else format_table


def calls_table(rows: Sequence[SolveRow], table: Formatter = format_table) -> str:
    """Calls of f per solver and problem; a dash where the tolerance was not reached."""
    return _by_problem(rows, lambda row: str(row.calls) if row.solved else "wrong" if row.is_wrong else "-", table)


def time_table(rows: Sequence[SolveRow], table: Formatter = format_table) -> str:
    """Milliseconds, and in brackets the multiple of as many bare calls."""
    return _by_problem(rows, lambda row: f"{1e3 * row.seconds:.1f} ({row.ratio:.2f})" if row.solved else "-", table)


def memory_table(rows: Sequence[SolveRow], table: Formatter = format_table) -> str:
    """Peak memory in states, of one call of f and of every solve; in brackets of those that did not get there."""

    def cell(row: SolveRow) -> str:
        text = "?" if math.isnan(row.memory) else f"{row.memory:.0f}"
        return text if row.solved else f"({text})"

    calls = {row.problem: f"{row.call_memory:.0f}" for row in rows}
    return _by_problem(rows, cell, table, first=["one call of f", *calls.values()])


def gradients_table(rows: Sequence[GradientRow], table: Formatter = format_table) -> str:
    """A line per adjoint of one problem."""
    header = ["", "cosine", "error", "calls", "passes", "ms", "/ bare", "states", ""]
    return table(header, (_gradient_cells(row) for row in rows))


def _gradient_cells(row: GradientRow) -> list[str]:
    name = f"{row.library} {row.adjoint}"
    if row.failure:
        return [name, *["-"] * 7, "failed"]
    remark = "WRONG, no warning" if row.is_wrong else "warned" if row.warned else "" if row.exact else "approximate"
    figures = ("-", "-") if math.isnan(row.seconds) else (f"{1e3 * row.seconds:.1f}", f"{row.ratio:.2f}")
    calls = f"{row.calls - row.calls_backward}+{row.calls_backward}"
    error = f"{row.relative_error:.0e}"
    return [name, f"{row.cosine:.4f}", error, calls, str(row.passes), *figures, f"{row.memory:.0f}", remark]


def targets_table(lines: Sequence[Target], table: Formatter = format_table) -> str:
    """A line per target."""
    return table(["", "goal", "figure", "", ""], (line.cells() for line in lines))


def _by_problem(
    rows: Sequence[SolveRow], cell: Callable[[SolveRow], str], table: Formatter, first: list[str] | None = None
) -> str:
    problems = list(dict.fromkeys(row.problem for row in rows))
    labels = list(dict.fromkeys((row.library, row.solver) for row in rows))
    by_key = {(row.library, row.solver, row.problem): row for row in rows}
    lines = [] if first is None else [first]
    for label in labels:
        found = [by_key.get((*label, problem)) for problem in problems]
        lines.append([" ".join(label), *("" if row is None else cell(row) for row in found)])
    return table(["", *problems], lines)
