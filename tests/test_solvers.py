"""The solvers against the dense matrices that they stand for, and the memory they take (promise 5)."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from equations import linear, tanh
from torch import Tensor

import deqkit
from deqkit.solvers.base import Measured, Point, SolverState


def visit(state: SolverState, x: Tensor, fx: Tensor) -> Tensor:
    residual = (fx - x).norm(dim=1)
    measured = Measured(
        residual, residual / fx.norm(dim=1), torch.full_like(residual, torch.inf), torch.ones_like(residual, dtype=bool)
    )
    return state.step(Point((x,), (fx,), (fx - x,), measured, 100, 1e-16))[0]


def random_points(n: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Points and images of a nonlinear map, unrelated to any solver's path."""
    eq = tanh(n=n, batch=1)
    g = torch.Generator().manual_seed(1)
    points = [torch.randn(1, n, dtype=torch.float64, generator=g) for _ in range(count)]
    return [(x, eq.f(x, *eq.args)) for x in points]


def dense_broyden(points: list[tuple[Tensor, Tensor]], history: int, variant: str = "good") -> Tensor:
    """-I after the rank-one updates of the last ``history`` pairs, oldest first."""
    n = points[0][0].shape[1]
    h = -torch.eye(n, dtype=torch.float64)
    for (x0, f0), (x1, f1) in list(zip(points[:-1], points[1:], strict=True))[-history:]:
        dx, dr = (x1 - x0)[0], (f1 - x1 - f0 + x0)[0]
        left = dx @ h if variant == "good" else dr
        h = h + torch.outer(dx - h @ dr, left) / (left @ dr)
    return h


