"""Plots of benchmark rows, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from measure import Row

# Okabe & Ito's palette, which people with any colour vision can tell apart, with grey in place of its yellow.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"]


def plot_accuracy(path: Path, rows: Sequence[Row], titles: Mapping[str, str]) -> None:
    """One panel per problem: true error (solid) and reported residual (dashed) against solver steps.

    Args:
        path: image file to write.
        rows: measurements of all problems.
        titles: panel title per problem, in the order of the panels.
    """
    labels = list(dict.fromkeys(row.solver for row in rows))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    num_columns = min(3, len(titles))
    num_rows = math.ceil(len(titles) / num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(4.6 * num_columns, 3.5 * num_rows + 1.0), squeeze=False, layout="constrained"
    )
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=False):
        _draw_panel(axis, [row for row in rows if row.problem == name], colours)
        axis.set_title(_wrap(title), fontsize=10)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative size")
    for axis in axes[-1]:
        axis.set_xlabel("solver steps")
    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), frameon=False, fontsize=11)
    styles = [
        Line2D([], [], color="0.3", linewidth=1.8, label="true error |x-x*| / |x*|, median sample"),
        Line2D([], [], color="0.3", linewidth=0.8, marker="v", markersize=3, label="true error, worst sample"),
        Line2D([], [], color="0.3", linestyle="--", label="residual |f(x)-x| / |f(x)|, median sample"),
    ]
    figure.legend(handles=styles, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_panel(axis: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    for label, colour in colours.items():
        mine = [row for row in rows if row.solver == label]
        steps = [row.steps for row in mine]
        axis.plot(steps, _positive([row.error_median for row in mine]), color=colour, linewidth=1.8)
        worst = _positive([row.error_worst for row in mine])
        axis.plot(steps, worst, color=colour, linewidth=0.8, marker="v", markersize=3, alpha=0.7)
        axis.plot(steps, _positive([row.residual_median for row in mine]), color=colour, linewidth=1.2, linestyle="--")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axis.grid(True, which="major", color="0.9", linewidth=0.6)
    axis.tick_params(labelsize=9)


def _positive(values: Sequence[float]) -> list[float]:
    """Zeros and non-finite values as gaps: a logarithmic axis cannot show them."""
    return [value if math.isfinite(value) and value > 0 else math.nan for value in values]


def _wrap(title: str) -> str:
    """The sizes, which stand in brackets at the end, on a line of their own."""
    head, bracket, tail = title.rpartition(" (")
    return f"{head}\n{bracket.strip()}{tail}" if head else title
