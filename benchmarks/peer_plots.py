"""The plot of `peers.py`, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from peer_gradients import GradientRow
from peer_solves import SolveRow
from plots import COLOURS

_LIBRARIES = ("deqkit", "torchdeq", "scipy", "xitorch", "deepinv", "jaxopt")
_COLOUR: dict[str, str] = dict(zip(_LIBRARIES, COLOURS, strict=False))
Styles = dict[tuple[str, str], dict[str, Any]]
Key = tuple[str, float]  # dtype and tolerance
_MARKERS = "osD^vPX*<>hp8d1234"


def plot_peers(path: Path, solves: Sequence[SolveRow], gradients: Sequence[GradientRow]) -> None:
    """Above: calls of f to each tolerance, time and peak memory to one. Below: error of gradients against their time.

    What is hollow has not reached its tolerance, and stands at the limit of calls: some give up early.

    Args:
        path: image file to write.
        solves: measurements of solvers, none or more.
        gradients: measurements of adjoints, none or more.
    """
    problems = list(dict.fromkeys(row.problem for row in solves))
    panels = list(dict.fromkeys(row.problem for row in gradients))
    top, below = (1.6 + 0.42 * max(len(problems), 7)) * bool(solves), 5.2 * bool(gradients)
    figure = plt.figure(figsize=(17, top + below), layout="constrained")
    heights = [height for height in (top, below) if height]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if solves:
        _draw_solves(parts[0], solves, problems)
    if gradients:
        _draw_gradients(parts[-1], gradients, panels)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_solves(figure: SubFigure, rows: Sequence[SolveRow], problems: Sequence[str]) -> None:
    labels = list(dict.fromkeys((row.library, row.solver) for row in rows))
    style = _styles(labels)
    limit = max(row.calls for row in rows)
    seen = [row for row in rows if not math.isnan(row.memory)] or list(rows)
    told = seen[0].dtype, seen[0].rtol  # time and memory are shown for one tolerance
    timed = [row for row in rows if not math.isnan(row.seconds)]
    alone = {row.problem for row in rows} - {row.problem for row in rows if (row.dtype, row.rtol) == told}
    panels: list[tuple[str, str, Callable[[SolveRow], float], Key]] = []
    for key in dict.fromkeys((row.dtype, row.rtol) for row in rows):
        if key == told or len({row.problem for row in rows if (row.dtype, row.rtol) == key}) > 1:
            what = "calls of f (hollow: not reached)"
            panels.append((f"to {key[1]:g}, {key[0]}", what, lambda row: row.calls if row.solved else limit, key))
    at = f"to {told[1]:g}, {told[0]}"
    panels += [(at, "ms", lambda row: 1e3 * row.seconds, told)] if timed else []
    panels.append((at, "peak memory, states", lambda row: row.memory, told))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, xlabel, value, key) in zip(axes, panels, strict=True):
        for row in rows:
            if math.isnan(value(row)) or not (
                (row.dtype, row.rtol) == key or (xlabel == "ms" and row.problem in alone)
            ):
                continue
            label = (row.library, row.solver)
            hollow = {} if row.solved else {"markerfacecolor": "none"}
            axis.plot(value(row), _place(row, problems, labels), **style[label], markersize=6, linestyle="", **hollow)
        _log_scale(axis)
        _finish(axis, title, xlabel, problems)
    own = {row.problem: f"\n(to {row.rtol:g})" for row in rows if row.problem in alone}
    axes[0].set_yticks(range(len(problems)), [name + own.get(name, "") for name in problems])
    axes[0].set_ylim(-0.5, len(problems) - 0.5)
    axes[0].invert_yaxis()
    _legend(figure, labels, style)


def _draw_gradients(figure: SubFigure, rows: Sequence[GradientRow], problems: Sequence[str]) -> None:
    labels = list(dict.fromkeys((row.library, row.adjoint) for row in rows))
    style = _styles(labels)
    clocked = any(not math.isnan(row.seconds) for row in rows)
    for axis, problem in zip(figure.subplots(1, len(problems), squeeze=False, sharey=True)[0], problems, strict=True):
        for row in (row for row in rows if row.problem == problem and not row.failure):
            hollow = {} if row.exact else {"markerfacecolor": "none"}
            x = 1e3 * row.seconds if clocked else row.memory
            axis.plot(x, row.relative_error, **style[row.library, row.adjoint], markersize=6, linestyle="", **hollow)
        _log_scale(axis)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.set_title(f"gradient, {problem}", fontsize=10)
        axis.set_xlabel("forward and backward, ms" if clocked else "peak memory, states")
    figure.axes[0].set_ylabel("relative error (hollow: approximate by intent)")
    _legend(figure, labels, style)


def _styles(labels: Sequence[tuple[str, str]]) -> Styles:
    """One colour per library, one marker for each of what it has."""
    return {
        label: {
            "color": _COLOUR.get(label[0], "0.4"),
            "marker": _MARKERS[[k for k in labels if k[0] == label[0]].index(label) % len(_MARKERS)],
        }
        for label in labels
    }


def _place(row: SolveRow, problems: Sequence[str], labels: Sequence[tuple[str, str]]) -> float:
    """A height of its own in the problem's band: those that are equal stay visible."""
    return problems.index(row.problem) + 0.7 * (labels.index((row.library, row.solver)) / max(1, len(labels) - 1) - 0.5)


def _log_scale(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.margins(x=0.08)
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(NullLocator())


def _finish(axis: Axes, title: str, xlabel: str, problems: Sequence[str]) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.grid(axis="x", alpha=0.3)
    for i in range(1, len(problems)):
        axis.axhline(i - 0.5, color="0.85", linewidth=0.8)


def _legend(figure: SubFigure, labels: Sequence[tuple[str, str]], style: Styles) -> None:
    handles = [Line2D([], [], **style[label], linestyle="", label=" ".join(label)) for label in labels]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
