"""Plots of benchmark rows, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from measure import Row

if TYPE_CHECKING:  # needs the detection extra, which the other plots do not
    from detector_steps import DetectorRow

# Okabe & Ito's palette, which people with any colour vision can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]


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


def plot_detector(path: Path, rows: Sequence[DetectorRow], title: str) -> None:
    """AP, residual and time against solver steps, one panel each; the detector's own settings as a dotted line."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    fixed = [row for row in rows if row.steps is not None]
    own = next(row for row in rows if row.steps is None)
    colours = dict(zip(dict.fromkeys(row.solver for row in fixed), COLOURS, strict=False))
    ap_axis, residual_axis, time_axis = axes
    for label, colour in colours.items():
        mine = [row for row in fixed if row.solver == label]
        steps = [float(row.steps or 0) for row in mine]
        ap_axis.plot(steps, _points([row.ap for row in mine]), color=colour, marker="o", markersize=4)
        ap_axis.plot(steps, _points([row.ap50 for row in mine]), color=colour, marker="o", markersize=4, linestyle="--")
        residual_axis.plot(steps, _positive([row.residual_median for row in mine]), color=colour, marker="o", ms=4)
        worst = _positive([row.residual_worst for row in mine])
        residual_axis.plot(steps, worst, color=colour, linewidth=0.8, marker="v", markersize=3)
        time_axis.plot(steps, [1e3 * row.seconds_per_image for row in mine], color=colour, marker="o", markersize=4)
    for axis, value in ((ap_axis, _points([own.ap])[0]), (time_axis, 1e3 * own.seconds_per_image)):
        axis.axhline(value, color="0.3", linestyle=":", linewidth=1.2)
    residual_axis.set_yscale("log")
    _label(ap_axis, "AP (solid) and AP50 (dashed), points", "AP (solid), AP50 (dashed)")
    _label(residual_axis, "relative residual of the pyramid", "residual: median image (o), worst (v)")
    _label(time_axis, "milliseconds", "time of the detector per image")
    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in colours.items()]
    note = f"the detector's own settings ({own.mean_steps:.1f} steps on average)"
    handles.append(Line2D([], [], color="0.3", linestyle=":", label=note))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(axis: Axes, ylabel: str, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(ylabel)
    axis.set_xlabel("solver steps")
    axis.set_xlim(left=0)
    axis.grid(True, which="major", color="0.9", linewidth=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))


def _points(values: Sequence[float | None]) -> list[float]:
    """AP in points; a gap where it does not exist."""
    return [math.nan if value is None else 100 * value for value in values]


def _positive(values: Sequence[float]) -> list[float]:
    """Zeros and non-finite values as gaps: a logarithmic axis cannot show them."""
    return [value if math.isfinite(value) and value > 0 else math.nan for value in values]


def _wrap(title: str) -> str:
    """The sizes, which stand in brackets at the end, on a line of their own."""
    head, bracket, tail = title.rpartition(" (")
    return f"{head}\n{bracket.strip()}{tail}" if head else title
