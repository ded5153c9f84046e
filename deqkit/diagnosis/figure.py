"""L6. A diagnosis as one figure; matplotlib is imported here only, and pyplot never."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deqkit import plots
from deqkit.diagnosis.records import AdjointTrial, Diagnosis, SolverTrial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette, as in `deqkit.plots`, with grey at its end.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_STYLES = ("-", "--", ":", "-.")
_GREY = "0.45"
_FLOOR = 1e-16  # of a logarithmic axis: an exact zero is shown there
_FEW = 12  # samples, up to which each has a bar of its own
_BINS = 30


def draw(d: Diagnosis) -> Figure:
    """Residuals, eigenvalues, gradient errors and steps per sample, as far as they are known.

    Raises:
        ImportError: matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Diagnosis.plot() needs matplotlib: pip install 'deqkit[diagnostics]'") from error
    panels = _panels(d)
    columns = 2 if len(panels) == 4 else max(1, len(panels))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(5.2 * columns + 0.4, 4.0 * rows + 1.4), layout="constrained")
    width = 66 * columns
    words = [f"{d.subject}: {d.state}", *[text for text in (*d.recommendations[:3], *d.notes)]]
    figure.suptitle("\n".join(textwrap.shorten(line, width, placeholder=" ...") for line in words), fontsize=10)
    if panels:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            panel(axes, d)
    return figure


def _panels(d: Diagnosis) -> list[Callable[[Any, Diagnosis], None]]:
    """Those for which there is something to show."""
    panels: list[Callable[[Any, Diagnosis], None]] = []
    if any(t.trace is not None for t in d.solvers):
        panels += [_draw_residuals, _draw_samples]
    values = None if d.spectrum is None else d.spectrum.eigenvalues
    if values is not None and len(values) and bool(values.isfinite().all()):
        panels.append(_draw_eigenvalues)
    if any(t.relative_error is not None for t in d.adjoints):
        panels.append(_draw_gradients)
    return panels


def _draw_residuals(axes: Any, d: Diagnosis) -> None:
    """The best residual so far against calls of f: the median sample, and the worst as a thin line."""
    axes.set_title("best residual so far: median sample; worst (thin line)", fontsize=10)
    shown = [t for t in (*d.solvers, *d.variations) if t.trace is not None and t.trace.numel()]
    for i, trial in enumerate(shown):
        median, worst = _progress(trial)
        calls = range(1, len(median) + 1)
        # The first on top: what comes later may be the same solver with a sequel.
        style = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _STYLES[i % len(_STYLES)], "zorder": 20 - i}
        label = f"{trial.name} ({trial.num_converged}/{trial.converged.numel()})"
        axes.plot(calls, median, linewidth=1.9, label=label, **style)
        axes.plot(calls, worst, linewidth=0.8, alpha=0.7, **style)
        axes.plot(calls[-1:], median[-1:], marker="o" if trial.all_converged else "x", color=style["color"], zorder=21)
    axes.axhline(d.rtol, color=_GREY, linewidth=1, linestyle=(0, (1, 1)), label=f"rtol = {d.rtol:g}")
    axes.set_yscale("log")
    axes.set_xlabel("calls of f")
    axes.set_ylabel("|f(x) - x| / |f(x)|")
    axes.grid(True, color="0.9", linewidth=0.6)
    _legend_below(axes)


def _progress(trial: SolverTrial) -> tuple[list[float], list[float]]:
    """Median and worst over the samples of the smallest residual so far, after every call."""
    assert trial.trace is not None
    trace = trial.trace.reshape(len(trial.trace), -1).double()
    best = torch.where(trace.isnan(), torch.inf, trace).cummin(dim=0).values.clamp(min=_FLOOR)
    best = torch.where(best.isinf(), torch.nan, best)
    worst = best.nan_to_num(nan=-1.0).amax(dim=1)
    return best.nanmedian(dim=1).values.tolist(), torch.where(worst < 0, torch.nan, worst).tolist()


def _draw_eigenvalues(axes: Any, d: Diagnosis) -> None:
    assert d.spectrum is not None and d.spectrum.eigenvalues is not None
    values = d.spectrum.eigenvalues
    plots.eigenvalues(values, ax=axes)
    of = "the batch as one system" if d.spectrum.one_system else f"sample {d.spectrum.worst}, the worst"
    axes.set_title(f"{len(values)} eigenvalues of df/dx, {of}; radius {float(values.abs().max()):.3g}", fontsize=10)


