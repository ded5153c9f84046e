"""BiCGSTAB: the method itself against SciPy's, its solutions against dense solves, and what breaks the recurrence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from equations import affine, linear, matrix, tanh
from scipy.sparse.linalg import LinearOperator, bicgstab
from torch import Tensor

import deqkit
from deqkit import Status


def solve(eq: Any, index: Any = slice(None), **settings: Any) -> deqkit.Solution:
    args = (eq.args[0], eq.args[1][index])
    return deqkit.solve(
        eq.f, eq.x0[index], args=args, **{"solver": "bicgstab", "rtol": 1e-10, "max_steps": 200} | settings
    )


def dense(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(len(a), dtype=a.dtype) - a, b.T).T


@pytest.mark.parametrize("iterations", [1, 2, 5, 8])
def test_it_is_bicgstab(iterations: int) -> None:
    """The point after k iterations, of two products each, is that of SciPy, however far from the solution."""
    n = 20
    a, b = matrix(n, 0.9, seed=0), torch.randn(1, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        sol = deqkit.solve(
            affine, torch.zeros_like(b), args=(a, b), solver="bicgstab", rtol=1e-14, max_steps=2 * iterations + 1,
            on_failure="ignore", keep=(2 * iterations + 1,),
        )  # fmt: skip
    system = np.eye(n) - a.numpy()
    x, _ = bicgstab(LinearOperator((n, n), lambda v: system @ v), b[0].numpy(), maxiter=iterations, rtol=1e-15)
    np.testing.assert_allclose(sol.states[2 * iterations + 1][0].numpy(), x, rtol=1e-8, atol=1e-10)
    assert sol.num_fn_evals == 2 * iterations + 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("radius", [0.3, 0.9, 0.99, 1.5])
def test_against_dense_solves(radius: float, symmetric: bool) -> None:
    eq = linear(20, 3, radius=radius, symmetric=symmetric)
    sol = solve(eq)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, eq.solution, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
def test_dtypes(dtype: torch.dtype) -> None:
    turn, wide = (0.6 + 0.8j, torch.complex128) if dtype.is_complex else (1.0, torch.float64)
    eq = linear(12, 3, radius=0.7)
    a, b = (turn * eq.args[0]).to(dtype), (eq.args[1] + (turn - 1)).to(dtype)
    eps = torch.finfo(dtype).eps
    sol = deqkit.solve(affine, torch.zeros_like(b), args=(a, b), solver="bicgstab", rtol=16 * eps, max_steps=100)
    expected = dense(a.to(wide), b.to(wide))
    assert sol.converged.all() and (sol.value.to(wide) - expected).norm() < 30 * eps * expected.norm()


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_it_has_no_scale(scale: float) -> None:
    eq = linear(20, 2)
    sol = deqkit.solve(eq.f, eq.x0, args=(eq.args[0], scale * eq.args[1]), solver="bicgstab", rtol=1e-8, max_steps=100)
    assert torch.equal(sol.num_steps, solve(eq, rtol=1e-8).num_steps)
    torch.testing.assert_close(sol.value / scale, eq.solution, rtol=1e-6, atol=1e-7)


def test_pytrees_and_batch_dims() -> None:
    """One system of leaves of two dtypes, and the same systems with one, two and no batch dimension."""
    eq = linear(12, 6)
    a, b = eq.args
    expected = solve(eq)
    grid = deqkit.solve(
        affine, b.reshape(2, 3, 12) * 0, args=(a, b.reshape(2, 3, 12)), batch_dims=2, solver="bicgstab", rtol=1e-10,
        max_steps=200,
    )  # fmt: skip
    torch.testing.assert_close(grid.value.reshape(6, 12), expected.value)
    assert torch.equal(grid.num_steps.reshape(6), expected.num_steps)
    one = deqkit.solve(affine, eq.x0, args=eq.args, batch_dims=0, solver="bicgstab", rtol=1e-10, max_steps=200)
    torch.testing.assert_close(one.value, eq.solution, rtol=1e-7, atol=1e-8)

    f = lambda s: {"z": 0.5j * s["z"] + s["y"], "y": 0.3 * s["y"] + 1}  # noqa: E731
    x0 = {"z": torch.zeros(2, 3, dtype=torch.complex128), "y": torch.zeros(2, 3, dtype=torch.float64)}
    tree = deqkit.solve(f, x0, solver="bicgstab", rtol=1e-12).value
    torch.testing.assert_close(tree["y"], torch.full_like(x0["y"], 1 / 0.7))
    torch.testing.assert_close(tree["z"], torch.full_like(x0["z"], 1 / 0.7 / (1 - 0.5j)))


def test_alone_and_in_a_batch() -> None:
    """Samples of different difficulty: looks, starts anew and ends at other steps."""
    radii = torch.tensor([0.1, 0.9, 0.99, 0.5]).double().reshape(4, 1)
    weights, b = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).double().split([1, 4])
    # Without a matrix product, whose rounding errors would depend on the number of samples.
    f = lambda x, radii, b: radii * (0.4 * torch.cos(weights) * x + 0.6 * x.roll(1, dims=1)) + b  # noqa: E731
    eye = torch.eye(40, dtype=torch.float64)
    run = lambda i: deqkit.solve(  # noqa: E731
        f, 0 * b[i], args=(radii[i], b[i]), solver="bicgstab", rtol=1e-9, max_steps=200
    )
    together = run(slice(None))
    assert len(set(together.num_steps.tolist())) == 4
    for i in range(4):
        alone = run(slice(i, i + 1))
        assert alone.num_steps[0] == together.num_steps[i]
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(
            together.value[i], dense(f(eye, radii[i], 0 * eye).T, b[i : i + 1])[0], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("right", [(1.0, 0.0), (1.0, 1.0), (1.0, -2.0)])
@pytest.mark.parametrize("system", [((0.0, 1.0), (-1.0, 0.0)), ((0.0, 1.0), (1.0, 0.0))])
def test_breakdowns(system: Any, right: Any) -> None:
    """I - J is a rotation by a right angle, where <q, v> and <t, r> vanish at once, or a reflection."""
    a, b = torch.eye(2).double() - torch.tensor(system).double(), torch.tensor([right]).double()
    sol = deqkit.solve(affine, torch.zeros_like(b), args=(a, b), solver="bicgstab", rtol=1e-10)
    torch.testing.assert_close(sol.value, dense(a, b))
    assert sol.num_fn_evals <= 8


@pytest.mark.parametrize("shift", [0.0, 1.0, 5.0])
def test_eigenvalues_beside_the_imaginary_axis(shift: float) -> None:
    """I - J is skew but for a shift: <t, r> vanishes in every iteration where the shift is 0."""
    g = torch.Generator().manual_seed(0)
    skew = torch.randn(20, 20, generator=g, dtype=torch.float64)
    a = torch.eye(20).double() - (skew - skew.T) - shift * torch.eye(20).double()
    b = torch.randn(3, 20, generator=g, dtype=torch.float64)
    sol = deqkit.solve(affine, 0 * b, args=(a, b), solver="bicgstab", rtol=1e-8, max_steps=200)
    torch.testing.assert_close(sol.value, dense(a, b), rtol=1e-5, atol=1e-6)


def test_a_bad_sample_costs_its_neighbours_nothing() -> None:
    eq = linear(20, 3)
    spoilt = eq.args[1].clone()
    spoilt[1] = torch.nan
    sol = deqkit.solve(
        eq.f, eq.x0, args=(eq.args[0], spoilt), solver="bicgstab", rtol=1e-10, max_steps=200, on_failure="ignore"
    )
    clean = solve(eq)
    assert sol.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    torch.testing.assert_close(sol.value[[0, 2]], clean.value[[0, 2]], rtol=0, atol=1e-14)
    assert torch.equal(sol.num_steps[[0, 2]], clean.num_steps[[0, 2]])


def test_a_map_that_is_not_affine_is_never_reported_solved_where_it_is_not() -> None:
    eq = tanh(20, 4, radius=1.5)
    sol = solve(eq, max_steps=60, on_failure="ignore")
    residual = (eq.f(sol.value, *eq.args) - sol.value).norm(dim=1)
    torch.testing.assert_close(sol.residual, residual)
    assert not sol.converged[residual > 1e-10 * sol.value.norm(dim=1) * 1.01].any()


def test_where_a_short_history_stalls_it_does_not() -> None:
    """Symmetric, of radius 0.99, in the memory of seven states (measured: 51 evaluations; others: 166 and 338)."""
    eq = linear(60, 3, radius=0.99, symmetric=True)
    evals = {
        solver: solve(eq, solver=make, rtol=1e-8, max_steps=1000).num_fn_evals
        for solver, make in {
            "bicgstab": deqkit.BiCGSTAB(),
            "anderson": deqkit.Anderson(history=4),
            "gmres": deqkit.GMRES(history=4),
        }.items()
    }
    assert 2 * evals["bicgstab"] < min(evals["anderson"], evals["gmres"])


def test_as_the_backward_solver_of_a_hard_problem() -> None:
    eq = tanh(60, 3, radius=0.97)
    grads = []
    for adjoint in (deqkit.ImplicitAdjoint("bicgstab", rtol=1e-10, max_steps=300), deqkit.ImplicitAdjoint(rtol=1e-12)):
        b = eq.args[1].clone().requires_grad_()
        sol = deqkit.solve(eq.f, eq.x0, args=(eq.args[0], b), adjoint=adjoint, rtol=1e-12, max_steps=200)
        sol.value.sin().sum().backward()
        assert sol.adjoint_stats.converged is not None and sol.adjoint_stats.converged.all()
        grads.append(b.grad)
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)
    b = eq.args[1].clone().requires_grad_()
    few = deqkit.ImplicitAdjoint("bicgstab", rtol=1e-10, max_steps=3)
    with pytest.warns(deqkit.ConvergenceWarning, match="adjoint"):
        deqkit.solve(eq.f, eq.x0, args=(eq.args[0], b), adjoint=few).value.sum().backward()
