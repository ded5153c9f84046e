"""The pictures: what is drawn is what was measured, and a large batch stays readable."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import deqkit
from deqkit import Status, plots

BLUE, AMBER = "#0072b2", "#e69f00"


def solve(gains: torch.Tensor, max_steps: int = 200, **settings: Any) -> deqkit.Solution:
    """One scalar sample x <- gain x + 1 per gain, by plain iteration."""
    gains = gains.double().unsqueeze(1)
    settings = {"solver": "fixed_point", "trace": True, "on_failure": "ignore", "max_steps": max_steps} | settings
    return deqkit.solve(lambda x: gains * x + 1, torch.zeros_like(gains), **settings)


def pixels(figure: Figure) -> np.ndarray:
    """The figure as it is saved: whatever cannot be drawn raises here."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=60)
    file.seek(0)
    return matplotlib.image.imread(file)


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curves(axes: Axes, colour: str) -> list[np.ndarray]:
    found = [line for line in axes.get_lines() if to_hex(line.get_color()) == colour]
    return [np.asarray(line.get_ydata(), dtype=float) for line in found]


def test_each_sample_is_a_line_of_its_trace() -> None:
    sol = solve(torch.tensor([0.2, 0.5, 0.97]), max_steps=30)
    axes = plots.residuals(sol)
    assert axes.get_yscale() == "log" and axes.figure.axes == [axes]
    trace = sol.trace.numpy()
    drawn = [*curves(axes, BLUE), *curves(axes, AMBER)]
    for i, line in enumerate(drawn):
        np.testing.assert_allclose(line, trace[:, i])
    assert len(drawn) == 3
    assert labels(axes) == ["CONVERGED: 2 samples", "MAX_STEPS: 1 sample", "rtol = 0.0001"]
    assert pixels(axes.figure).shape[0] > 100


def test_the_end_of_a_sample_is_marked() -> None:
    sol = solve(torch.tensor([0.2, 0.9]))
    first, second = (line for line in plots.residuals(sol).get_lines()[:2])
    assert first.get_markevery() == [int(sol.num_steps[0])] and second.get_markevery() == [int(sol.num_steps[1])]


def test_the_tolerance_is_a_line_where_there_is_one() -> None:
    def heights(**settings: Any) -> list[float]:
        axes = plots.residuals(solve(torch.tensor([0.5]), 20, **settings))
        return [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"]

    assert heights(rtol=1e-3) == [1e-3] and heights(rtol=0.0) == []


def test_a_large_batch_is_bands_over_all_its_samples() -> None:
    sol = solve(torch.linspace(0.1, 0.9, 256))
    axes = plots.residuals(sol)
    assert len(axes.get_lines()) == 2  # the median and the tolerance
    assert labels(axes) == ["CONVERGED: 256 samples, median", "middle 50 % and 90 % of the samples", "rtol = 0.0001"]
    (median,) = curves(axes, BLUE)
    # At the end most samples have long stopped, with a residual below the tolerance.
    np.testing.assert_allclose(median[-1], np.median(sol.relative_residual), rtol=1e-6)
    np.testing.assert_allclose(median[1], np.median(sol.trace[1]), rtol=1e-6)
    assert pixels(axes.figure).shape[0] > 100


def test_few_failures_in_a_large_batch_are_seen_one_by_one() -> None:
    axes = plots.residuals(solve(torch.cat([torch.linspace(0.1, 0.5, 253), torch.full((3,), 0.99)]), max_steps=30))
    assert len(curves(axes, AMBER)) == 3 and "MAX_STEPS: 3 samples" in labels(axes)


def test_zeros_and_infinities_can_be_drawn() -> None:
    exact = solve(torch.tensor([0.0, 0.5]), rtol=1e-6)  # the first residual after x0 is 0
    (line, _) = curves(plots.residuals(exact), BLUE)
    assert line[1] == torch.finfo(torch.float64).eps
    gain = torch.tensor([[1e200], [0.5]], dtype=torch.float64)
    wild = deqkit.solve(
        lambda x: gain * x + 1, torch.zeros(2, 1).double(), solver="fixed_point", trace=True, on_failure="ignore"
    )
    for picture in (plots.residuals(wild), plots.convergence_rate(wild)):
        assert pixels(picture.figure).shape[0] > 100


def test_batch_dims_and_dtypes() -> None:
    for batch_dims, shape in ((0, (3,)), (2, (2, 2, 3))):
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            sol = deqkit.solve(
                lambda x: 0.5 * x + 1, torch.zeros(shape, dtype=dtype), rtol=0.05, trace=True, batch_dims=batch_dims
            )
            for picture in (plots.residuals(sol), plots.convergence_rate(sol)):
                assert len(curves(picture, BLUE)) == math.prod(shape[:batch_dims])


def test_rates_are_those_of_the_iteration() -> None:
    gains = torch.tensor([0.3, 0.5, 0.9])
    sol = solve(gains, rtol=1e-8)
    torch.testing.assert_close(plots.fitted_rates(sol.trace), gains.double(), rtol=0.02, atol=0)
    axes = plots.convergence_rate(sol)
    lines = curves(axes, BLUE)
    assert [np.nanmedian(line) for line in lines] == pytest.approx(gains.tolist(), rel=0.05)
    assert "fitted rate: median 0.5, slowest 0.9" in labels(axes)


def test_rates_need_three_residuals() -> None:
    trace = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, torch.nan], [torch.nan, 0.25, torch.nan]])
    rates = plots.fitted_rates(trace)
    # Of three evaluations the later half are two, of five three.
    assert rates.isnan().all()
    assert plots.fitted_rates(0.5 ** torch.arange(5.0)[:, None]).item() == pytest.approx(0.5)
    assert plots.fitted_rates(2.0 ** torch.arange(6.0)).item() == pytest.approx(2.0)


