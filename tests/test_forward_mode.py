"""Forward-mode differentiation: tangents through a solve, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equations import tanh, tanh_layer
from torch.autograd import forward_ad

import deqkit

TIGHT = {"rtol": 1e-12, "max_steps": 200}


def tangent_of(solve: Any, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and tangent of ``solve`` at tensors with the tangents given."""
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(solve(*(forward_ad.make_dual(t, d) for t, d in pairs)))
        return out.primal.clone(), out.tangent.clone()


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden", "gmres", "bicgstab"])
@pytest.mark.parametrize("gradients", [True, False])
def test_against_reverse_mode(solver: str, gradients: bool) -> None:
    """<g, J d> = <J^T g, d>, for tensors in args."""
    a, b = tanh(6, 3, radius=0.7).args
    generator = torch.Generator().manual_seed(0)
    da, db = (torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in (a, b))
    g = torch.randn(b.shape, dtype=b.dtype, generator=generator)
    adjoint = deqkit.ImplicitAdjoint(solver, **TIGHT)

    def solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return deqkit.solve(tanh_layer, torch.zeros_like(g), args=(a, b), adjoint=adjoint, **TIGHT).value

    with torch.set_grad_enabled(gradients):
        x, dx = tangent_of(solve, (a, da), (b, db))
    ra, rb = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = solve(ra, rb)
    assert torch.equal(x, value)
    ga, gb = torch.autograd.grad(value, (ra, rb), g)
    torch.testing.assert_close((g * dx).sum(), (ga * da).sum() + (gb * db).sum(), rtol=1e-8, atol=1e-10)


def test_what_f_closes_over_and_a_start_with_a_tangent() -> None:
    """The answer does not depend on where the solve started, and neither does its tangent."""
    b, db = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)

    def solve(b: torch.Tensor) -> torch.Tensor:
        return deqkit.solve(lambda x: 0.5 * torch.tanh(x) + b, b, **TIGHT).value

    x, dx = tangent_of(solve, (b, db))
    torch.testing.assert_close(dx, db / (1 - 0.5 * (1 - torch.tanh(x) ** 2)), rtol=1e-8, atol=0)


def test_pytrees_and_complex_numbers() -> None:
    c, dc = torch.tensor([0.3 + 0.1j, -0.2j]), torch.tensor([1.0 + 0j, 1j])

    def solve(c: torch.Tensor) -> torch.Tensor:
        f = lambda s: {"x": 0.5 * s["y"] + c, "y": 0.4 * s["x"]}  # noqa: E731
        return deqkit.solve(f, {"x": torch.zeros_like(c), "y": torch.zeros_like(c)}, rtol=1e-6).value["x"]

    x, dx = tangent_of(solve, (c, dc))
    torch.testing.assert_close(x, c / 0.8, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dx, dc / 0.8, rtol=1e-4, atol=1e-6)


def test_no_tangent_where_none_came_in() -> None:
    b = torch.ones(2, 3)
    with forward_ad.dual_level():
        value = deqkit.solve(lambda x: 0.5 * x + b, torch.zeros(2, 3)).value
        tangent = forward_ad.unpack_dual(value).tangent
    assert tangent is None or not tangent.any()


def test_states_and_unrolled_steps() -> None:
    b, db = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)

    def state(b: torch.Tensor, adjoint: str, step: int) -> torch.Tensor:
        f = lambda x: 0.5 * torch.tanh(x) + b  # noqa: E731
        return deqkit.solve(f, torch.zeros(2, 3).double(), adjoint=adjoint, keep=[step], **TIGHT).states[step]

    x, dx = tangent_of(lambda b: state(b, "implicit", 150), (b, db))
    torch.testing.assert_close(dx, db / (1 - 0.5 * (1 - torch.tanh(x) ** 2)), rtol=1e-8, atol=0)
    first, d_first = tangent_of(lambda b: state(b, "unrolled", 1), (b, db))
    torch.testing.assert_close((first, d_first), (b, db))


def test_a_failed_tangent_solve_is_reported() -> None:
    b = torch.ones(1, 2, dtype=torch.float64)
    adjoint = deqkit.ImplicitAdjoint(rtol=1e-12, max_steps=1)
    with pytest.warns(deqkit.ConvergenceWarning, match="tangent solve: 1 of 1 samples did not converge"):
        tangent_of(
            lambda b: deqkit.solve(lambda x: 0.9 * torch.sin(x) + b, torch.zeros_like(b), adjoint=adjoint).value,
            (b, b),
        )


def test_what_does_not_go_through_is_refused_by_name() -> None:
    c, tangent = torch.full((2, 3), 0.4), torch.ones(2, 3)

    def run(c: torch.Tensor, adjoint: str, solver: str = "anderson") -> torch.Tensor:
        f = lambda x: 0.5 * torch.tanh(x) + c  # noqa: E731
        return deqkit.solve(f, torch.zeros_like(c), adjoint=adjoint, solver=solver).value

    for adjoint in ("jfb", "neumann", "phantom", "shine"):
        with pytest.raises(NotImplementedError, match=f"does not go through adjoint='{adjoint}'.*'unrolled'"):
            tangent_of(lambda c, name=adjoint: run(c, name), (c, tangent))
    for adjoint in ("shine", "reversible"):
        solver = "reversible" if adjoint == "reversible" else "anderson"
        for transform in (torch.func.grad, lambda f: lambda c: torch.func.jvp(f, (c,), (tangent,))):
            with pytest.raises(NotImplementedError, match=f"does not go through adjoint='{adjoint}'.*'implicit'"):
                transform(lambda c, name=adjoint, solver=solver: run(c, name, solver).sum())(c)
    as_argument = lambda c: deqkit.solve(lambda x, c: 0.5 * torch.tanh(x) + c, torch.zeros_like(c), args=(c,)).value  # noqa: E731
    for layer in (lambda c: run(c, "implicit"), as_argument):
        with pytest.raises(NotImplementedError, match="forward-mode over reverse-mode"):
            tangent_of(layer, (c.clone().requires_grad_(), tangent))