def _draw_gradients(axes: Any, d: Diagnosis) -> None:
    """The relative error of every adjoint's gradient, with its cosine written beside."""
    axes.set_title("gradient error of each adjoint, and cosine to the exact one", fontsize=10)
    known = [
        (t, t.relative_error, t.cosine) for t in d.adjoints if t.relative_error is not None and t.cosine is not None
    ]
    errors = [max(error, _FLOOR) if math.isfinite(error) else math.nan for _, error, _ in known]
    bars = axes.barh([t.name for t, _, _ in known], errors, color=_COLOURS[0], alpha=0.8, height=0.6)
    axes.bar_label(bars, [_beside(t, cosine) for t, _, cosine in known], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    finite = [math.log10(error) for error in errors if math.isfinite(error)] or [0.0]
    low, high = math.floor(min(finite)) - 0.5, max(finite)
    axes.set_xlim(10.0**low, 10.0 ** (high + 0.3 * (high - low)))  # room for what is written beside the bars
    axes.set_xlabel("|gradient - exact| / |exact|")
    axes.grid(True, axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _beside(trial: AdjointTrial, cosine: float) -> str:
    return f"{cosine:.3f}" + (f", {trial.num_products} products" if trial.num_products is not None else "")


def _draw_samples(axes: Any, d: Diagnosis) -> None:
    """Steps per sample of the best solver, or, if none converged on any sample, the residuals that it left."""
    ended = [t for t in d.solvers if t.relative_residual is not None and t.num_steps is not None]
    trial = d.best or min(ended, key=_left)
    assert trial.num_steps is not None and trial.relative_residual is not None
    converged = trial.converged.reshape(-1)
    if d.best is None:
        values, what = trial.relative_residual.reshape(-1).double().clamp(min=_FLOOR), "relative residual"
        converged = converged & False
    else:
        values, what = trial.num_steps.reshape(-1).double(), "solver step"
    state = f"{int(converged.sum())} of {len(converged)} converged"
    axes.set_title(f"{what}s per sample, {trial.name}: {state}", fontsize=10)
    groups = [(converged, "converged", _COLOURS[0]), (~converged, "not converged", _COLOURS[1])]
    groups = [(mine & values.isfinite(), label, colour) for mine, label, colour in groups if bool(mine.any())]
    if len(values) <= _FEW:
        for mine, label, colour in groups:
            style = {"color": colour, "alpha": 0.8, "label": label}
            if d.best is None:
                axes.plot(_where(mine), values[mine].tolist(), marker="x", linestyle="", **style)
            else:
                axes.bar(_where(mine), values[mine].tolist(), width=0.6, **style)
        axes.set_xticks(range(len(values)))
        axes.set_xlim(-0.8, len(values) - 0.2)
        axes.set_xlabel("sample")
        axes.set_ylabel(f"{what}s")
    else:
        _draw_histogram(axes, values, groups, logarithmic=d.best is None)
        axes.set_xlabel(f"{what}s")
        axes.set_ylabel("samples")
    if d.best is None:
        (axes.set_yscale if len(values) <= _FEW else axes.set_xscale)("log")
        (axes.axhline if len(values) <= _FEW else axes.axvline)(d.rtol, color=_GREY, linewidth=1, label="rtol")
    axes.grid(True, axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(groups) > 1 or d.best is None:
        _legend_below(axes)


def _draw_histogram(axes: Any, values: Tensor, groups: list[tuple[Tensor, str, str]], *, logarithmic: bool) -> None:
    finite = values[values.isfinite()]
    if logarithmic:
        low, high = (finite.min().log10(), finite.max().log10()) if len(finite) else (-1.0, 0.0)
        edges = (10 ** torch.linspace(float(low) - 0.01, float(high) + 0.01, _BINS + 1, dtype=torch.float64)).tolist()
    else:
        low, high = int(finite.min()), int(finite.max())
        width = math.ceil((high - low + 1) / _BINS)
        edges = [low - 0.5 + width * i for i in range((high - low) // width + 2)]
    axes.hist(
        [values[mine].tolist() for mine, _, _ in groups], bins=edges, stacked=True, alpha=0.8,
        label=[label for _, label, _ in groups], color=[colour for _, _, colour in groups],
    )  # fmt: skip


def _legend_below(axes: Any) -> None:
    """Under the label of the x axis, where it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -34 / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below,
        borderaxespad=0,
    )  # fmt: skip


def _left(trial: SolverTrial) -> float:
    """The median residual that a solver left, over its finite samples."""
    assert trial.relative_residual is not None
    return float(trial.relative_residual.double().nan_to_num(nan=math.inf).median())


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
