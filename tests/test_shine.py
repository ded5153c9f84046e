"""SHINE: the inverse Jacobian of the forward solve against dense matrices, and what the adjoint makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equations import linear, matrix, tanh
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import deqkit
from deqkit import stages
from deqkit.norms import l2
from deqkit.solvers.inverse_jacobian import InverseJacobian
from deqkit.state import Evaluator, StateLayout
from deqkit.termination import Termination

SOLVERS = {
    "anderson": deqkit.Anderson(ridge=0.0, restart_factor=1e30),
    "anderson_type_1": deqkit.Anderson(ridge=0.0, restart_factor=1e30, type=1, mixing=0.7),
    "anderson_short": deqkit.Anderson(ridge=0.0, restart_factor=1e30, history=3, mixing=0.7),
    "broyden": deqkit.Broyden(restart_factor=1e30),
    "broyden_short": deqkit.Broyden(restart_factor=1e30, history=3),
    "broyden_bad_short": deqkit.Broyden(restart_factor=1e30, history=3, variant="bad"),
    "broyden_searching": deqkit.Broyden(restart_factor=1e30, history=4, line_search=2),
}


def dense_inverse(solver: Any, points: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What the last pairs between the points (x, r) of one sample make of -beta I."""
    pairs = list(zip(points[:-1], points[1:], strict=True))[-solver.history :]
    s = torch.stack([b[0] - a[0] for a, b in pairs], dim=1)
    y = torch.stack([b[1] - a[1] for a, b in pairs], dim=1)
    beta, identity = getattr(solver, "mixing", 1.0), torch.eye(len(s), dtype=s.dtype)
    if isinstance(solver, deqkit.Anderson):
        left = y if solver.type == 2 else s
        return -beta * identity + (s + beta * y) @ torch.linalg.solve(left.T @ y, left.T)
    inverse = -identity
    for dx, dr in zip(s.T, y.T, strict=True):
        row = dx @ inverse if solver.variant == "good" else dr
        inverse = inverse + torch.outer(dx - inverse @ dr, row) / (row @ dr)
    return inverse


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"broyden_searching"}))
def test_the_record_is_the_dense_inverse_of_each_samples_own_secants(solver: str) -> None:
    """Samples end at different steps, one of them far from its best point, and the history of those that go on runs
    over: none of that may show."""
    radii = torch.tensor([[0.1], [0.6], [0.95], [0.0]], dtype=torch.float64)
    a, b = matrix(24, 1.0, seed=3), torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visited: list[tuple[Tensor, Tensor, Tensor]] = []

    def f(x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(radii * (x @ a.T) + b)[:3], torch.exp(30 * x[3:] + 0.1 * b[3:])])

    def see(info: deqkit.StepInfo) -> None:
        visited.append((info.value.clone(), f(info.value) - info.value, info.active))

    x0 = torch.zeros_like(b)
    layout = StateLayout(x0, 1)
    settings: dict[str, Any] = {"max_steps": 40, "norm": l2, "callback": see, "record": True}
    result = stages.run(Evaluator(f, layout), (x0,), SOLVERS[solver], Termination(1e-4), **settings)
    assert isinstance(result.record, InverseJacobian) and len(set(result.num_steps.tolist())) == 4
    assert result.status.tolist() == [deqkit.Status.CONVERGED] * 3 + [deqkit.Status.DIVERGED]
    assert result.record.left[0].shape[1] <= SOLVERS[solver].history  # pyright: ignore[reportAttributeAccessIssue]
    g = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = result.record.transposed((g,))
    for i in range(4):
        own = [(x[i], r[i]) for x, r, active in visited if active[i]]
        assert len(own) == result.num_steps[i] + 1
        expected = dense_inverse(SOLVERS[solver], own).T @ g[i]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)


def gradients(adjoint: Any, *, solver: Any = "anderson", eq: Any = None, index: Any = slice(None), **settings: Any):
    eq = eq or tanh(40, 3, radius=0.9)
    a, b = eq.args[0].clone().requires_grad_(), eq.args[1][index].clone().requires_grad_()
    settings = {"rtol": 1e-6, "max_steps": 100} | settings
    sol = deqkit.solve(eq.f, eq.x0[index], args=(a, b), solver=solver, adjoint=adjoint, **settings)
    weight = torch.linspace(-1, 1, b.shape[1], dtype=torch.float64)
    return *torch.autograd.grad((sol.value * weight).sum(), (a, b)), sol


