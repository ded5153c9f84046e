"""Published test problems F(x) = 0 as fixed-point problems f(x) = x - s F(x): no false success, and the known roots.

More, Garbow & Hillstrom, "Testing Unconstrained Optimization Software", ACM Trans. Math. Softw. 7 (1981), with their
numbers in parentheses; Bratu: e.g. Mohsen, Comput. Math. Appl. 67 (2014); H-equation: Kelley, "Solving Nonlinear
Equations with Newton's Method", SIAM 2003, ch. 5.6. The scale s is about 1 / |F'| at the starting point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy.optimize import root
from torch import Tensor

import deqkit
from deqkit.solvers import SOLVERS

RTOL, ATOL = 1e-10, 1e-12


@dataclass(frozen=True)
class Published:
    """F of one or several points (..., n), the standard starting point (n,), the scale s."""

    F: Callable[[Tensor], Tensor]
    start: Tensor
    scale: float
    root: Tensor | None = None  # where it is known in closed form

    def f(self, x: Tensor) -> Tensor:
        """The fixed-point map."""
        return x - self.scale * self.F(x)

    @property
    def x0(self) -> Tensor:
        """The standard starting point and two beside it, (3, n)."""
        noise = torch.randn(2, len(self.start), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return torch.cat([self.start.unsqueeze(0), self.start + 0.1 * noise])

    def scipy_root(self, start: Tensor) -> Any:
        """What scipy makes of one starting point."""
        return root(lambda x: self.F(torch.from_numpy(x)).numpy(), start.numpy(), tol=1e-13)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def powell_singular(x: Tensor) -> Tensor:
    """(13): the Jacobian at the root has rank 2, so that Newton's method converges but linearly."""
    a, b, c, d = x.unbind(-1)
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2], dim=-1)


def rosenbrock(x: Tensor) -> Tensor:
    """(1), the two residuals."""
    a, b = x.unbind(-1)
    return torch.stack([10 * (b - a**2), 1 - a], dim=-1)


def rosenbrock_gradient(x: Tensor) -> Tensor:
    """Of the sum of squares of `rosenbrock`: its size has a local minimum that is no root, where all give up."""
    a, b = x.unbind(-1)
    return torch.stack([-400 * a * (b - a**2) - 2 * (1 - a), 200 * (b - a**2)], dim=-1)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_{i-1} and x_{i+1}, zero beyond the ends."""
    padded = torch.nn.functional.pad(x, (1, 1))
    return padded[..., :-2], padded[..., 2:]


def grid(n: int) -> Tensor:
    """The n inner points of [0, 1]."""
    return torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]


def broyden_tridiagonal(x: Tensor) -> Tensor:
    """(30)."""
    left, right = neighbours(x)
    return (3 - 2 * x) * x - left - 2 * right + 1


def discrete_boundary_value(x: Tensor) -> Tensor:
    """(28): u'' = (u + t + 1)^3 / 2."""
    (left, right), t = neighbours(x), grid(x.shape[-1])
    return 2 * x - left - right + t[0] ** 2 * (x + t + 1) ** 3 / 2


def bratu(x: Tensor) -> Tensor:
    """u'' + exp(u) = 0 by central differences: the lower of its two solutions."""
    left, right = neighbours(x)
    return 2 * x - left - right - grid(x.shape[-1])[0] ** 2 * x.exp()


def h_equation(x: Tensor, c: float = 0.9) -> Tensor:
    """Chandrasekhar's H(m) = 1 / (1 - c/2 int m H(t) / (m + t) dt) by the midpoint rule."""
    n = x.shape[-1]
    m = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    kernel = c / (2 * n) * m.unsqueeze(1) / (m.unsqueeze(1) + m)
    return x - 1 / (1 - x @ kernel.T)


SOLVABLE = {
    "broyden_tridiagonal": Published(broyden_tridiagonal, -torch.ones(10, dtype=torch.float64), 0.18),
    "discrete_boundary_value": Published(discrete_boundary_value, grid(10) * (grid(10) - 1), 0.25),
    "bratu": Published(bratu, torch.zeros(12, dtype=torch.float64), 0.25),
    "h_equation": Published(h_equation, torch.ones(12, dtype=torch.float64), 1.0),
}
PROBLEMS = SOLVABLE | {
    "powell_singular": Published(powell_singular, numbers(3, -1, 0, 1), 0.05, root=torch.zeros(4, dtype=torch.float64)),
    "rosenbrock": Published(rosenbrock, numbers(-1.2, 1), 0.1, root=numbers(1, 1)),
    "rosenbrock_gradient": Published(rosenbrock_gradient, numbers(-1.2, 1), 1e-3, root=numbers(1, 1)),
}


