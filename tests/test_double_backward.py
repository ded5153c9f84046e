"""Gradients of gradients: exact where promised, refused by name elsewhere."""

from __future__ import annotations

import pytest
import torch
from equations import tanh_layer
from exact_adjoints import EXACT, TIGHT, inputs, value
from torch.autograd import gradgradcheck

import deqkit


@pytest.mark.parametrize("adjoint", ["implicit_anderson", "implicit_broyden", "implicit_bicgstab", "unrolled"])
def test_gradgradcheck(adjoint: str) -> None:
    assert gradgradcheck(lambda a, b: value(a, b, EXACT[adjoint], "fixed_point"), inputs(2, 1))


def test_gradgradcheck_where_arguments_depend_on_one_another() -> None:
    """args holds a, 2 a and a again through a closure: each way counts once."""
    a, b = inputs(2, 1)

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        adjoint = EXACT["implicit_anderson"]
        f = lambda x, p, q, b: torch.tanh(x @ (0.3 * p + 0.1 * q).T + b)  # noqa: E731
        return deqkit.solve(f, torch.zeros_like(b), args=(a, 2 * a, b), adjoint=adjoint, **TIGHT).value

    def closing_over(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        adjoint = EXACT["implicit_anderson"]
        f = lambda x, p: torch.tanh(x @ (0.3 * p + 0.1 * a).T + b)  # noqa: E731
        return deqkit.solve(f, torch.zeros_like(b), args=(a,), adjoint=adjoint, **TIGHT).value

    assert gradgradcheck(run, (a, b)) and gradgradcheck(closing_over, (a, b))


def test_third_derivative() -> None:
    """Against 200 plain steps; the derivatives of fewer, accelerated steps lag behind their value."""

    def derivatives(c: torch.Tensor, x: torch.Tensor) -> list[float]:
        out, current = [], x.sum()
        for _ in range(3):
            (current,) = torch.autograd.grad(current, c, create_graph=True)
            out.append(current.item())
        return out

    c = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = x0 = torch.zeros(1, 1, dtype=torch.float64)
    for _ in range(200):
        x = torch.tanh(c * x + 1)
    sol = deqkit.solve(lambda x, c: torch.tanh(c * x + 1), x0, args=(c,), adjoint=EXACT["implicit_anderson"], **TIGHT)
    assert derivatives(c, sol.value) == pytest.approx(derivatives(c, x), rel=1e-9)


@pytest.mark.parametrize("adjoint", ["jfb", "neumann", "phantom", "shine"])
def test_approximate_adjoints_refuse_double_backward(adjoint: str) -> None:
    a, b = inputs()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(value(a, b, adjoint).sum(), a, create_graph=True)


def test_double_backward_past_a_hidden_tensor_is_refused() -> None:
    """f closes over 2 * b: first derivatives are right, second ones can't be, so they are an error."""
    a, b = inputs()
    doubled = 2 * b
    sol = deqkit.solve(lambda x: tanh_layer(x, a, doubled), torch.zeros_like(b), **TIGHT)
    (first,) = torch.autograd.grad(sol.value.sum(), b, retain_graph=True)
    (expected,) = torch.autograd.grad(value(a, 2 * b, "implicit").sum(), b)
    torch.testing.assert_close(first, expected)
    with pytest.raises(RuntimeError, match="Pass such tensors in args"):
        torch.autograd.grad(sol.value.sum(), b, create_graph=True)


def test_double_backward_under_autocast() -> None:
    """The casts of the weights that the solve's own steps have cached are no hidden tensors."""
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5, generator=torch.Generator().manual_seed(0))
    b = torch.ones(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = layer(torch.ones(2, 4))  # fills the cache
        f = lambda x, b: torch.tanh(layer(x)).float() + b  # noqa: E731
        x = deqkit.solve(f, torch.zeros(2, 4), args=(b,), rtol=1e-2).value
    (grad,) = torch.autograd.grad(x.square().sum(), b, create_graph=True)
    grad.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all() and layer.weight.grad.any()


@pytest.mark.parametrize("change", ["value", "leaf"])
def test_another_function_in_the_double_backward_is_refused(change: str) -> None:
    a, b = inputs()
    scale, offset = 0.5, b
    f = lambda x: scale * tanh_layer(x, a, offset)  # noqa: E731
    x = deqkit.solve(f, torch.zeros_like(b), adjoint="implicit", **TIGHT).value
    if change == "value":
        scale = 0.4
    else:
        offset = b.detach().clone().requires_grad_()
    torch.autograd.grad(x.sum(), b, retain_graph=True)
    with pytest.raises(RuntimeError, match="f is not the function it was in the forward pass"):
        torch.autograd.grad(x.sum(), b, create_graph=True)


def test_double_backward_past_an_argument_used_twice_is_refused() -> None:
    """f takes p as an argument and as itself: only the first way can be told from what p came from."""
    a, b = inputs(2, 1)
    p = 2 * a
    f = lambda x, q: torch.tanh(x @ (0.3 * q + 0.1 * p).T + b)  # noqa: E731
    x = deqkit.solve(f, torch.zeros_like(b), args=(p,), **TIGHT).value
    (first,) = torch.autograd.grad(x.sum(), a, retain_graph=True)
    whole = deqkit.solve(lambda x, q: torch.tanh(x @ (0.4 * q).T + b), torch.zeros_like(b), args=(p,), **TIGHT).value
    torch.testing.assert_close(first, torch.autograd.grad(whole.sum(), a)[0])
    with pytest.raises(RuntimeError, match="only as its arguments"):
        torch.autograd.grad(x.sum(), a, create_graph=True)


def nested(w: torch.Tensor) -> torch.Tensor:
    """A solve in whose f there is another one."""

    def f(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        inner = deqkit.solve(lambda z, y, w: torch.tanh(0.5 * z @ w + y), torch.zeros_like(y), args=(y, w), **TIGHT)
        return 0.5 * torch.tanh(inner.value + 0.2)

    return deqkit.solve(f, torch.zeros(2, 3, dtype=w.dtype), args=(w,), **TIGHT).value


def test_a_solve_inside_of_f() -> None:
    torch.manual_seed(0)
    w = torch.nn.init.orthogonal_(torch.empty(3, 3, dtype=torch.float64), gain=0.6).requires_grad_()
    assert gradgradcheck(nested, (w,))
    # Under activation checkpointing f is evaluated once more by an ordinary backward pass, too.
    (expected,) = torch.autograd.grad(nested(w).square().sum(), w)
    again = torch.utils.checkpoint.checkpoint(nested, w, use_reentrant=False)
    (found,) = torch.autograd.grad(again.square().sum(), w)
    torch.testing.assert_close(found, expected)
