"""Broyden's line search: which steps it takes back, what they teach, and what it is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deqkit
from deqkit import Status, stages
from deqkit.norms import l2
from deqkit.solvers.line_search import _WINDOW
from deqkit.state import Evaluator, StateLayout
from deqkit.termination import Termination


def fading(n: int) -> tuple[Any, Tensor]:
    """M arctan(x) = 0, whose derivative fades away from the root, and 200 starting points some 7 away."""
    g = torch.Generator().manual_seed(0)
    m = 3 * torch.eye(n, dtype=torch.float64) + 0.5 * torch.randn(n, n, generator=g).double() / n**0.5
    return lambda x: x - torch.atan(x) @ m.T, 7 * torch.randn(200, n, generator=g).double()


def expanding() -> tuple[Any, Tensor]:
    """A tanh layer of radius 3, and its biases; without a matrix product, whose rounding depends on the batch."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 8, generator=g).double(), torch.randn(6, 8, generator=g).double()
    a = 3 * a / torch.linalg.eigvals(a).abs().max()
    return lambda x, b: torch.tanh((a * x.unsqueeze(1)).sum(2) + b), b


@pytest.mark.parametrize("n", [1, 4, 8])
def test_it_rescues_what_whole_steps_overshoot(n: int) -> None:
    """Measured, of 200 starting points: 120, 137 and 174 without it, 200, 186 and 190 with up to four tries."""
    f, x0 = fading(n)
    failures, num_steps = {}, {}
    for tries in (0, 4):
        solver = deqkit.Broyden(line_search=tries)
        sol = deqkit.solve(f, x0, solver=solver, rtol=0, atol=1e-8, max_steps=200, on_failure="ignore")
        # Beyond 1e16 the equation is lost in rounding, and every point a fixed point of f.
        at_root = (sol.value.abs() < 1e-6).all(dim=1)
        failures[tries], num_steps[tries] = int((~at_root).sum()), int(sol.num_steps.sum())
    assert failures[4] < 0.5 * failures[0] and num_steps[4] < 1.1 * num_steps[0]


def replay(visited: list[tuple[Tensor, float]], tries: int, residual: Any) -> tuple[Tensor, int, int]:
    """Check every point of one sample against the rule spelled out, with a dense inverse of all secants from the bases.

    Returns:
        The inverse after the last point, and how many steps were taken back and shortened.
    """
    base, size = visited[0]
    window, in_a_row, num_taken_back, num_shortened = [size] * _WINDOW, 0, 0, 0
    inverse = -torch.eye(len(base), dtype=torch.float64)
    for k, (x, size) in enumerate(visited[1:], start=1):
        dx, dr = x - base, residual(x) - residual(base)
        inverse = inverse + torch.outer(dx - inverse @ dr, dx @ inverse) / (dx @ inverse @ dr)
        if size > max(window) and in_a_row < tries:
            in_a_row, num_taken_back = in_a_row + 1, num_taken_back + 1
            step = -inverse @ residual(base)
            shorter = min(1.0, float(dx.norm() / step.norm()) / 2)
            step, num_shortened = step * shorter, num_shortened + (shorter < 1)
        else:
            base, in_a_row, window = x, 0, [*window[1:], size]
            step = -inverse @ residual(base)
        if k + 1 < len(visited):
            torch.testing.assert_close(visited[k + 1][0], base + step, rtol=1e-5, atol=1e-7)
    return inverse, num_taken_back, num_shortened


@pytest.mark.parametrize("tries", [1, 4])
def test_which_steps_are_taken_back_and_what_they_teach(tries: int) -> None:
    f, starts = fading(2)
    solver = deqkit.Broyden(restart_factor=1e30, line_search=tries)
    g = torch.tensor([[-1.0, 0.5]], dtype=torch.float64)
    num_taken_back = num_shortened = 0
    for x0 in starts[:20].split(1):
        visited: list[tuple[Tensor, float]] = []
        see = lambda info, to=visited: to.append((info.value[0].clone(), float(info.residual)))  # noqa: E731
        settings: dict[str, Any] = {"max_steps": 20, "norm": l2, "callback": see, "record": True}
        result = stages.run(Evaluator(f, StateLayout(x0, 1)), (x0,), solver, Termination(0.0, 1e-8), **settings)
        if result.x[0].abs().max() > 1e-6:
            continue
        inverse, taken_back, shortened = replay(visited, tries, lambda x: f(x.unsqueeze(0))[0] - x)
        num_taken_back, num_shortened = num_taken_back + taken_back, num_shortened + shortened
        (found,) = result.record.transposed((g,))
        torch.testing.assert_close(found, g @ inverse, rtol=1e-4, atol=1e-5)
    assert num_taken_back > 5 and num_shortened > 1


def test_alone_and_in_a_batch() -> None:
    f, b = expanding()
    run = lambda b: deqkit.solve(  # noqa: E731
        f, 0 * b, args=(b,), solver=deqkit.Broyden(line_search=2), rtol=1e-7, max_steps=100, on_failure="ignore"
    )
    together = run(b)
    assert len(set(together.num_steps.tolist())) > 2
    for i in range(len(b)):
        alone = run(b[i : i + 1])
        assert alone.num_steps[0] == together.num_steps[i] and alone.status[0] == together.status[i]
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-5, atol=1e-6)


def test_a_bad_sample_costs_its_neighbours_nothing() -> None:
    f, b = expanding()
    settings: dict[str, Any] = {"solver": deqkit.Broyden(line_search=2), "rtol": 1e-7, "max_steps": 100}
    spoil = torch.zeros(6, 1, dtype=torch.float64)
    clean = deqkit.solve(f, 0 * b, args=(b,), on_failure="ignore", **settings)
    spoil[1] = torch.nan
    sol = deqkit.solve(f, 0 * b, args=(b + spoil,), on_failure="ignore", **settings)
    others = [0, 2, 3, 4, 5]
    assert sol.status[1] == Status.NONFINITE
    assert torch.equal(sol.num_steps[others], clean.num_steps[others])
    torch.testing.assert_close(sol.value[others], clean.value[others], rtol=1e-6, atol=1e-7)


def test_complex_states_pytrees_and_fixed_steps() -> None:
    """Where every look is a tensor's, and of a map whose derivative fades in both leaves."""
    f = lambda s: {"z": s["z"] - 3j * s["z"] / (1 + s["z"].abs() ** 2), "x": s["x"] - 3 * torch.atan(s["x"])}  # noqa: E731
    x0 = {"z": torch.tensor([[3 + 1j]], dtype=torch.complex128), "x": torch.tensor([[10.0]], dtype=torch.float64)}
    for settings in ({"rtol": 0.0, "atol": 1e-8}, {"rtol": 0.0, "atol": 0.0}):
        solver = deqkit.Broyden(line_search=4, check_every=3)
        sol = deqkit.solve(f, x0, solver=solver, max_steps=60, on_failure="ignore", **settings)
        residual = f(sol.value)["x"] - sol.value["x"], f(sol.value)["z"] - sol.value["z"]
        assert sol.residual.item() == pytest.approx(
            sum(float(r.abs() ** 2) for r in residual) ** 0.5, rel=1e-6, abs=1e-12
        )
        assert sol.residual.item() < 1e-6


def test_it_is_off_unless_asked_for() -> None:
    """It costs calls on other problems: 130 in the place of 106 on a symmetric linear one of radius 0.99."""
    assert deqkit.Broyden().line_search == 0