@pytest.mark.parametrize("variant", ["good", "bad"])
@pytest.mark.parametrize("history", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_broyden_is_its_dense_form(history: int, count: int, variant: Any) -> None:
    points = random_points(12, count)
    state = deqkit.Broyden(history=history, restart_factor=1e30, variant=variant).start()
    for x, fx in points:
        new = visit(state, x, fx)
    x, fx = points[-1]
    expected = x[0] - dense_broyden(points, history, variant) @ (fx - x)[0]
    torch.testing.assert_close(new[0], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("history", [1, 3, 6])
def test_broyden_satisfies_the_newest_secant_equation(history: int) -> None:
    points = random_points(12, 10)
    h = dense_broyden(points, history)
    (x0, f0), (x1, f1) = points[-2:]
    torch.testing.assert_close(h @ (f1 - x1 - f0 + x0)[0], (x1 - x0)[0])
    state = deqkit.Broyden(history=history, restart_factor=1e30).start()
    for x, fx in points:
        after_last = visit(state, x, fx)[0]
    # Where the residual is that of the point before, the same matrix must lead from x1 to where x0 would have gone.
    torch.testing.assert_close(after_last, x1[0] - h @ (f1 - x1)[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("type_", [1, 2])
@pytest.mark.parametrize("mixing", [1.0, 0.5])
@pytest.mark.parametrize("history", [1, 3, 5])
def test_anderson_is_its_dense_form(history: int, mixing: float, type_: int) -> None:
    """Type II is least squares; type I leaves a combination of residuals that is orthogonal to the steps."""
    points = random_points(12, 8)
    state = deqkit.Anderson(history=history, mixing=mixing, ridge=0.0, restart_factor=1e30, type=type_).start()
    for x, fx in points:
        new = visit(state, x, fx)
    pairs = list(zip(points[:-1], points[1:], strict=True))[-history:]
    dx = torch.stack([(b[0] - a[0])[0] for a, b in pairs], dim=1)
    dr = torch.stack([(b[1] - b[0] - a[1] + a[0])[0] for a, b in pairs], dim=1)
    x, fx = points[-1]
    r = (fx - x)[0]
    if type_ == 2:
        gamma = torch.linalg.lstsq(dr, r.unsqueeze(1)).solution[:, 0]
    else:
        gamma = torch.linalg.solve(dx.T @ dr, dx.T @ r)
    torch.testing.assert_close(new[0], x[0] + mixing * r - (dx + mixing * dr) @ gamma, rtol=1e-8, atol=1e-8)


def test_adaptive_damping_finds_its_weight_per_sample() -> None:
    """x = c x + 1: plain steps diverge for c < -1, and damped ones converge for a weight below 2 / (1 - c)."""
    c = torch.tensor([[0.5], [-1.5], [-9.0]], dtype=torch.float64)
    f = lambda x: c * x + 1  # noqa: E731
    settings = {"rtol": 1e-8, "max_steps": 200, "on_failure": "ignore"}
    plain = deqkit.solve(f, torch.zeros_like(c), solver="fixed_point", **settings)
    adaptive = deqkit.solve(f, torch.zeros_like(c), solver=deqkit.FixedPointIteration(adaptive=True), **settings)
    assert plain.converged.tolist() == [True, False, False] and adaptive.converged.all()
    torch.testing.assert_close(adaptive.value, 1 / (1 - c), rtol=1e-6, atol=0)
    # A sample that falls from the start takes plain steps throughout.
    assert torch.equal(adaptive.num_steps[0], plain.num_steps[0])
    damped = deqkit.FixedPointIteration(damping=0.9, adaptive=True)
    first = deqkit.solve(f, torch.zeros_like(c), solver=damped, keep=[1], **settings).states[1]
    torch.testing.assert_close(first, torch.full_like(c, 0.1))


def test_anderson_ends_on_a_linear_problem_in_its_dimension() -> None:
    """With full history it is GMRES in disguise: n + 1 steps at the most (Walker & Ni 2011, theorem 2.2)."""
    eq = linear(n=8, batch=3, radius=0.9)
    solver = deqkit.Anderson(history=8, ridge=0.0)
    assert deqkit.solve(eq.f, eq.x0, args=eq.args, solver=solver, rtol=1e-9).num_steps.max() <= 9


def test_broyden_ends_on_a_linear_problem_in_twice_its_dimension() -> None:
    """Gay, "Some convergence properties of Broyden's method", SIAM J. Numer. Anal. 16 (1979)."""
    eq = linear(n=6, batch=3, radius=0.9)
    solver = deqkit.Broyden(history=40, restart_factor=1e30)
    assert deqkit.solve(eq.f, eq.x0, args=eq.args, solver=solver, rtol=1e-9).num_steps.max() <= 13


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_small_residuals_are_reached_quickly(solver: str) -> None:
    """An absolute ridge would stall here."""
    eq = tanh(n=40, batch=4, radius=0.97, seed=7)
    plain = deqkit.solve(eq.f, eq.x0, args=eq.args, solver="fixed_point", rtol=1e-12, max_steps=500)
    fast = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=solver, rtol=1e-12, max_steps=500)
    assert fast.converged.all() and plain.converged.all()
    assert fast.num_fn_evals < plain.num_fn_evals / 2


@pytest.mark.parametrize("history", [1, 2, 5])
def test_bounded_broyden_memory_does_not_blow_up(history: int) -> None:
    eq = tanh(n=40, batch=4, radius=0.9, seed=3)
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=deqkit.Broyden(history=history), rtol=1e-10, max_steps=400)
    assert sol.converged.all()


@pytest.mark.parametrize("solver", [deqkit.Anderson(), deqkit.Broyden()])
def test_expanding_map(solver: deqkit.Solver) -> None:
    """Plain iteration diverges (all eigenvalues are -1.5); the others must not need it to contract."""
    b = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    sol = deqkit.solve(lambda x: -1.5 * x + b, torch.zeros(3, 10), solver=solver, rtol=1e-5)
    torch.testing.assert_close(sol.value, b / 2.5, rtol=1e-4, atol=1e-5)
    plain = deqkit.solve(lambda x: -1.5 * x + b, torch.zeros(3, 10), solver="fixed_point", on_failure="ignore")
    assert (plain.status == deqkit.Status.DIVERGED).all()


def live_numbers() -> int:
    """How many numbers the tensors alive hold, storages counted once."""
    storages = {}
    for obj in gc.get_objects():
        if type(obj) is Tensor:
            storages[obj.untyped_storage().data_ptr()] = obj.untyped_storage().nbytes() // obj.element_size()
    return sum(storages.values())


@pytest.mark.parametrize(
    "solver", [deqkit.FixedPointIteration(), deqkit.Anderson(history=4), deqkit.Broyden(history=4)]
)
def test_memory_does_not_grow_with_the_steps(solver: deqkit.Solver) -> None:
    eq = linear(n=200, batch=2, radius=0.999)
    sizes: list[int] = []
    deqkit.solve(
        eq.f, eq.x0, args=eq.args, solver=solver, rtol=0, atol=0, max_steps=25,
        callback=lambda info: sizes.append(live_numbers()),
    )  # fmt: skip
    assert sizes[10] <= max(sizes[11:]) <= sizes[10] + 2 * eq.x0.numel()


def test_history_is_allocated_as_used() -> None:
    eq = linear(n=500, batch=2, radius=0.3)
    sizes: list[int] = []
    deqkit.solve(
        eq.f, eq.x0, args=eq.args, solver=deqkit.Broyden(history=500), rtol=1e-3,
        callback=lambda info: sizes.append(live_numbers()),
    )  # fmt: skip
    assert max(sizes) - sizes[0] < 60 * eq.x0.numel() + 4 * 2 * 500 * 500
