"""L6. Pictures of how solves converge. They read solutions and figures, and need matplotlib (the diagnostics extra).

Every function draws into ``ax`` (or ``figure``) if it is given one, and into a new figure otherwise; it never touches
pyplot, so that nothing is shown or kept open: ``plots.residuals(solution).figure.savefig("residuals.png")``.

A batch is drawn status by status: up to `_MAX_LINES` samples as a line each, more as their median and the bands of the
middle 50 % and 90 % of them. In a band a sample that has ended counts with the residual it ended with.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deqkit.solution import Solution, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_LINES = 12  # of one status, beyond which lines hide one another

# Okabe & Ito's palette, which people with any colour vision can tell apart.
_BLUE, _ORANGE, _GREEN, _PINK, _AMBER, _SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_STATUS_COLOURS = {
    Status.CONVERGED: _BLUE,
    Status.MAX_STEPS: _AMBER,
    Status.STAGNATED: _PINK,
    Status.DIVERGED: _ORANGE,
    Status.NONFINITE: "black",
}
_LAYER_COLOURS = (_BLUE, _ORANGE, _GREEN, _PINK, _AMBER, _SKY)
_GREY = "0.45"


def residuals(solution: Solution, ax: Axes | None = None) -> Axes:
    """Relative residual after each step, coloured by how each sample ended, beside the tolerance.

    Args:
        solution: of a solve with ``trace=True``.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: the solution has no trace, or no sample.
        ImportError: matplotlib is not installed.
    """
    trace, status = _trace(solution)
    floor = torch.finfo(solution.residual.dtype).eps  # what a logarithmic axis shows for an exact zero
    trace = torch.where(trace == 0, torch.minimum(_smallest_positive(trace), torch.tensor(floor)), trace)
    axes = _axes(ax)
    for code, mine in _by_status(status):
        _draw_samples(axes, trace[:, mine], code)
    if solution.rtol:
        axes.axhline(solution.rtol, color=_GREY, linestyle="--", linewidth=1.2, label=f"rtol = {solution.rtol:g}")
    axes.set_yscale("log")
    _label(axes, "solver steps", "relative residual |f(x) - x| / |f(x)|", whole_steps=True)
    return axes


def convergence_rate(solution: Solution, ax: Axes | None = None) -> Axes:
    """By what factor each step shrinks the residual, and the rate fitted to the later half of the steps.

    Below 1 the residual falls. A plain iteration tends towards the spectral radius of df/dx at the fixed point.

    Args:
        solution: of a solve with ``trace=True``.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: the solution has no trace, or no sample.
        ImportError: matplotlib is not installed.
    """
    trace, status = _trace(solution)
    ratios = trace[1:] / trace[:-1]
    axes = _axes(ax)
    for code, mine in _by_status(status):
        _draw_samples(axes, ratios[:, mine], code, first_step=1, carry_on=False)
    axes.axhline(1.0, color=_GREY, linestyle="--", linewidth=1.2)
    rates = fitted_rates(trace)
    rates = rates[rates.isfinite()]
    if len(rates):
        median, slowest = rates.median().item(), rates.max().item()
        fitted = f"fitted rate: median {median:.2g}" + (f", slowest {slowest:.2g}" if len(rates) > 1 else "")
        axes.axhline(median, color=_GREEN, linewidth=1.2, label=fitted)
    seen = ratios[ratios.isfinite()]
    top = max(1.1, 1.1 * float(seen.quantile(0.98))) if len(seen) else 1.1
    axes.set_ylim(0, min(top, 3.0))  # a single jump should not press everything else flat
    _label(axes, "solver steps", "residual / residual of the step before", whole_steps=True)
    return axes


def fitted_rates(trace: Tensor) -> Tensor:
    """The factor by which a step shrinks the residual in the long run, per sample.

    The slope of a line through the logarithms of the residuals in the later half of a sample's evaluations.

    Args:
        trace: relative residuals (evaluations, *batch), NaN where a sample had ended.

    Returns:
        The factors, batch; NaN where fewer than three residuals are there to fit.
    """
    log = trace.double().log()
    log = torch.where(log.isfinite(), log, torch.nan)
    step = torch.arange(len(trace), dtype=log.dtype, device=log.device).reshape(-1, *(1,) * (log.dim() - 1))
    last = torch.where(log.isnan(), -1.0, step).amax(dim=0)
    used = ~log.isnan() & (step >= (last / 2).floor())
    count = used.sum(dim=0)

    def mean(values: Tensor) -> Tensor:
        return torch.where(used, values, 0.0).sum(dim=0) / count

    x, y = step - mean(step), log - mean(log)
    rates = (mean(x * y) / mean(x * x)).exp()
    return torch.where(count >= 3, rates, torch.nan)


def history(source: Any, layers: Sequence[str] | None = None, figure: Figure | None = None) -> Figure:
    """Steps, residuals, failures and, where they were measured, adjoint and spectral radius over a training.

    Args:
        source: a `deqkit.Monitor`, its ``history``, or the path of the CSV file that it wrote.
        layers: names of the layers to show; None shows all.
        figure: where to draw; None makes one.

    Returns:
        The figure.

    Raises:
        ValueError: there is nothing to show, or a layer is unknown.
        ImportError: matplotlib is not installed.
    """
    series = _series(_rows(source))
    if not series:
        raise ValueError("no figures to plot: the Monitor has not been flushed yet")
    for name in layers or ():
        if name not in series:
            raise ValueError(f"unknown layer {name!r}: choose from {list(series)}")
    series = {name: series[name] for name in layers or series}
    panels = [panel for panel in _PANELS if any(key in figures for figures in series.values() for key in panel[1])]
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = figure or _figure(4.8 * columns, 2.9 * rows + 0.4)
    all_axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axes, (title, keys) in zip(all_axes, panels, strict=False):
        _draw_panel(axes, title, keys, series)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    if len(series) == 1:
        figure.suptitle(next(iter(series)), fontsize=11)
    else:
        handles = [_line(color=_layer_colour(i), linewidth=3, label=name) for i, name in enumerate(series)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    return figure


def eigenvalues(values: Any, ax: Axes | None = None) -> Axes:
    """Eigenvalues of df/dx in the complex plane, beside the unit circle.

    A plain iteration converges where all lie inside. No solver likes those near 1 (the cross), where I - df/dx is
    singular.

    Args:
        values: the eigenvalues, real or complex; a tensor, an array or a sequence of any shape.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: no value, or one that is not finite.
        ImportError: matplotlib is not installed.
    """
    points = torch.as_tensor(values).detach().cpu().to(torch.complex128).reshape(-1)
    if not len(points) or not points.isfinite().all():
        raise ValueError(f"eigenvalues must be finite and at least one, got {points.tolist()[:5]}")
    axes = _axes(ax, width=5.2, height=5.2)
    angle = torch.linspace(0, 2 * math.pi, 361)
    axes.plot(angle.cos().numpy(), angle.sin().numpy(), color=_GREY, linewidth=1.2, linestyle="--")
    axes.plot([1], [0], marker="+", color=_GREY, markersize=11, linestyle="")
    outside = points.abs() >= 1
    size = 26 if len(points) <= 200 else 9
    for colour, mine, word in ((_BLUE, ~outside, "inside"), (_ORANGE, outside, "on or outside")):
        if mine.any():
            chosen = points[mine]
            label = f"{len(chosen)} {word} the unit circle"
            axes.scatter(
                chosen.real, chosen.imag, s=size, color=colour, alpha=0.75, linewidths=0, label=label, zorder=3
            )
    axes.set_title(f"spectral radius {points.abs().max().item():.3g}", fontsize=10)
    axes.set_aspect("equal", adjustable="datalim")
    _label(axes, "real part", "imaginary part")
    return axes


# ---------------------------------------------------------------------------------------------------------------------
# samples of one solve


def _trace(solution: Solution) -> tuple[Tensor, Tensor]:
    """Trace (evaluations, B) and status (B,), on the CPU."""
    if solution.trace is None:
        raise ValueError("the solution has no trace: solve with trace=True")
    if solution.status.numel() == 0:
        raise ValueError("the solution has no sample: there is nothing to plot")
    trace = solution.trace.detach().double().cpu()
    return trace.reshape(len(trace), -1), solution.status.cpu().reshape(-1)


def _smallest_positive(values: Tensor) -> Tensor:
    return values[values > 0].min() if bool((values > 0).any()) else torch.tensor(torch.inf, dtype=values.dtype)


def _by_status(status: Tensor) -> Iterator[tuple[Status, Tensor]]:
    """Each status that occurs and its samples, failures last so that they are drawn on top."""
    for code in Status:
        mine = status == code
        if bool(mine.any()):
            yield code, mine


def _draw_samples(axes: Axes, values: Tensor, code: Status, first_step: int = 0, carry_on: bool = True) -> None:
    """Values (steps, samples) of the samples that ended alike; ``carry_on`` extends each one's last value in a band."""
    colour, count = _STATUS_COLOURS[code], values.shape[1]
    values = torch.where(values.isfinite(), values, torch.nan)
    steps = list(range(first_step, first_step + len(values)))
    label = f"{code.name}: {count} sample{'s' if count > 1 else ''}"
    if count <= _MAX_LINES:
        marker = "o" if code == Status.CONVERGED else "x"
        for i, column in enumerate(values.T):
            ends = [int(column.isfinite().nonzero()[-1])] if bool(column.isfinite().any()) else []
            axes.plot(
                steps, column.numpy(), color=colour, linewidth=1.2, alpha=0.85, marker=marker, markersize=5,
                markevery=ends, label=label if i == 0 else None,
            )  # fmt: skip
        return
    if carry_on:
        values = _carried_on(values)
    low, q1, median, q3, high = values.nanquantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).to(values), dim=1)
    axes.fill_between(steps, low.numpy(), high.numpy(), color=colour, alpha=0.15, linewidth=0)
    axes.fill_between(steps, q1.numpy(), q3.numpy(), color=colour, alpha=0.25, linewidth=0)
    axes.plot(steps, median.numpy(), color=colour, linewidth=1.8, label=f"{label}, median")
    bands = "middle 50 % and 90 % of the samples"
    if bands not in axes.get_legend_handles_labels()[1]:
        axes.fill_between([], [], color=_GREY, alpha=0.4, linewidth=0, label=bands)


