"""One picture of a sweep of `detector_steps`: how many steps does i-FPN need?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from detector_report import TOLERATED_LOSS, ap_at_rest, fewest_steps, rows_of, solvers_of
from detector_steps import OWN, DetectorRow
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from plots import COLOURS
from torch import Tensor

MARKERS = "osD^vPX*"


def plot_detector(path: Path, rows: Sequence[DetectorRow], title: str, radii: Tensor) -> None:
    """AP, what it lacks of that at rest, time, true error and residual against solver steps, a panel each.

    Args:
        path: image file to write.
        rows: of `detector_steps.sweep`.
        title: what was measured.
        radii: spectral radii of dG/dP at rest.
    """
    figure, ((ap, gap, key), (error, residual, clock)) = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    rest = ap_at_rest(rows)
    _draw(ap, rows, lambda row: _points(row.ap))
    _draw(ap, rows, lambda row: _points(row.ap50), linestyle="--")
    _draw(gap, rows, lambda row: math.nan if rest is None else _points(row.ap) - 100 * rest)
    _draw(error, rows, lambda row: _above_zero(row.error_median))
    _draw(error, rows, lambda row: _above_zero(row.error_worst), linestyle=":")
    _draw(residual, rows, lambda row: _above_zero(row.residual_median))
    _draw(residual, rows, lambda row: _above_zero(row.residual_worst), linestyle=":")
    _draw(clock, rows, lambda row: math.nan if row.seconds_per_image is None else 1e3 * row.seconds_per_image)
    if rest is not None:
        ap.axhline(100 * rest, color="0.3", linestyle="-.", linewidth=1)
    limit = 100 * TOLERATED_LOSS
    gap.axhspan(-limit, limit, color="0.9")
    gap.set_yscale("symlog", linthresh=limit)
    gap.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    for axis in (error, residual):
        axis.set_yscale("log")
    clock.set_ylim(bottom=0)
    _label(ap, "AP (solid), AP50 (dashed)", "points")
    _label(gap, f"AP minus that at rest; grey: within {limit:g} points", "points")
    _label(error, "distance of the pyramid from that at rest", "relative; median (solid), worst image (dotted)")
    _label(residual, "residual |G(P+B)-P| / |G(P+B)|", "relative; median (solid), worst image (dotted)")
    _label(clock, "time of the whole detector", "milliseconds per image")
    _explain(key, rows)
    last = max(row.steps or 0 for row in rows)
    for axis in (ap, gap, error, residual, clock):
        axis.set_xlim(-0.04 * last - 0.1, 1.04 * last + 0.1)
    figure.supxlabel(_notes(rows, radii), fontsize=11)
    figure.suptitle(f"How many steps does i-FPN need?\n{title}", fontsize=13)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Axes, rows: Sequence[DetectorRow], value: Callable[[DetectorRow], float], linestyle: str = "-") -> None:
    for i, label in enumerate(solvers_of(rows)):
        mine, colour, marker = rows_of(rows, label), COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        steps = [float(row.steps or 0) for row in mine]
        style: dict[str, Any] = {"marker": marker, "markersize": 4} if linestyle == "-" else {}
        axis.plot(steps, [value(row) for row in mine], color=colour, linewidth=1.2, linestyle=linestyle, **style)
        enough = fewest_steps(rows, label)
        if enough is not None and linestyle == "-":
            ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgewidth": 1.8}
            axis.plot(float(enough.steps or 0), value(enough), color=colour, **ring)


def _explain(axis: Axes, rows: Sequence[DetectorRow]) -> None:
    """The legend, with each solver's fewest steps, in the place of a panel."""
    axis.set_axis_off()
    handles = []
    for i, label in enumerate(solvers_of(rows)):
        enough = fewest_steps(rows, label)
        needed = "not within these steps" if enough is None else f"{enough.steps}"
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        handles.append(Line2D([], [], linewidth=2, label=f"{label}: {needed}", **style))
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 13,
        "markerfacecolor": "none",
        "markeredgewidth": 1.8,
        "linestyle": "",
    }
    limit = 100 * TOLERATED_LOSS
    words = f"the fewest steps from which on AP stays within\n{limit:g} points of that at rest"
    handles.append(Line2D([], [], color="0.3", label=words, **ring))
    dash = Line2D([], [], color="0.3", linestyle="-.", linewidth=1, label="AP with the pyramid at rest")
    axis.legend(
        handles=[*handles, dash], loc="upper left", frameon=False, fontsize=11, title="solver: fewest steps",
        title_fontsize=11, alignment="left",
    )  # fmt: skip


def _notes(rows: Sequence[DetectorRow], radii: Tensor) -> str:
    """What else there is to know, in a line or two."""
    notes = (
        f"0 steps: the basis B itself.   Spectral radius of dG/dP at rest: {radii.min():.2f} to {radii.max():.2f}.   "
    )
    notes += "The paper: 7 steps at test give what 15 give."
    own = next(row for row in rows if row.solver == OWN)
    if own.mean_steps is None or own.ap is None or own.seconds_per_image is None:
        return notes
    milliseconds = 1e3 * own.seconds_per_image
    return (
        f"{notes}\nThe neck's own settings: {own.mean_steps:.1f} steps, AP {100 * own.ap:.2f}, {milliseconds:.1f} ms."
    )


def _label(axis: Axes, title: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_ylabel(ylabel)
    axis.set_xlabel("solver steps")
    axis.grid(True, which="major", color="0.9", linewidth=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))


def _points(ap: float | None) -> float:
    return math.nan if ap is None else 100 * ap


def _above_zero(value: float | None) -> float:
    """A logarithmic axis shows nothing else."""
    return value if value is not None and math.isfinite(value) and value > 0 else math.nan