@pytest.mark.parametrize("max_steps", [8, 400])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_false_success(problem: str, solver: str, max_steps: int) -> None:
    """Whatever a solver makes of a hard problem, its report is that of the point that it returns."""
    p = PROBLEMS[problem]
    sol = deqkit.solve(p.f, p.x0, solver=solver, rtol=RTOL, atol=ATOL, max_steps=max_steps, on_failure="ignore")
    assert sol.value.isfinite().all() and (sol.num_steps <= max_steps).all()
    fx = p.f(sol.value)
    residual, tolerance = (fx - sol.value).norm(dim=1), ATOL + RTOL * fx.norm(dim=1)
    # To rounding: a sample that froze early was evaluated among other neighbours.
    torch.testing.assert_close(sol.residual, residual, rtol=1e-9, atol=1e-17)
    torch.testing.assert_close(sol.relative_residual, residual / fx.norm(dim=1), rtol=1e-9, atol=1e-17)
    assert (residual[sol.converged] <= (1 + 1e-9) * tolerance[sol.converged]).all()
    assert not (residual[~sol.converged] < (1 - 1e-9) * tolerance[~sol.converged]).any()  # nor false failure
    # |x - root| <= |F'^-1| |F(x)| near a root, and |F(x)| is the residual divided by s.
    if p.root is not None and problem != "powell_singular":
        near = (sol.value[sol.converged] - p.root).norm(dim=1)
        assert (near <= 100 / p.scale * tolerance[sol.converged]).all()


@pytest.mark.parametrize("solver", ["newton_krylov", "auto"])
@pytest.mark.parametrize("problem", SOLVABLE)
def test_roots_are_found(problem: str, solver: str) -> None:
    p = SOLVABLE[problem]
    sol = deqkit.solve(p.f, p.x0, solver=solver, rtol=RTOL, atol=ATOL, max_steps=400)
    assert sol.converged.all()
    for x, start in zip(sol.value, p.x0, strict=True):
        expected = p.scipy_root(start)
        assert expected.success and abs(expected.fun).max() < 1e-12
        torch.testing.assert_close(x, torch.from_numpy(expected.x), rtol=0, atol=1e-8)  # measured: 1e-9 at most


def test_rosenbrock_is_solved_where_scipy_solves_it() -> None:
    p = PROBLEMS["rosenbrock"]
    for solver in ("anderson", "broyden", "newton_krylov", "auto"):
        sol = deqkit.solve(p.f, p.x0, solver=solver, rtol=RTOL, atol=ATOL, max_steps=400)
        for x, start in zip(sol.value, p.x0, strict=True):
            torch.testing.assert_close(x, torch.from_numpy(p.scipy_root(start).x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", ["newton_krylov", "auto"])
def test_a_singular_root_is_approached(solver: str) -> None:
    """F falls with the square of the distance in two directions: 1e-12 in F leaves about 1e-6 in x."""
    p = PROBLEMS["powell_singular"]
    sol = deqkit.solve(p.f, p.x0, solver=solver, rtol=RTOL, atol=ATOL, max_steps=400)
    assert sol.converged.all() and p.F(sol.value).abs().max() < 1e-10
    torch.testing.assert_close(sol.value, torch.zeros_like(sol.value), rtol=0, atol=1e-4)  # measured: 3e-6


def test_bratu_approaches_the_solution_in_closed_form() -> None:
    """u(t) = 2 log(cosh(q) / cosh(q (1 - 2 t))) with q = cosh(q) / sqrt(8); the error falls with the grid squared."""
    q = 0.4
    for _ in range(60):
        q = float(torch.cosh(numbers(q))) / 8**0.5
    errors = []
    for n in (7, 15):
        t = grid(n)
        p = Published(bratu, torch.zeros(n, dtype=torch.float64), 0.25)
        sol = deqkit.solve(p.f, p.x0[:1], solver="auto", rtol=RTOL, max_steps=400)
        exact = 2 * torch.log(torch.cosh(numbers(q)) / torch.cosh(q * (1 - 2 * t)))
        errors.append((sol.value[0] - exact).abs().max().item())
    assert errors[0] < 1e-3 and errors[0] / errors[1] == pytest.approx(4, rel=0.05)
