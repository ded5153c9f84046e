"""The loop alone, driven by scripted solvers and residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from deqkit import Status, loop, norms
from deqkit.solvers.base import Point, Solver
from deqkit.state import Blocks, Evaluator, StateLayout
from deqkit.termination import Termination


@dataclass(frozen=True)
class Scripted(Solver):
    """Goes to the points of a script, whatever f says: script[k] is the point after step k + 1, (B, d)."""

    name: ClassVar[str] = "scripted"
    script: tuple[torch.Tensor, ...] = ()

    def start(self) -> _State:
        return _State(self.script)


class _State:
    def __init__(self, script: tuple[torch.Tensor, ...]) -> None:
        self.script, self.points = list(script), []

    def step(self, point: Point) -> Blocks:
        self.points.append(point)
        return (self.script.pop(0),)


def run(residuals: list[list[float]], *, max_steps: int | None = None, check_every: int = 1, **tolerances: float):
    """Visit points 1, 2, 3... (one number per sample) at which f has exactly the given residuals and |f(x)| = 1.

    Args:
        residuals: one row per point, one column per sample.
    """
    table = torch.tensor(residuals, dtype=torch.float64)
    points = [torch.full((table.shape[1], 1), float(k + 1), dtype=torch.float64) for k in range(len(table))]
    x0, layout = points[0], StateLayout(points[0], 1)
    f = Evaluator(lambda x: x, layout)

    def norm(r: Blocks, fx: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        index = (fx[0][:, 0] - 1).long()
        return table[index, torch.arange(table.shape[1])].unsqueeze(0), torch.ones_like(table[:1])

    termination = Termination(**({"rtol": 1e-2} | tolerances))
    steps = len(table) - 1 if max_steps is None else max_steps
    solver = Scripted(tuple(points[1:]), check_every=check_every)
    return f, loop.run(f, (x0,), solver, termination, max_steps=steps, norm=norm, trace=True)


def test_stops_at_the_first_point_within_tolerance() -> None:
    f, result = run([[1.0], [0.5], [0.009], [0.001]])
    assert (f.num_calls, result.num_steps.item(), result.status.item()) == (3, 2, Status.CONVERGED)
    assert result.x[0].item() == 3.0 and result.residual.item() == 0.009


@pytest.mark.parametrize("check_every", [1, 2, 3, 7])
def test_samples_end_each_at_their_own_step(check_every: int) -> None:
    table = [[1.0, 1.0, float("nan")], [0.5, 0.005, 7.0], [0.2, 7.0, 7.0], [0.001, 7.0, 7.0], [9.0, 9.0, 9.0]]
    f, result = run(table, check_every=check_every)
    assert result.num_steps.tolist() == [3, 1, 0]
    assert result.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    assert result.x[0].flatten().tolist() == [4.0, 2.0, 1.0]
    assert result.residual[:2].tolist() == [0.001, 0.005] and result.residual[2].isnan()
    assert f.num_calls == {1: 4, 2: 5, 3: 4, 7: 5}[check_every]


def test_best_point_is_kept_when_later_ones_are_worse() -> None:
    _, result = run([[1.0, 0.1], [0.3, 0.4], [0.6, 0.2]])
    assert result.x[0].flatten().tolist() == [2.0, 1.0]
    assert result.residual.tolist() == [0.3, 0.1]
    assert result.status.tolist() == [Status.MAX_STEPS] * 2 and result.num_steps.tolist() == [2, 2]


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize(("edge", "steps"), [(1.0, 4), (0.3, 6), (0.01, 5)])
def test_a_step_out_of_the_domain_is_taken_back(edge: float, steps: int, check_every: int) -> None:
    """f(x) = 1 up to an edge. The solver jumps to 5, 4, ..., whatever it is shown; instead: 1/2, 1/4, 1/8, 1/16."""
    layout = StateLayout(torch.zeros(1, 1), 1)
    seen: list[float] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.item())
        return torch.where(x <= edge, torch.ones_like(x), torch.nan)

    solver = Scripted(
        tuple(torch.full((1, 1), float(p)) for p in (5, 4, 0.25, 0.2, 0.1, 0.05)), check_every=check_every
    )
    evaluator = Evaluator(f, layout)
    result = loop.run(
        evaluator, layout.pack(torch.zeros(1, 1)), solver, Termination(1e-9), max_steps=steps, norm=norms.l2
    )
    if edge == 1.0:
        assert seen[:3] == [0.0, 5.0, 0.5] and result.status.item() == Status.MAX_STEPS
    elif edge == 0.3:
        assert seen[:4] == [0.0, 5.0, 0.5, 0.25] and result.status.item() == Status.MAX_STEPS
    else:
        assert seen[:6] == [0.0, 5.0, 0.5, 0.25, 0.125, 0.0625] and result.status.item() == Status.NONFINITE
        assert result.x[0].item() == 0.0 and result.num_steps.item() == 5
    assert result.residual.isfinite().all()


def test_divergence_is_measured_from_the_start() -> None:
    _, result = run([[1.0, 1e-6], [3.0, 1.0], [50.0, 1.0], [300.0, 2.0]], rtol=1e-9, divergence_factor=100)
    assert result.status.tolist() == [Status.DIVERGED, Status.MAX_STEPS] and result.num_steps.tolist() == [3, 3]
    assert result.x[0].flatten().tolist() == [1.0, 1.0]


def test_stagnation_counts_steps_without_progress_per_sample() -> None:
    falling = [0.9**k for k in range(12)]
    flat = [1.0, 0.5] + [0.5] * 10
    late = [1.0, 0.5, 0.5, 0.5, 0.3] + [0.3] * 7
    _, result = run([list(row) for row in zip(falling, flat, late, strict=True)], patience=4, rtol=1e-6)
    assert result.status.tolist() == [Status.MAX_STEPS, Status.STAGNATED, Status.STAGNATED]
    assert result.num_steps.tolist() == [11, 5, 8]


def test_fixed_steps_stop_only_what_is_no_longer_finite() -> None:
    table = [[1.0, 1.0, 1e9], [1e-9, float("inf"), 1e-9], [1e-8, 1.0, 1e19], [2e-9, 1.0, 1.0]]
    _, result = run(table, rtol=0.0)
    assert result.num_steps.tolist() == [3, 1, 3]
    assert result.status.tolist() == [Status.MAX_STEPS, Status.NONFINITE, Status.MAX_STEPS]
    assert result.residual.tolist() == [1e-9, 1.0, 1e-9]


def test_converging_wins_over_every_other_reason() -> None:
    _, result = run([[1.0], [1.0], [1.0], [0.001]], patience=3)
    assert result.status.item() == Status.CONVERGED


def test_no_steps() -> None:
    f, result = run([[1.0]], max_steps=0)
    assert f.num_calls == 1 and result.num_steps.item() == 0 and result.status.item() == Status.MAX_STEPS


def test_trace() -> None:
    _, result = run([[1.0, 1.0], [0.001, 0.5], [7.0, 0.25]])
    assert result.trace is not None
    assert result.trace[:, 1].tolist() == [1.0, 0.5, 0.25]
    assert result.trace[:2, 0].tolist() == [1.0, 0.001] and result.trace[2, 0].isnan()


def test_leaf_max_cannot_be_fooled_by_nan() -> None:
    r = (torch.tensor([[1.0]]), torch.tensor([[float("nan")]]))
    measured = norms.leaf_max(r, (torch.ones(1, 1), torch.ones(1, 1)))
    residual, _, distance = Termination(1e-3).measure(*measured)
    assert np.isnan(residual).all() and np.isnan(distance).all()
