"""deqkit.gradient_error: an adjoint against the exact one."""

from __future__ import annotations

import pytest
import torch
from equations import affine, linear, tanh, tanh_layer

import deqkit


def solved(radius: float) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    eq = tanh(10, 3, radius=radius)
    return eq.solution, tuple(t.clone().requires_grad_() for t in eq.args)


def test_against_the_dense_formula() -> None:
    """The Neumann series of an affine map, its error computed with dense matrices."""
    eq = linear(6, 1, radius=0.8)
    a, b = eq.args[0], eq.args[1].clone().requires_grad_()
    g = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for num_terms in (1, 3, 10):
        found = deqkit.gradient_error(
            affine, eq.solution, deqkit.NeumannAdjoint(num_terms), args=(a, b), cotangent=g
        )  # fmt: skip
        powers = [g @ torch.linalg.matrix_power(a, k) for k in range(num_terms)]  # J^T g as a row is g J
        approximate = torch.stack(powers).sum(0)
        exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - a.T, g.T).T
        assert found.relative_error == pytest.approx(((approximate - exact).norm() / exact.norm()).item(), rel=1e-6)
        cosine = torch.nn.functional.cosine_similarity(approximate, exact).item()
        assert found.cosine == pytest.approx(cosine, rel=1e-6)


def test_the_evidence_is_what_one_expects() -> None:
    x, args = solved(0.8)
    torch.manual_seed(0)
    g = torch.randn_like(x)
    names = ["jfb", deqkit.NeumannAdjoint(5), "implicit", deqkit.ImplicitAdjoint("broyden", rtol=1e-12)]
    errors = [deqkit.gradient_error(tanh_layer, x, name, args=args, cotangent=g) for name in names]
    assert [e.adjoint for e in errors] == ["jfb", "neumann", "implicit", "implicit"]
    sizes = [e.relative_error for e in errors]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.05 and sizes[2] < 1e-3 and sizes[3] < 1e-9
    assert all(0 < e.cosine <= 1 + 1e-12 for e in errors) and errors[0].num_products is None
    assert errors[2].num_products is not None and errors[2].num_products > 3 and errors[0].num_tensors == 2
    assert "implicit: cosine 1.0" in str(errors[2]) and "vector-Jacobian products" in str(errors[2])


def test_parameters_that_f_closes_over_and_pytrees() -> None:
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)

    def f(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"a": torch.tanh(layer(x["b"])), "b": 0.5 * x["a"] + 1}

    with torch.no_grad():
        x = deqkit.solve(f, {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}, rtol=1e-6).value
    found = deqkit.gradient_error(f, x, "implicit")
    assert found.num_tensors == 2 and found.relative_error < 1e-3
    assert layer.weight.grad is None


def test_what_cannot_be_compared_is_refused() -> None:
    x, args = solved(0.5)
    with pytest.raises(ValueError, match="adjoint='unrolled' differentiates the steps"):
        deqkit.gradient_error(tanh_layer, x, "unrolled", args=args)
    with pytest.raises(ValueError, match="f depends on no leaf tensor"):
        deqkit.gradient_error(tanh_layer, x, "jfb", args=tuple(t.detach() for t in args))
    with pytest.raises(ValueError, match="cotangent must have the structure and the shapes of x"):
        deqkit.gradient_error(tanh_layer, x, "jfb", args=args, cotangent=torch.ones(2))
    with pytest.raises(ValueError, match="the exact gradient is zero"):
        deqkit.gradient_error(tanh_layer, x, "jfb", args=args, cotangent=torch.zeros_like(x))
    with pytest.raises(deqkit.ConvergenceError, match="adjoint solve"):
        deqkit.gradient_error(tanh_layer, x, "jfb", args=args, max_steps=1)


@pytest.mark.parametrize("solver", ["anderson", deqkit.Broyden(variant="bad")])
def test_the_inverse_of_a_forward_solve(solver: str | deqkit.Solver) -> None:
    """As if "shine" had been used in a solve from the same point, at x instead of where that ended."""
    x, args = solved(0.8)
    g = torch.linspace(-1, 1, x.numel()).double().reshape(x.shape)
    x0 = 0.5 * torch.ones_like(x)
    settings = {"args": args, "cotangent": g, "solver": solver}
    found = deqkit.gradient_error(tanh_layer, x, "shine", x0=x0, **settings)
    value = deqkit.solve(tanh_layer, x0, args=args, solver=solver, adjoint="shine").value
    exact = deqkit.solve(tanh_layer, x0, args=args, adjoint=deqkit.ImplicitAdjoint(rtol=1e-12), rtol=1e-12).value
    gradient, reference = (torch.cat([t.flatten() for t in torch.autograd.grad(v, args, g)]) for v in (value, exact))
    expected = ((gradient - reference).norm() / reference.norm()).item()
    assert found.adjoint == "shine" and found.relative_error == pytest.approx(expected, rel=1e-2) and expected > 1e-3
    assert found.relative_error != deqkit.gradient_error(tanh_layer, x, "shine", **settings).relative_error
    refined = deqkit.gradient_error(tanh_layer, x, deqkit.ShineAdjoint(refine_steps=40), x0=x0, **settings)
    assert refined.relative_error < 1e-3 and refined.num_products is not None and refined.num_products > 3


def test_a_graph_of_the_callers_is_left_whole() -> None:
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    features = torch.sin(layer(torch.ones(2, 4, dtype=torch.float64)))
    x = features.detach() * 2
    deqkit.gradient_error(lambda x: 0.5 * x + features * layer.bias.exp() / layer.bias.exp(), x, "jfb")
    features.sum().backward()
    assert layer.weight.grad is not None


def test_an_adjoint_that_cannot_be_compared_at_a_point_says_why() -> None:
    x, args = solved(0.5)
    with pytest.raises(ValueError, match="adjoint='reversible' differentiates the steps towards x"):
        deqkit.gradient_error(tanh_layer, x, "reversible", args=args)
    with pytest.raises(ValueError, match="adjoint='shine' builds on what solver='fixed_point' does not record"):
        deqkit.gradient_error(tanh_layer, x, "shine", args=args, solver="fixed_point")
    with pytest.raises(ValueError, match="x0 must have the structure and the shapes of x"):
        deqkit.gradient_error(tanh_layer, x, "shine", args=args, x0=x[:1])


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    scale = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="the exact gradient is not finite"):
        deqkit.gradient_error(lambda x: 0.5 * x + scale.abs().sqrt(), torch.zeros(2, 3), "jfb")