def _carried_on(values: Tensor) -> Tensor:
    """Each column with its last number in place of the NaN after it."""
    row = torch.arange(len(values)).unsqueeze(1)
    latest = torch.where(values.isnan(), -1, row).cummax(dim=0).values
    return torch.where(latest < 0, torch.nan, values.gather(0, latest.clamp(min=0)))


# ---------------------------------------------------------------------------------------------------------------------
# figures over a training

_PANELS: list[tuple[str, dict[str, str]]] = [  # title, and the line style of each figure in it
    ("solver steps: mean, most (dotted)", {"steps_mean": "-", "steps_max": ":"}),
    ("relative residual: median, worst (dotted)", {"relative_residual_median": "-", "relative_residual_worst": ":"}),
    ("failed samples, %: solve, adjoint (dashed)", {"failed": "-", "adjoint_failed": "--"}),
    ("adjoint steps: mean, most (dotted)", {"adjoint_steps_mean": "-", "adjoint_steps_max": ":"}),
    ("spectral radius: mean, largest (dotted)", {"spectral_radius_mean": "-", "spectral_radius_max": ":"}),
]


def _rows(source: Any) -> list[Mapping[str, Any]]:
    """One mapping per flush: "step", and figures by "layer/figure"."""
    if isinstance(source, str | os.PathLike):
        with open(source, newline="") as file:
            lines = [line for line in file if line.endswith("\n")]  # the last one may still be on its way
        return [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(lines)]
    return list(getattr(source, "history", source))


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """By layer and figure: steps and values."""
    series: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in rows:
        for key, value in row.items():
            layer, slash, name = key.rpartition("/")
            if slash:
                steps, values = series.setdefault(layer, {}).setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(float(value) if math.isfinite(value) else math.nan)
    return series


