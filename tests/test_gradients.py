"""Gradients: exact adjoints against finite differences, unrolling and the dense implicit formula (promise 3)."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from equations import linear, tanh, tanh_layer
from exact_adjoints import EXACT, TIGHT, inputs, value
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import deqkit


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_gradcheck(adjoint: str, solver: str) -> None:
    assert gradcheck(lambda a, b: value(a, b, EXACT[adjoint], solver), inputs())


def test_gradients_of_closed_over_parameters() -> None:
    layer = torch.nn.Linear(2, 2).double()
    torch.nn.init.orthogonal_(layer.weight, gain=0.5, generator=torch.Generator().manual_seed(0))
    b = torch.tensor([[0.3, -0.2]], dtype=torch.float64)

    def run(*parameters: torch.Tensor) -> torch.Tensor:
        del parameters  # perturbed in place by gradcheck, used through the module
        adjoint = EXACT["implicit_anderson"]
        return deqkit.solve(lambda x: torch.tanh(layer(x) + b), torch.zeros_like(b), adjoint=adjoint, **TIGHT).value

    assert gradcheck(run, tuple(layer.parameters()))
    assert gradgradcheck(run, tuple(layer.parameters()))


def test_against_the_dense_formula() -> None:
    eq = tanh(n=12, batch=3)
    a, b = (t.clone().requires_grad_() for t in eq.args)
    x = value(a, b, EXACT["implicit_anderson"])
    g = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    grad_a, grad_b = torch.autograd.grad(x, (a, b), g)
    expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(3):
        slope = 1 - eq.solution[i] ** 2
        u = torch.linalg.solve((torch.eye(12).double() - slope[:, None] * eq.args[0]).T, g[i])
        expected_b[i] = u * slope
        expected_a += torch.outer(u * slope, eq.solution[i])
    torch.testing.assert_close(grad_a, expected_a, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad_b, expected_b, rtol=1e-9, atol=1e-11)


def test_complex_and_pytree_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    w = (0.2 * torch.randn(3, 3, dtype=torch.complex128, generator=generator)).requires_grad_()
    v = (0.2 * torch.randn(3, 3, dtype=torch.float64, generator=generator)).requires_grad_()

    def f(state: dict[str, torch.Tensor], w: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        z, y = state["z"], state["y"]
        return {"z": z @ w + 1 + 0.5j + 0.1 * y, "y": torch.tanh(y @ v + z.abs())}  # not holomorphic

    def run(w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = {"z": torch.ones(2, 3, dtype=torch.complex128), "y": torch.zeros(2, 3, dtype=torch.float64)}
        out = deqkit.solve(f, x0, args=(w, v), adjoint=EXACT["implicit_anderson"], **TIGHT).value
        return out["z"], out["y"]

    assert gradcheck(run, (w, v))


@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_repeated_forwards_before_one_backward(adjoint: str) -> None:
    """The same layer used three times, then one backward: the gradient is that of the sum."""
    a, b = inputs(4)
    total = value(a, b, adjoint).sum() + value(a, 2 * b, adjoint).sum() + value(a, value(a, b, adjoint), adjoint).sum()
    got = torch.autograd.grad(total, (a, b))
    x = torch.zeros_like(b)

    def unroll(b: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(120):
            y = tanh_layer(y, a, b)
        return y

    expected = torch.autograd.grad(unroll(b).sum() + unroll(2 * b).sum() + unroll(unroll(b)).sum(), (a, b))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_gradient_accumulation_and_retained_graph() -> None:
    a, b = inputs(4)
    once = torch.autograd.grad(value(a, b, "implicit").sum(), (a, b))
    x = value(a, b, "implicit").sum()
    x.backward(retain_graph=True)
    x.backward()
    torch.testing.assert_close((a.grad, b.grad), tuple(2 * g for g in once))
    with pytest.raises(RuntimeError, match="second time"):
        x.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpointing(use_reentrant: bool) -> None:
    a, b = inputs(4)
    expected = torch.autograd.grad(value(a, b, "implicit").sum(), (a, b))
    checkpoint(lambda a, b: value(a, b, "implicit"), a, b, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close((a.grad, b.grad), expected)


def test_value_may_be_changed_in_place() -> None:
    a, b = inputs(4)
    expected = torch.autograd.grad(torch.relu(value(a, b, "implicit")).sum(), (a, b))
    got = torch.autograd.grad(torch.relu_(value(a, b, "implicit")).sum(), (a, b))
    torch.testing.assert_close(got, expected)


def test_approximate_adjoints_are_the_series_they_name() -> None:
    eq = linear(n=6, batch=2, radius=0.5)
    a, b = eq.args[0], eq.args[1].clone().requires_grad_()
    g = torch.ones_like(b)

    def gradient(adjoint: Any) -> torch.Tensor:
        sol = deqkit.solve(eq.f, eq.x0, args=(a, b), adjoint=adjoint, **TIGHT)
        return torch.autograd.grad(sol.value, b, g)[0]

    terms = [g @ torch.matrix_power(a, k) for k in range(5)]
    torch.testing.assert_close(gradient("jfb"), g)
    torch.testing.assert_close(gradient(deqkit.NeumannAdjoint(4)), terms[0] + terms[1] + terms[2] + terms[3])
    torch.testing.assert_close(gradient(deqkit.PhantomAdjoint(3, damping=0.0)), terms[0] + terms[1] + terms[2])
    step = 0.7 * a + 0.3 * torch.eye(6, dtype=torch.float64)
    damped = 0.7 * sum(g @ torch.matrix_power(step, k) for k in range(3))
    torch.testing.assert_close(gradient(deqkit.PhantomAdjoint(3, damping=0.3)), damped)


def test_adjoint_stats_tell_how_the_backward_solve_went() -> None:
    a, b = inputs(8, 3)
    sol = deqkit.solve(
        tanh_layer, torch.zeros_like(b), args=(a, b), adjoint=deqkit.ImplicitAdjoint("broyden", rtol=1e-6)
    )
    assert sol.adjoint_stats.status is None and sol.adjoint_stats.converged is None
    sol.value.sum().backward()
    stats = sol.adjoint_stats
    assert stats.solver == "broyden" and stats.converged is not None and stats.converged.all()
    assert stats.relative_residual is not None and (stats.relative_residual <= 1e-6).all()
    assert stats.num_steps is not None and stats.num_fn_evals == int(stats.num_steps.max()) + 1


@pytest.mark.parametrize("policy", ["warn", "raise", "ignore"])
def test_failed_adjoint_is_reported(policy: str) -> None:
    a, b = inputs(8, 3)
    adjoint = deqkit.ImplicitAdjoint("fixed_point", rtol=1e-12, max_steps=2)
    x = deqkit.solve(tanh_layer, torch.zeros_like(b), args=(a, b), adjoint=adjoint, on_failure=policy).value  # pyright: ignore
    words = "adjoint solve: 3 of 3 samples did not converge"
    if policy == "warn":
        with pytest.warns(deqkit.ConvergenceWarning, match=words):
            x.sum().backward()
    elif policy == "raise":
        with pytest.raises(deqkit.ConvergenceError, match=words):
            x.sum().backward()
    else:
        x.sum().backward()
        assert a.grad is not None


def test_nothing_to_differentiate() -> None:
    sol = deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(2, 1))
    assert torch.equal(sol.value.detach(), deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(2, 1)).value.detach())
    constant = torch.ones(2, 1, requires_grad=True)
    x = deqkit.solve(lambda x: 3 * constant, torch.zeros(2, 1)).value  # f ignores x
    x.sum().backward()
    torch.testing.assert_close(constant.grad, torch.full((2, 1), 3.0))


def test_no_gradient_gathers_in_hidden_leaves_and_no_graph_is_kept() -> None:
    a, b = inputs(4)

    class Layer:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return tanh_layer(x, a, b)

    layer = Layer()
    graph = weakref.ref(layer)  # held by the graph for the backward pass
    sol = deqkit.solve(layer, torch.zeros_like(b), **TIGHT)
    del layer
    sol.value.sum().backward()
    kept = sol.detach()
    assert not kept.value.requires_grad and kept.adjoint_stats.converged is not None
    gc.disable()
    try:
        del sol
        assert graph() is None  # freed by reference counts alone: no cycle
    finally:
        gc.enable()


@pytest.mark.parametrize("max_steps", [10, 80])
def test_graph_holds_one_evaluation_whatever_the_steps(max_steps: int) -> None:
    eq = tanh(n=32, batch=4, radius=0.99)
    a = eq.args[0].clone().requires_grad_()
    saved: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        deqkit.solve(eq.f, eq.x0, args=(a, eq.args[1]), rtol=0, atol=0, max_steps=max_steps)
        solve_bytes, saved[:] = sum(saved), []
        eq.f(eq.x0.requires_grad_(), a, eq.args[1])
        one_bytes = sum(saved)
    state = eq.x0.numel()
    assert solve_bytes <= one_bytes + 2 * state + a.numel()  # x, f(x) and the leaves that f depends on


def test_tiny_cotangents() -> None:
    a, b = (t.float().detach().requires_grad_() for t in inputs(4))
    x = deqkit.solve(tanh_layer, torch.zeros_like(b), args=(a, b), rtol=1e-6).value
    expected = torch.autograd.grad(x.sum(), (a, b), retain_graph=True)
    got = torch.autograd.grad(x.sum() * 1e-25, (a, b))
    torch.testing.assert_close(tuple(1e25 * g for g in got), expected, rtol=1e-4, atol=1e-6)


def test_the_adjoint_solve_is_not_autocast() -> None:
    """f and its backward run in float32, so only the solver's own arithmetic could lose precision."""
    a, b = (t.float().detach().requires_grad_() for t in inputs(8, 3))

    def gradient(enabled: bool) -> torch.Tensor:
        def f(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return torch.tanh((x.unsqueeze(1) * a).sum(2) + b)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            x = deqkit.solve(f, torch.zeros_like(b), rtol=1e-6).value
            return torch.autograd.grad(x.sum(), b)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("adjoint", ["implicit", "neumann", deqkit.ShineAdjoint(refine_steps=3)])
def test_another_function_in_a_packed_backward_is_refused(adjoint: Any) -> None:
    a, b = inputs()
    scale = 0.5
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        x = deqkit.solve(lambda x: scale * tanh_layer(x, a, b), torch.zeros_like(b), adjoint=adjoint).value
    torch.autograd.grad(x.sum(), b, retain_graph=True)
    scale = 0.4
    with pytest.raises(RuntimeError, match="f is not the function it was in the forward pass"):
        x.sum().backward()


def test_a_parameter_that_the_derivative_does_not_need_may_change_in_place() -> None:
    a, b = inputs()
    expected = torch.autograd.grad(value(a, b, "implicit").sum(), (a, b))
    x = deqkit.solve(lambda x: tanh_layer(x, a, b), torch.zeros_like(b), **TIGHT).value
    with torch.no_grad():
        b.add_(1.0)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), (a, b)), expected)


