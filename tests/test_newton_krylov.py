"""Newton-Krylov, GMRES and the solver in stages: what they are, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from equations import affine, linear
from scipy.sparse.linalg import LinearOperator, gmres

import deqkit
from deqkit import Status


def expanding(n: int = 12, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments of a tanh layer with a spectral radius of 2, in which plain iteration wanders."""
    g = torch.Generator().manual_seed(3)
    a = torch.randn(n, n, generator=g, dtype=torch.float64)
    return 2 * a / torch.linalg.eigvals(a).abs().max(), torch.randn(batch, n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("directions", [1, 2, 5, 9])
def test_gmres_is_gmres(directions: int) -> None:
    """After k directions and a step: the residual that SciPy's GMRES has after k iterations from the same point."""
    n = 10
    a = linear(n, 1, radius=0.9).args[0]
    b = torch.randn(1, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # The last of the steps goes to where the directions before it lead.
    sol = deqkit.solve(
        affine, torch.zeros_like(b), args=(a, b), solver="gmres", rtol=1e-14, max_steps=directions + 1,
        on_failure="ignore",
    )  # fmt: skip
    system = np.eye(n) - a.numpy()
    x, _ = gmres(LinearOperator((n, n), lambda v: system @ v), b[0].numpy(), maxiter=1, restart=directions, rtol=1e-15)
    expected = np.linalg.norm(b[0].numpy() - system @ x)
    residual = (affine(sol.value, a, b) - sol.value).norm().item()
    assert residual == pytest.approx(expected, rel=1e-6) and sol.residual.item() == pytest.approx(residual, rel=1e-6)


def test_gmres_ends_after_as_many_directions_as_unknowns() -> None:
    eq = linear(8, 3, radius=0.99)
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver="gmres", rtol=1e-12, max_steps=30)
    assert sol.converged.all() and int(sol.num_steps.max()) <= 8 + 1 + 2  # a restart for what rounding left
    torch.testing.assert_close(sol.value, eq.solution, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("history", [2, 20])
def test_restarts(history: int) -> None:
    eq = linear(30, 2, radius=0.9)
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=deqkit.GMRES(history=history), rtol=1e-10, max_steps=400)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, eq.solution, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", ["newton_krylov", "gmres"])
def test_an_expanding_map(solver: str) -> None:
    eq = linear(12, 3, radius=3.0)
    plain = deqkit.solve(eq.f, eq.x0, args=eq.args, solver="fixed_point", max_steps=300, on_failure="ignore")
    assert (plain.status == Status.DIVERGED).all()
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=solver, rtol=1e-10, max_steps=300)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, eq.solution, rtol=1e-8, atol=1e-8)


def test_line_search() -> None:
    """Newton's method alone runs away from the root of the arc tangent from every start beyond 1.39."""
    x0 = torch.tensor([[1.0], [3.0], [20.0]], dtype=torch.float64)
    sol = deqkit.solve(lambda x: x - torch.atan(x), x0, solver="newton_krylov", rtol=0, atol=1e-10, max_steps=100)
    assert sol.converged.all() and sol.value.abs().max() < 1e-9


def test_the_last_step_uses_what_was_learnt() -> None:
    eq = linear(30, 2, radius=0.95)
    residuals = []
    for max_steps in (0, 3, 6, 12):
        sol = deqkit.solve(
            eq.f, eq.x0, args=eq.args, solver=deqkit.NewtonKrylov(history=30, forcing=0.0), rtol=1e-12,
            max_steps=max_steps, on_failure="ignore",
        )  # fmt: skip
        residuals.append(sol.relative_residual.max().item())
    assert all(b < 0.95 * a for a, b in zip(residuals, residuals[1:], strict=False))


def test_gathering_directions_is_no_stagnation() -> None:
    """The first forty evaluations bring no better point."""
    eq = linear(60, 1, radius=0.99)
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=deqkit.GMRES(history=80), rtol=1e-10, max_steps=100)
    assert sol.converged.all() and sol.num_steps.item() > 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_dtypes(dtype: torch.dtype) -> None:
    b = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    rtol = {torch.bfloat16: 3e-2, torch.float32: 1e-5}.get(dtype, 1e-10)
    sol = deqkit.solve(lambda x: 0.5 * torch.sin(x) + b, torch.zeros_like(b), solver="newton_krylov", rtol=rtol)
    assert sol.converged.all() and sol.value.dtype == dtype


