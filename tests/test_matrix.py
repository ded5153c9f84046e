"""Every solver on every problem in every dtype and structure: what is reported is true, and the answer is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import EQUATIONS, Equation, tanh
from torch import Tensor
from torch.utils._pytree import tree_flatten

import deqkit
from deqkit.solvers import SOLVERS

FOR_AFFINE_MAPS = ("gmres", "bicgstab")
AFFINE = ("linear", "linear_symmetric", "linear_complex_pairs")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def as_tensor(x: Tensor) -> Any:
    return x


def as_tuple(x: Tensor) -> Any:
    """Two leaves of different widths, cut from the last dim; one of them where there is only one number."""
    return (x[..., :1].clone(), x[..., 1:].clone())


def as_dict(x: Tensor) -> Any:
    return {"b": x[..., 1:].clone(), "a": [x[..., :1].clone()]}


def whole(state: Any) -> Tensor:
    """The tensor that one of the structures above was cut from."""
    if isinstance(state, Tensor):
        return state
    first, rest = state if isinstance(state, tuple) else (state["a"][0], state["b"])
    return torch.cat([first, rest], dim=-1)


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {"tensor": as_tensor, "tuple": as_tuple, "dict": as_dict}


def in_dtype(equation: Equation, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """f, x0 and x* of an equation in a dtype. A complex one holds the equation in its real part and, in its imaginary
    part, the same equation once more."""
    if not dtype.is_complex:
        args = tuple(a.to(dtype) for a in equation.args)
        return (lambda x: equation.f(x, *args)), equation.x0.to(dtype), equation.solution.to(dtype)
    args = tuple(a.to(dtype.to_real()) for a in equation.args)

    def f(z: Tensor) -> Tensor:
        return torch.complex(equation.f(z.real, *args), equation.f(z.imag, *args))

    x0, solution = (t.to(dtype.to_real()) for t in (equation.x0, equation.solution))
    return f, torch.complex(x0, x0), torch.complex(solution, solution)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_problem_dtype_structure(solver: str, equation: str, dtype: torch.dtype, structure: str) -> None:
    if solver in FOR_AFFINE_MAPS and equation not in AFFINE:
        pytest.skip("a solver of affine maps")
    f_whole, start, solution = in_dtype(EQUATIONS[equation](), dtype)
    cut = STRUCTURES[structure]

    def f(state: Any) -> Any:
        return cut(f_whole(whole(state)))

    resolution = torch.finfo(dtype).eps
    rtol = 16 * resolution
    with torch.no_grad():
        sol = deqkit.solve(f, cut(start), solver=solver, rtol=rtol, max_steps=600, on_failure="ignore")
    leaves, spec = tree_flatten(sol.value)
    assert spec == tree_flatten(cut(start))[1] and all(leaf.dtype == dtype for leaf in leaves)

    # The report is true: the residual of exactly this point, in the solve's own precision.
    x = whole(sol.value)
    fx = f_whole(x)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    true = (fx.to(wide) - x.to(wide)).norm(dim=-1) / fx.to(wide).norm(dim=-1)
    torch.testing.assert_close(sol.relative_residual.double(), true, rtol=1e-3, atol=0.1 * resolution)
    assert bool((true[sol.converged] <= 1.001 * rtol).all())

    assert bool(sol.converged.all()), f"{sol}"
    # An error is at most the residual times |(I - J)^-1|, which is below 60 for these problems.
    error = (x.to(wide) - solution.to(wide)).norm(dim=-1) / solution.to(wide).norm(dim=-1)
    assert bool((error <= 60 * 2 * rtol).all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_batch_dims_change_nothing_but_the_grouping(solver: str, batch_dims: int) -> None:
    """Four systems as one, as four, and as two by two: each grouping has the same answer."""
    eq = EQUATIONS["linear"]() if solver in FOR_AFFINE_MAPS else tanh(n=6, batch=4, radius=0.7)
    n = eq.solution.shape[1]
    shape = {0: (4 * n,), 1: (4, n), 2: (2, 2, n)}[batch_dims]

    def f(x: Tensor) -> Tensor:
        return eq.f(x.reshape(4, n), *eq.args).reshape(shape)

    sol = deqkit.solve(f, torch.zeros(shape, dtype=torch.float64), solver=solver, batch_dims=batch_dims, rtol=1e-11,
                       max_steps=300)  # fmt: skip
    assert sol.status.shape == shape[:batch_dims]
    torch.testing.assert_close(sol.value.reshape(4, n), eq.solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_in_every_dtype_and_structure(solver: str, dtype: torch.dtype, structure: str) -> None:
    """dL/db of x = A x + b is (I - A)^-T dL/dx, with any solver in front of the adjoint solve."""
    eq = EQUATIONS["linear"]()
    a, b = (t.to(dtype) for t in eq.args)
    b.requires_grad_()
    cut = STRUCTURES[structure]
    rtol = 16 * torch.finfo(dtype).eps
    sol = deqkit.solve(
        lambda x: cut(whole(x) @ a.T + b), cut(torch.zeros_like(b)), solver=solver, rtol=rtol, max_steps=300
    )
    g = torch.Generator().manual_seed(3)
    cotangent = torch.randn(b.shape, dtype=dtype, generator=g)
    (found,) = torch.autograd.grad(tree_flatten(sol.value)[0], b, tree_flatten(cut(cotangent))[0])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    system = torch.eye(a.shape[0], dtype=torch.float64) - eq.args[0]
    expected = torch.linalg.solve(system.T.to(wide), cotangent.to(wide).T).T
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=600 * rtol, atol=600 * rtol)