@pytest.mark.parametrize("adjoint", ["implicit", "neumann", "jfb", "phantom", "shine"])
def test_a_leaf_of_f_without_gradient(adjoint: str) -> None:
    b = torch.full((2, 1), 0.3, dtype=torch.float64, requires_grad=True)

    def f(x: dict[str, torch.Tensor], b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": 0.5 * x["a"] + b, "c": torch.ones(2, 1, dtype=torch.float64)}

    x0 = {"a": torch.zeros(2, 1, dtype=torch.float64), "c": torch.zeros(2, 1, dtype=torch.float64)}
    x = deqkit.solve(f, x0, args=(b,), adjoint=adjoint, rtol=1e-12).value
    (grad,) = torch.autograd.grad((x["a"] + 7 * x["c"]).sum(), b, create_graph=adjoint == "implicit")
    terms = {"implicit": 2.0, "neumann": 1.9375, "jfb": 1.0, "phantom": 2 * (1 - 0.75**5), "shine": 2.0}
    torch.testing.assert_close(grad, torch.full_like(b, terms[adjoint]))


@pytest.mark.parametrize("adjoint", ["implicit", "neumann", "jfb", "phantom", "shine"])
def test_nothing_to_differentiate_gives_a_plain_value(adjoint: str) -> None:
    unused = torch.ones(2, 1, requires_grad=True)
    for f in (lambda x, b: 0.5 * x + 1, torch.no_grad()(lambda x, b: 0.5 * x + b)):
        x = deqkit.solve(f, torch.zeros(2, 1), args=(unused,), adjoint=adjoint).value
        assert not x.requires_grad and abs(x.numpy() - 2).max() < 1e-2


def test_empty_batch_can_be_trained_on() -> None:
    b = torch.ones(0, 3, requires_grad=True)
    deqkit.solve(lambda x, b: 0.5 * x + b, torch.zeros(0, 3), args=(b,)).value.sum().backward()
    with torch.no_grad():
        assert not deqkit.solve(lambda x, b: 0.5 * x + b, torch.zeros(0, 3), args=(b,)).value.requires_grad