def test_auto_switches_only_where_it_must() -> None:
    """One sample converges at once, one only by Newton's method."""
    a, b = expanding(batch=2)
    gain = torch.tensor([[0.05], [1.0]], dtype=torch.float64)
    f = lambda x: torch.tanh(gain * (x @ a.T) + b)  # noqa: E731
    first = deqkit.FixedPointIteration()
    solver = deqkit.Auto((first, deqkit.NewtonKrylov()))
    settings = {"rtol": 1e-8, "max_steps": 200, "trace": True}
    sol = deqkit.solve(f, torch.zeros_like(b), solver=solver, **settings)
    assert sol.converged.all() and sol.num_steps[0] < 20 < sol.num_steps[1] <= 200
    assert sol.num_fn_evals <= 202
    alone = deqkit.solve(f, torch.zeros_like(b), solver=first, **settings | {"on_failure": "ignore"})
    assert torch.equal(sol.value[0], alone.value[0]) and alone.status[1] != Status.CONVERGED
    assert sol.trace is not None and sol.trace[int(sol.num_steps[0]) + 1 :, 0].isnan().all()
    assert sol.trace[-1, 1] <= 1e-8


def test_auto_leaves_a_sample_to_a_solver_that_gets_there() -> None:
    """Anderson is slow at first on a general linear map, and superlinear in the end."""
    eq = linear(96, 3, radius=0.99)
    settings = {"args": eq.args, "rtol": 1e-5, "max_steps": 80}
    alone = deqkit.solve(eq.f, eq.x0, solver="anderson", **settings)
    assert alone.converged.all() and alone.num_steps.max() > 40
    both = deqkit.solve(eq.f, eq.x0, solver="auto", **settings)
    assert torch.equal(both.value, alone.value) and torch.equal(both.num_steps, alone.num_steps)


def test_auto_has_the_steps_of_one_solver_for_every_sample() -> None:
    """Handed on early, samples have what is left; alone they fare as in the batch."""
    a, b = expanding(batch=6)
    gain = torch.linspace(0.2, 1.3, 6, dtype=torch.float64).unsqueeze(1)
    f = lambda x, gain, b: torch.tanh(gain * (x @ a.T) + b)  # noqa: E731
    solver = deqkit.Auto((deqkit.FixedPointIteration(), deqkit.Broyden()))
    settings = {"solver": solver, "rtol": 1e-9, "max_steps": 60, "on_failure": "ignore"}
    sol = deqkit.solve(f, torch.zeros_like(b), args=(gain, b), **settings)
    assert (sol.num_steps <= 60).all()
    first = deqkit.solve(f, torch.zeros_like(b), args=(gain, b), **settings | {"solver": "fixed_point"})
    assert first.converged.sum() < sol.converged.sum()
    for i in range(6):
        alone = deqkit.solve(f, torch.zeros_like(b[:1]), args=(gain[i : i + 1], b[i : i + 1]), **settings)
        assert alone.num_steps[0] == sol.num_steps[i] and alone.status[0] == sol.status[i]
        torch.testing.assert_close(alone.value[0], sol.value[i], rtol=1e-8, atol=1e-10)


def test_auto_counts_its_steps_through() -> None:
    a, b = expanding(batch=1)
    f = lambda x: torch.tanh(x @ a.T + b)  # noqa: E731
    steps: list[int] = []
    sol = deqkit.solve(
        f, torch.zeros_like(b), solver=deqkit.Auto((deqkit.FixedPointIteration(), deqkit.NewtonKrylov())),
        max_steps=200, keep=(3, 150), callback=lambda info: steps.append(info.step), on_failure="ignore",
    )  # fmt: skip
    assert steps[0] == 0 and steps[-1] == int(sol.num_steps.max()) and sorted(steps) == steps
    # Three more to look for what the value and both states depend on.
    assert len(steps) + 3 == sol.num_fn_evals and set(sol.states) == {3, 150}


def test_auto_of_a_fixed_number_of_steps_is_its_first_solver() -> None:
    eq = linear(5, 2)
    settings = {"args": eq.args, "rtol": 0, "atol": 0, "max_steps": 7}
    sol = deqkit.solve(eq.f, eq.x0, solver="auto", **settings)
    assert torch.equal(sol.value, deqkit.solve(eq.f, eq.x0, solver="anderson", **settings).value)


def test_auto_refuses_what_it_cannot_hand_on_to() -> None:
    with pytest.raises(TypeError, match="Auto: solvers must be solver objects, got 'anderson'"):
        deqkit.Auto(("anderson",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Auto: each of the solvers must be a single one"):
        deqkit.Auto((deqkit.Anderson(), deqkit.Auto()))
    with pytest.raises(ValueError, match="at least one solver"):
        deqkit.Auto(())