def rows(count: int = 3) -> list[dict[str, float]]:
    figures = {
        "steps_mean": 8.0,
        "steps_max": 11.0,
        "relative_residual_median": 5e-5,
        "relative_residual_worst": math.inf,
        "failed": 0.25,
        "adjoint_steps_mean": 6.0,
    }
    named = {f"{layer}/{name}": value for layer in ("encoder.deq", "head") for name, value in figures.items()}
    return [{"step": 50 * (k + 1), **named} for k in range(count)]


def test_history() -> None:
    figure = plots.history(rows())
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title().split(":")[0] for axes in shown] == [
        "solver steps",
        "relative residual",
        "failed samples, %",
        "adjoint steps",
    ]
    steps, _, failed, _ = shown
    assert [list(line.get_ydata()) for line in steps.get_lines()] == [[8.0] * 3, [11.0] * 3] * 2
    assert list(steps.get_lines()[0].get_xdata()) == [50, 100, 150]
    assert list(failed.get_lines()[0].get_ydata()) == [25.0] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["encoder.deq", "head"]
    assert pixels(figure).shape[0] > 100


def test_history_of_one_layer_from_a_file_with_gaps(tmp_path: Path) -> None:
    entries = rows()
    entries[1] |= {"head/spectral_radius_mean": 0.7}
    path = tmp_path / "solver.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *sorted({key for row in entries for key in row} - {"step"})])
        writer.writeheader()
        writer.writerows(entries)
    figure = plots.history(path, ["head"])
    *_, radius = (axes for axes in figure.axes if axes.get_visible())
    assert radius.get_title().startswith("spectral radius")
    assert list(radius.get_lines()[0].get_xdata()) == [100] and list(radius.get_lines()[0].get_ydata()) == [0.7]
    assert figure.get_suptitle() == "head"


def test_history_refuses_what_it_cannot_show() -> None:
    with pytest.raises(ValueError, match="no figures to plot"):
        plots.history([])
    with pytest.raises(ValueError, match=r"unknown layer 'neck': choose from \['encoder.deq', 'head'\]"):
        plots.history(rows(), ["neck"])


def test_eigenvalues() -> None:
    values = torch.tensor([0.5, 1.2j, 0.3 + 0.4j, 0.3 - 0.4j])
    for given in (values, values.numpy(), values.tolist(), values.reshape(2, 2)):
        axes = plots.eigenvalues(given)
        assert labels(axes) == ["3 inside the unit circle", "1 on or outside the unit circle"]
        assert axes.get_title() == "spectral radius 1.2"
    inside, outside = (np.asarray(c.get_offsets()) for c in axes.collections)
    assert sorted(map(tuple, inside.round(6))) == [(0.3, -0.4), (0.3, 0.4), (0.5, 0.0)]
    np.testing.assert_allclose(outside, [[0.0, 1.2]], rtol=1e-6)
    assert pixels(axes.figure).shape[0] > 100
    for wrong in ([], [math.nan]):
        with pytest.raises(ValueError, match="eigenvalues must be finite and at least one"):
            plots.eigenvalues(wrong)


def test_all_draw_where_they_are_told() -> None:
    sol, figure = solve(torch.tensor([0.5])), Figure()
    left, middle, right = figure.subplots(1, 3)
    assert plots.residuals(sol, left) is left and plots.convergence_rate(sol, ax=middle) is middle
    assert plots.eigenvalues([0.5], right) is right
    other = Figure()
    assert plots.history(rows(), figure=other) is other


def test_what_cannot_be_plotted_is_refused() -> None:
    empty = deqkit.solve(lambda x: x, torch.zeros(0, 3), trace=True)
    for plot in (plots.residuals, plots.convergence_rate):
        with pytest.raises(ValueError, match="no trace: solve with trace=True"):
            plot(solve(torch.tensor([0.5]), trace=False))
        with pytest.raises(ValueError, match="no sample"):
            plot(empty)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'deqkit\[diagnostics\]'"):
        plots.eigenvalues([0.5])


def test_nothing_goes_through_pyplot() -> None:
    code = (
        "import io, sys; from deqkit import plots;"
        "plots.eigenvalues([0.5]).figure.savefig(io.BytesIO(), format='png');"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_status_has_a_colour() -> None:
    assert set(plots._STATUS_COLOURS) == set(Status) and len(set(plots._STATUS_COLOURS.values())) == len(Status)