def _draw_panel(
    axes: Axes, title: str, keys: Mapping[str, str], series: Mapping[str, Mapping[str, tuple[list[float], list[float]]]]
) -> None:
    for i, figures in enumerate(series.values()):
        for key, style in keys.items():
            if key in figures:
                steps, values = figures[key]
                scaled = [100 * v for v in values] if key.endswith("failed") else values
                marker = "." if len(steps) < 30 and style == "-" else ""
                axes.plot(steps, scaled, color=_layer_colour(i), linestyle=style, linewidth=1.3, marker=marker)
    if "residual" in title:
        axes.set_yscale("log")
        low, high = axes.get_ylim()  # whole decades, as the ticks of a flat curve say nothing otherwise
        axes.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))
    elif "radius" in title:
        axes.axhline(1.0, color=_GREY, linestyle="--", linewidth=1.0)
    else:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.0))
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelbottom=True)
    _label(axes, "training step", "")


def _layer_colour(i: int) -> str:
    return _LAYER_COLOURS[i % len(_LAYER_COLOURS)]


# ---------------------------------------------------------------------------------------------------------------------
# matplotlib


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("deqkit.plots needs matplotlib: pip install 'deqkit[diagnostics]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _axes(ax: Axes | None, width: float = 6.4, height: float = 4.2) -> Axes:
    return _figure(width, height).add_subplot() if ax is None else ax


def _line(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _label(axes: Axes, xlabel: str, ylabel: str, whole_steps: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if whole_steps:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:  # below the labels, where it hides nothing
        below = axes.transAxes + ScaledTranslation(0, -34 / 72, axes.figure.dpi_scale_trans)
        axes.legend(
            fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below,
            borderaxespad=0,
        )  # fmt: skip