def error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return ((found[1] - expected[1]).norm() / expected[1].norm()).item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_secants_of_an_affine_map_give_the_exact_gradient(solver: str) -> None:
    """In 6 dimensions 6 are all there is to know for Anderson, which meets all of them; others approximate."""
    eq = linear(6, 3, radius=0.8)
    exact = gradients(deqkit.ImplicitAdjoint("gmres", rtol=1e-13), eq=eq)
    found = gradients("shine", solver=SOLVERS[solver], eq=eq, rtol=1e-12)
    if solver in ("anderson", "anderson_type_1"):
        assert error(found, exact) < 1e-5
    else:
        assert 1e-3 < error(found, exact) < 1.0


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_alone_and_in_a_batch(solver: str) -> None:
    eq = tanh(40, 3, radius=0.9)
    together = gradients("shine", solver=SOLVERS[f"{solver}_short"], eq=eq)
    for i in range(3):
        alone = gradients("shine", solver=SOLVERS[f"{solver}_short"], eq=eq, index=slice(i, i + 1))
        torch.testing.assert_close(alone[1][0], together[1][i], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("refining", ["fixed_point", "anderson", "broyden", "bicgstab"])
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_refinement_converges_to_the_exact_gradient(solver: str, refining: str) -> None:
    exact = gradients(deqkit.ImplicitAdjoint("gmres", rtol=1e-12), solver=solver)
    errors = []
    for steps in (0, 4, 100):
        found = gradients(deqkit.ShineAdjoint(refine_steps=steps, solver=refining), solver=solver)
        errors.append(error(found, exact))
    assert errors[0] > 10 * errors[1] or refining == "bicgstab"  # which looks at its third step at the earliest
    assert errors[0] > 0.1 and errors[2] < 1e-4
    stats = found[2].adjoint_stats
    assert stats.solver == refining and stats.converged is not None and stats.converged.all()
    assert stats.relative_residual is not None and (stats.relative_residual <= 1e-6).all()


def test_the_residual_of_a_refinement_is_that_of_the_equation() -> None:
    """And not that of the preconditioned map: u - J^T u - g, computed from the gradient towards b."""
    eq = linear(80, 2, radius=0.9)
    _, u, sol = gradients(deqkit.ShineAdjoint(refine_steps=3), eq=eq)  # df/db = 1
    g = torch.linspace(-1, 1, 80, dtype=torch.float64)
    image = u @ eq.args[0] + g
    torch.testing.assert_close(sol.adjoint_stats.residual, (image - u).norm(dim=1))
    torch.testing.assert_close(sol.adjoint_stats.relative_residual, (image - u).norm(dim=1) / image.norm(dim=1))
    assert sol.adjoint_stats.num_fn_evals == 4 and not sol.adjoint_stats.converged.any()  # and no warning


def test_refinement_needs_fewer_products_than_a_solve_from_scratch() -> None:
    """What the forward solve has learnt preconditions the backward one (measured: 25 and 37 products)."""
    eq = tanh(100, 4, radius=0.97, seed=7)
    scratch = gradients(deqkit.ImplicitAdjoint("broyden"), eq=eq, index=slice(None))
    refined = gradients(deqkit.ShineAdjoint(refine_steps=100), eq=eq)
    assert refined[2].adjoint_stats.converged.all()
    assert refined[2].adjoint_stats.num_fn_evals < 0.75 * scratch[2].adjoint_stats.num_fn_evals


def test_a_runaway_inverse_falls_back_to_jfb_by_sample() -> None:
    eq = linear(30, 3, radius=0.99, symmetric=True)
    jfb = gradients("jfb", eq=eq)[1]  # g itself: df/db = 1
    whole = gradients(deqkit.ShineAdjoint(fallback_ratio=float("inf")), solver="broyden", eq=eq)[1]
    ratio = whole.norm(dim=1) / jfb.norm(dim=1)
    assert ratio.min() < 0.99 * ratio.max()
    limit = (ratio.min() * ratio.max()).sqrt().item()
    found = gradients(deqkit.ShineAdjoint(fallback_ratio=limit), solver="broyden", eq=eq)[1]
    expected = torch.where((ratio <= limit).unsqueeze(1), whole, jfb)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(expected, whole) and not torch.equal(expected, jfb)
    refined = gradients(deqkit.ShineAdjoint(200, fallback_ratio=limit), solver="broyden", eq=eq, rtol=1e-8)
    exact = gradients(deqkit.ImplicitAdjoint("gmres", rtol=1e-12), eq=eq)
    assert error(refined, exact) < 1e-4


def test_a_bad_sample_costs_its_neighbours_nothing() -> None:
    eq = tanh(40, 3, radius=0.9)
    spoil = torch.tensor([[0.0], [float("nan")], [0.0]], dtype=torch.float64)

    def gradient(index: Any) -> Tensor:
        b = eq.args[1][index].clone().requires_grad_()
        f = lambda x: torch.tanh(x @ eq.args[0].T + b) + spoil[index]  # noqa: E731
        sol = deqkit.solve(f, eq.x0[index], adjoint=deqkit.ShineAdjoint(3), rtol=1e-6, on_failure="ignore")
        return torch.autograd.grad(sol.value[~sol.value.isnan().any(dim=1)].sum(), b)[0]

    together = gradient(slice(None))
    torch.testing.assert_close(together[[0, 2]], gradient([0, 2]), rtol=1e-6, atol=1e-9)


def test_pytrees_complex_numbers_and_half_precision() -> None:
    """Of a contraction with few directions, whose secants are soon complete; both leaves are one vector."""
    c = torch.tensor([0.3 + 0.2j, -0.4j], dtype=torch.complex128, requires_grad=True)

    def f(s: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"z": c * s["z"] + 1, "y": 0.3 * s["y"] + s["z"].abs()}

    x0 = {"z": torch.ones(1, 2, dtype=torch.complex128), "y": torch.zeros(1, 2, dtype=torch.float64)}
    grads = []
    for adjoint in (deqkit.ImplicitAdjoint(rtol=1e-12), deqkit.ShineAdjoint(refine_steps=30)):
        x = deqkit.solve(f, x0, adjoint=adjoint, rtol=1e-10, max_steps=100).value
        grads.append(torch.autograd.grad(x["y"].sum() + x["z"].real.sum(), c)[0])
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)
    for dtype in (torch.float16, torch.bfloat16):
        b = torch.ones(2, 3, dtype=dtype, requires_grad=True)
        x = deqkit.solve(
            lambda x, b: 0.5 * x + b, torch.zeros(2, 3, dtype=dtype), args=(b,), adjoint="shine", rtol=0.05
        )
        x.value.sum().backward()
        torch.testing.assert_close(b.grad, torch.full_like(b, 2.0), rtol=0.1, atol=0.0)


def test_batch_dims() -> None:
    """Two batch dimensions are one of as many samples; none is one sample, whose secants are those of all together."""
    eq = tanh(12, 6, radius=0.8)
    a, weight = eq.args[0], torch.linspace(-1, 1, 12, dtype=torch.float64)

    def gradient(shape: tuple[int, ...], batch_dims: int, adjoint: Any) -> Tensor:
        b = eq.args[1].reshape(*shape, 12).clone().requires_grad_()
        x0 = torch.zeros_like(b)
        sol = deqkit.solve(
            eq.f, x0, args=(a, b), batch_dims=batch_dims, adjoint=adjoint, rtol=1e-8, max_steps=100
        )  # fmt: skip
        return torch.autograd.grad((sol.value * weight).sum(), b)[0].reshape(6, 12)

    one = gradient((6,), 1, "shine")
    torch.testing.assert_close(gradient((2, 3), 2, "shine"), one)
    together = gradient((6,), 0, "shine")
    assert not torch.allclose(together, one, rtol=1e-2)
    exact = gradient((6,), 1, deqkit.ImplicitAdjoint(rtol=1e-12))
    for dims, shape in ((0, (6,)), (1, (6,)), (2, (2, 3))):
        torch.testing.assert_close(gradient(shape, dims, deqkit.ShineAdjoint(100)), exact, rtol=1e-6, atol=1e-7)


def test_nothing_is_recorded_but_for_an_adjoint_that_asks() -> None:
    eq = linear(8, 2, radius=0.5)
    settings: dict[str, Any] = {"max_steps": 20, "norm": l2}
    f = Evaluator(lambda x: eq.f(x, *eq.args), StateLayout(eq.x0, 1))
    assert stages.run(f, (eq.x0,), deqkit.Anderson(), Termination(1e-4), **settings).record is None
    without_steps = stages.run(
        f, (eq.x0,), deqkit.Anderson(mixing=0.5), Termination(1e-4), max_steps=0, norm=l2, record=True
    )
    (found,) = without_steps.record.transposed((eq.solution,))
    torch.testing.assert_close(found, -0.5 * eq.solution)


def test_what_is_kept_is_seen_by_saved_tensor_hooks_and_bounded_by_the_history() -> None:
    eq = linear(64, 4, radius=0.99)
    b = eq.args[1].clone().requires_grad_()

    def saved(max_steps: int) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            deqkit.solve(
                eq.f, eq.x0, args=(eq.args[0], b), solver=deqkit.Broyden(history=5), adjoint="shine", rtol=0,
                max_steps=max_steps,
            )  # fmt: skip
        return sum(sizes)

    state = eq.x0.numel()
    assert saved(20) == saved(80) and 12 * state <= saved(80) <= 13 * state + eq.args[0].numel()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpointing(use_reentrant: bool) -> None:
    eq = tanh(20, 2, radius=0.8)
    b = eq.args[1].clone().requires_grad_()

    def value(b: Tensor) -> Tensor:
        return deqkit.solve(eq.f, eq.x0, args=(eq.args[0], b), adjoint=deqkit.ShineAdjoint(2)).value

    expected = torch.autograd.grad(value(b).sum(), b)[0]
    checkpoint(value, b, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(b.grad, expected)
