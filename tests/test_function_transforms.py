"""A solve under the transforms of `torch.func`, nested and mixed with `torch.autograd`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import deqkit

N, B = 4, 3
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 200}
EXACT = deqkit.ImplicitAdjoint("gmres", **TIGHT)
APPROXIMATE = ("jfb", "neumann", "phantom")

Layer = Callable[[Tensor, Tensor], Tensor]


def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x @ w.T + b)


def as_args(w: Tensor, b: Tensor, adjoint: Any = EXACT, **settings: Any) -> Tensor:
    return deqkit.solve(f, torch.zeros_like(b), args=(w, b), adjoint=adjoint, **TIGHT | settings).value


def as_closure(w: Tensor, b: Tensor) -> Tensor:
    x0 = torch.zeros(b.shape, dtype=b.dtype)  # which no transform knows of
    return deqkit.solve(lambda x: f(x, w, b), x0, adjoint=EXACT, **TIGHT).value


def steps(w: Tensor, b: Tensor) -> Tensor:
    """The same layer as an ordinary network, to the last digit."""
    x = torch.zeros_like(b)
    for _ in range(80):
        x = f(x, w, b)
    return x


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w, dw, b, db = (torch.randn(rows, N, generator=generator, dtype=torch.float64) for rows in (N, N, B, B))
    return torch.linalg.qr(w)[0] * 0.6, b, dw, db


def loss(layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, b: (layer(w, b) ** 3).sum()


def same(found: Any, expected: Any, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, e in zip(found, expected, strict=True):
        assert e.abs().max() > 1e-3  # or there would be nothing to compare
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol)


W, INPUTS, DW, DB = data()
ONE_EACH = INPUTS.unsqueeze(1)  # batches of one sample
BOTH = torch.stack([W, 0.5 * W])

TRANSFORMS: dict[str, Callable[[Layer], Any]] = {
    "grad": lambda s: grad(loss(s), (0, 1))(W, INPUTS),
    "vjp": lambda s: vjp(s, W, INPUTS)[1](DB),
    "jvp": lambda s: jvp(s, (W, INPUTS), (DW, DB)),
    "jvp_of_one": lambda s: jvp(lambda b: s(W, b), (INPUTS,), (DB,)),
    "jacrev": lambda s: jacrev(s, (0, 1))(W, INPUTS),
    "jacrev_chunked": lambda s: jacrev(s, chunk_size=2)(W, INPUTS),
    "jacfwd": lambda s: jacfwd(s, (0, 1))(W, INPUTS),
    "hessian": lambda s: hessian(loss(s), (0, 1))(W, INPUTS),
    "jacrev_jacrev": lambda s: jacrev(jacrev(loss(s)))(W, INPUTS),
    "jacfwd_jacfwd": lambda s: jacfwd(jacfwd(loss(s)))(W, INPUTS),
    "jacrev_jacfwd": lambda s: jacrev(jacfwd(loss(s)))(W, INPUTS),
    "grad_grad": lambda s: grad(lambda w: (grad(loss(s))(w, INPUTS) * DW).sum())(W),
    "grad_grad_grad": lambda s: grad(lambda w: (grad(lambda w: (grad(loss(s))(w, INPUTS) * DW).sum())(w) ** 2).sum())(
        W
    ),
    "vmap_of_samples": lambda s: vmap(s, (None, 0), out_dims=1)(W, ONE_EACH),
    "vmap_of_parameters": lambda s: vmap(s, (0, None))(BOTH, INPUTS),
    "vmap_of_nothing": lambda s: vmap(lambda k: s(W, INPUTS) * k)(DB[:, 0]),
    "vmap_vmap": lambda s: vmap(vmap(s, (None, 0), out_dims=1), (0, None), out_dims=2)(BOTH, ONE_EACH),
    "vmap_grad": lambda s: vmap(grad(loss(s)), (None, 0))(W, ONE_EACH),
    "vmap_grad_dim_1": lambda s: vmap(grad(loss(s), (0, 1)), (None, 1))(W, INPUTS.unsqueeze(0)),
    "vmap_jvp": lambda s: vmap(lambda db: jvp(lambda b: s(W, b), (INPUTS,), (db,))[1])(torch.stack([DB, -2 * DB])),
    "vmap_hessian": lambda s: vmap(hessian(loss(s)), (None, 0))(W, ONE_EACH),
    "grad_vmap": lambda s: grad(lambda w: (vmap(s, (None, 0))(w, ONE_EACH) ** 3).sum())(W),
    "grad_vmap_grad": lambda s: grad(lambda w: (vmap(grad(loss(s)), (None, 0))(w, ONE_EACH) ** 2).sum())(W),
    "jacfwd_vmap": lambda s: jacfwd(lambda w: vmap(s, (None, 0))(w, ONE_EACH))(W),
}


@pytest.mark.parametrize("layer", [as_args, as_closure])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_against_the_unrolled_derivative(name: str, layer: Layer) -> None:
    same(TRANSFORMS[name](layer), TRANSFORMS[name](steps))


def test_against_the_dense_implicit_formula() -> None:
    x = steps(W, INPUTS)
    slope = 1 - x**2
    jacobian = slope.unsqueeze(2) * W  # per sample
    system = torch.eye(N, dtype=torch.float64) - jacobian
    u = torch.linalg.solve(system.mT, (3 * x**2).unsqueeze(2)).squeeze(2) * slope
    same(grad(loss(as_args), (0, 1))(W, INPUTS), (u.T @ x, u))
    same(vmap(grad(loss(as_args)), (None, 0))(W, ONE_EACH), u.unsqueeze(2) * x.unsqueeze(1))
    tangent = torch.linalg.solve(system, (slope * (x @ DW.T + DB)).unsqueeze(2)).squeeze(2)
    same(jvp(as_args, (W, INPUTS), (DW, DB))[1], tangent)


AROUND: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "grad": lambda s, w, b: grad(loss(s), 1)(w, b),
    "vmap_grad": lambda s, w, b: vmap(grad(loss(s), 1), (None, 0))(w, b.unsqueeze(1)),
    "jacrev": lambda s, w, b: jacrev(s, 1)(w, b),
    "jvp": lambda s, w, b: jvp(lambda b: s(w, b), (b,), (DB,))[1],
    "vmap": lambda s, w, b: vmap(s, (None, 0))(w, b.unsqueeze(1)),
}


@pytest.mark.parametrize("layer", [as_args, as_closure])
@pytest.mark.parametrize("name", AROUND)
def test_autograd_of_a_transform(name: str, layer: Layer) -> None:
    def gradients(s: Layer) -> Any:
        w, b = W.clone().requires_grad_(), INPUTS.clone().requires_grad_()
        return torch.autograd.grad((AROUND[name](s, w, b) ** 2).sum(), (w, b))

    same(gradients(layer), gradients(steps))


@pytest.mark.parametrize("layer", [as_args, as_closure])
def test_double_backward_of_a_transform(layer: Layer) -> None:
    def twice(s: Layer, name: str) -> Tensor:
        w = W.clone().requires_grad_()
        first = torch.autograd.grad((AROUND[name](s, w, INPUTS) ** 3).sum(), w, create_graph=True)[0]
        return torch.autograd.grad((first**2).sum(), w)[0]

    same(twice(layer, "vmap"), twice(steps, "vmap"))
    for name in ("grad", "jvp"):  # these derivatives of u, an equation that f is but a part of, lie outside
        with pytest.raises(RuntimeError, match=r"double backward.*torch\.func\.grad, vjp or jvp, nested"):
            twice(layer, name)


@pytest.mark.parametrize("layer", [as_args, as_closure])
def test_batched_backward(layer: Layer) -> None:
    """The older vmap, behind ``is_grads_batched`` and the vectorised `torch.autograd.functional`."""

    def batched(s: Layer) -> Any:
        w = W.clone().requires_grad_()
        return torch.autograd.grad(s(w, INPUTS), w, torch.stack([DB, 2 * DB, DB**2]), is_grads_batched=True)

    def functional(s: Layer, strategy: str) -> Any:
        jacobian = torch.autograd.functional.jacobian
        return jacobian(lambda w: s(w, INPUTS), W, vectorize=True, strategy=strategy)

    same(batched(layer), batched(steps))
    for strategy in ("reverse-mode", "forward-mode"):
        same(functional(layer, strategy), functional(steps, strategy))


@pytest.mark.parametrize("adjoint", APPROXIMATE)
def test_approximate_adjoints_are_what_they_are_without(adjoint: str) -> None:
    def layer(w: Tensor, b: Tensor) -> Tensor:
        return as_args(w, b, adjoint=adjoint)

    def plain(w: Tensor, b: Tensor) -> Any:
        w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
        return torch.autograd.grad(loss(layer)(w, b), (w, b))

    expected = plain(W, INPUTS)
    same(grad(loss(layer), (0, 1))(W, INPUTS), expected, rtol=1e-12)
    alone = [torch.stack(each) for each in zip(*(plain(W, b) for b in ONE_EACH), strict=True)]
    same(vmap(grad(loss(layer), (0, 1)), (None, 0))(W, ONE_EACH), alone, rtol=1e-12)
    _, pull_back = vjp(layer, W, INPUTS)
    same(pull_back(3 * layer(W, INPUTS) ** 2), expected, rtol=1e-12)
    rows = jacrev(layer, 1)(W, INPUTS)  # dx*/db, rows by rows
    same(torch.einsum("bi,bicj->cj", 3 * layer(W, INPUTS) ** 2, rows), expected[1], rtol=1e-12)


def batched_and_one_by_one(layer: Layer) -> tuple[Tensor, Tensor]:
    w = W.clone().requires_grad_()
    x, cotangents = layer(w, INPUTS), torch.stack([DB, 2 * DB, DB**2])
    each = [torch.autograd.grad(x, w, g, retain_graph=True)[0] for g in cotangents]
    return torch.autograd.grad(x, w, cotangents, is_grads_batched=True)[0], torch.stack(each)


@pytest.mark.parametrize("adjoint", [*APPROXIMATE, "reversible"])
def test_batched_backward_of_the_others(adjoint: str) -> None:
    solver = "reversible" if adjoint == "reversible" else "anderson"
    same(*batched_and_one_by_one(lambda w, b: as_args(w, b, adjoint=adjoint, solver=solver, rtol=1e-6)), rtol=1e-12)


@pytest.mark.parametrize("refine_steps", [0, 3])
def test_shine_goes_through_vmap_alone(refine_steps: int) -> None:
    adjoint = deqkit.ShineAdjoint(refine_steps=refine_steps)
    layer = lambda w, b: as_args(w, b, adjoint=adjoint, solver="broyden", rtol=1e-4)  # noqa: E731

    def gradient(layer: Layer, b: Tensor) -> Tensor:
        w = W.clone().requires_grad_()
        return torch.autograd.grad((layer(w, b) ** 3).sum(), w)[0]

    mapped = gradient(lambda w, b: vmap(layer, (None, 0))(w, b), ONE_EACH)
    same(mapped, gradient(lambda w, b: layer(w, b.squeeze(1)), ONE_EACH), rtol=1e-12)
    with pytest.raises(NotImplementedError, match="is_grads_batched=True.*adjoint='shine'"):
        batched_and_one_by_one(layer)
    for name in ("grad", "vmap_grad", "jvp", "grad_vmap"):
        with pytest.raises(NotImplementedError, match="does not go through adjoint='shine'.*'implicit'"):
            TRANSFORMS[name](layer)


@pytest.mark.parametrize("adjoint", APPROXIMATE)
def test_approximate_adjoints_refuse_what_they_lack(adjoint: str) -> None:
    def layer(w: Tensor, b: Tensor) -> Tensor:
        return as_args(w, b, adjoint=adjoint)

    twice = "cannot be differentiated twice.*'implicit' or 'unrolled'"
    with pytest.raises(RuntimeError, match=twice):
        grad(lambda w: grad(loss(layer))(w, INPUTS).sum())(W)
    with pytest.raises(RuntimeError, match=twice):
        jacrev(jacrev(loss(layer)))(W, INPUTS)
    w = W.clone().requires_grad_()
    inner = grad(lambda b: loss(layer)(w, b))(INPUTS)
    with pytest.raises(RuntimeError, match=twice):
        torch.autograd.grad(inner.sum(), w)
    for forward in (lambda: jvp(layer, (W, INPUTS), (DW, DB)), lambda: hessian(loss(layer))(W, INPUTS)):
        with pytest.raises(NotImplementedError, match=f"does not go through adjoint='{adjoint}'.*'implicit'"):
            forward()


def test_differentiating_twice_at_one_level_is_refused() -> None:
    def gradient(b: Tensor) -> Tensor:
        return torch.autograd.grad(loss(as_args)(W, b), b, create_graph=True)[0].sum()

    with pytest.raises(RuntimeError, match=r"nest torch\.func\.grad"):
        grad(gradient)(INPUTS)


UNROLLED = ("grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "vmap_of_parameters", "grad_vmap", "jacfwd_vmap")


@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled(name: str) -> None:
    layer = lambda w, b: as_args(w, b, adjoint="unrolled", solver="fixed_point")  # noqa: E731
    same(TRANSFORMS[name](layer), TRANSFORMS[name](steps), rtol=1e-6, atol=1e-7)


def test_unrolled_steps_cannot_leave_a_vmap_around() -> None:
    for name in ("vmap_grad", "vmap_hessian"):
        with pytest.raises(NotImplementedError, match="under torch.vmap do not go through adjoint='unrolled'"):
            TRANSFORMS[name](lambda w, b: as_args(w, b, adjoint="unrolled"))


def test_grad_mode() -> None:
    with torch.no_grad():  # which torch.func overrules from within
        found = grad(loss(as_args), (0, 1))(W, INPUTS)
    same(found, grad(loss(steps), (0, 1))(W, INPUTS))

    def detached(s: Layer, w: Tensor) -> Tensor:
        with torch.no_grad():
            x = s(w, INPUTS)
        return (x * w.sum() ** 2).sum()

    same(grad(lambda w: detached(as_args, w))(W), grad(lambda w: detached(steps, w))(W))


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden", "newton_krylov", "auto"])
def test_the_value_is_the_same_bit_for_bit(solver: str) -> None:
    plain = as_args(W, INPUTS, solver=solver, rtol=1e-4)
    layer = lambda w, b: as_args(w, b, solver=solver, rtol=1e-4)  # noqa: E731
    assert torch.equal(vjp(layer, W, INPUTS)[0], plain)
    assert torch.equal(jvp(layer, (W, INPUTS), (DW, DB))[0], plain)
    together = deqkit.solve(lambda x: f(x, W, ONE_EACH), torch.zeros_like(ONE_EACH), batch_dims=2, solver=solver)
    mapped = vmap(lambda b: deqkit.solve(lambda x: f(x, W, b), torch.zeros_like(b), solver=solver).value)(ONE_EACH)
    assert torch.equal(mapped, together.value)


def test_per_sample_gradients_of_a_module() -> None:
    """What vmap(grad) is mostly used for: a module, its parameters by name, f closing over them."""
    torch.manual_seed(0)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(N, N)
            nn.init.orthogonal_(self.linear.weight, gain=0.6)

        def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
            return torch.tanh(self.linear(x) + inputs)

    net = deqkit.nn.FixedPoint(Cell(), adjoint=EXACT, **TIGHT).double()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def sample_loss(params: dict[str, Tensor], b: Tensor) -> Tensor:
        b = b.unsqueeze(0)
        return functional_call(net, params, (torch.zeros_like(b), b)).pow(3).sum()

    found = vmap(grad(sample_loss), (None, 0))(params, INPUTS)
    assert net.last_solution is not None and net.last_solution.converged.all()
    assert f"{B} of {B} samples converged" in str(net.last_solution)
    assert not net.last_solution.value.requires_grad
    net.last_solution.value.sum()  # an ordinary tensor, which outlives the transforms
    for i, b in enumerate(INPUTS):
        net.zero_grad()
        net(torch.zeros(1, N, dtype=torch.float64), b.unsqueeze(0)).pow(3).sum().backward()
        same({name: p.grad for name, p in net.named_parameters()}, {name: g[i] for name, g in found.items()})


@pytest.mark.parametrize("norm", [None, "leaf_max", lambda s: s["p"].abs().amax(-1) + s["q"].abs().sum((-1, -2))])
def test_pytrees_complex_states_and_norms(norm: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(B, 2, N, dtype=torch.complex128, generator=generator)  # vmap x batch x state

    def layer(c: Tensor) -> Tensor:
        """One batch, (batch, state)."""

        def g(x: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"p": 0.4 * x["p"] + 0.1 * x["q"].sum(-1) + c, "q": 0.3 * x["q"] + 0.2 * x["p"].abs().unsqueeze(-1)}

        x0 = {"p": torch.zeros(2, N, dtype=c.dtype), "q": torch.zeros(2, N, 2, dtype=torch.float64)}
        x = deqkit.solve(g, x0, norm=norm, adjoint=EXACT, **TIGHT).value
        return (x["p"].abs() ** 2).sum() + (x["q"] ** 3).sum()

    found = vmap(grad(layer))(c)
    for i in range(B):
        leaf = c[i].clone().requires_grad_()
        same(found[i], torch.autograd.grad(layer(leaf), leaf)[0])


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_batch_dims(batch_dims: int) -> None:
    b = INPUTS.reshape(B, *(1,) * batch_dims, N)
    layer = lambda b: as_args(W, b, batch_dims=batch_dims)  # noqa: E731
    same(vmap(jacrev(layer))(b), vmap(jacrev(lambda b: steps(W, b)))(b))


def test_mapped_samples_are_independent() -> None:
    """Every field of a solution under vmap is that of the solves alone, of failed ones, too."""
    scale = torch.tensor([1.0, 2.0, torch.nan, 0.1], dtype=torch.float64)

    zeros = torch.zeros(N, dtype=torch.float64)

    def fields(scale: Tensor) -> tuple[Any, ...]:
        sol = deqkit.solve(
            lambda x: (torch.cos(scale * x[0]), 0.5 * x[0]), (zeros, zeros), solver="fixed_point",
            norm="leaf_max", batch_dims=0, max_steps=30, keep=(1, 3), on_failure="ignore",
        )  # fmt: skip
        return sol.value, sol.status, sol.converged, sol.residual, sol.num_steps, sol.states[3], sol.leaf_residuals

    together = vmap(fields)(scale)
    for i, s in enumerate(scale):
        for a, e in zip(tree_leaves(together), tree_leaves(fields(s)), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert len(set(together[1].tolist())) > 2


def test_failures_are_reported_from_within() -> None:
    def failing(b: Tensor, policy: Any) -> Tensor:
        return deqkit.solve(
            lambda x: -3 * x + b, torch.zeros(N), batch_dims=0, solver="fixed_point", on_failure=policy
        ).value

    b = INPUTS.float()
    with pytest.warns(deqkit.ConvergenceWarning, match=f"{B} of {B} samples did not converge") as caught:
        vmap(lambda b: failing(b, "warn"))(b)
    assert caught[0].filename == __file__
    with pytest.raises(deqkit.ConvergenceError) as error:
        vmap(grad(lambda b: failing(b, "raise").sum()))(b)
    assert error.value.solution.value.shape == (B, N)
    weak = deqkit.ImplicitAdjoint("fixed_point", max_steps=2, rtol=1e-9)
    with pytest.warns(deqkit.ConvergenceWarning, match=f"adjoint solve: {B} of {B} samples"):
        vmap(grad(lambda b: as_args(W.float(), b, adjoint=weak, rtol=1e-4).sum()))(b.unsqueeze(1))


def test_an_exception_in_f_leaves_no_transform_behind() -> None:
    calls_left = 0

    def g(x: Tensor, b: Tensor) -> Tensor:
        nonlocal calls_left
        calls_left -= 1
        if calls_left == 0:
            raise ZeroDivisionError
        return 0.5 * torch.cos(x) + b

    layer = lambda b: deqkit.solve(g, torch.zeros_like(b), args=(b,), batch_dims=0).value.sum()  # noqa: E731
    for calls in (1, 2, 5):
        calls_left = calls
        with pytest.raises(ZeroDivisionError):
            vmap(grad(layer))(INPUTS)
        assert torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore
        assert torch.is_grad_enabled()


def test_empty_batches() -> None:
    assert torch.equal(grad(lambda w: as_args(w, INPUTS[:0]).sum())(W), torch.zeros_like(W))
    assert vmap(lambda b: as_args(W, b))(torch.zeros(B, 0, N, dtype=torch.float64)).shape == (B, 0, N)
    with pytest.raises(ValueError, match="vmap"):
        vmap(lambda b: as_args(W, b))(torch.zeros(0, B, N, dtype=torch.float64))


def test_autocast() -> None:
    cell = nn.Linear(N, N)
    params = {name: p.detach() for name, p in cell.named_parameters()}
    params["weight"] = W.float()
    b = INPUTS.float()

    def total(params: dict[str, Tensor], b: Tensor) -> Tensor:
        g = lambda x: torch.tanh(functional_call(cell, params, (x,)) + b).float()  # noqa: E731
        return deqkit.solve(g, torch.zeros_like(b), rtol=1e-2).value.pow(2).sum()

    with torch.autocast("cpu", torch.bfloat16):
        found = vmap(grad(total), (None, 0))(params, b.unsqueeze(1))["weight"].sum(0)
        leaf = params["weight"].clone().requires_grad_()
        expected = torch.autograd.grad(total({**params, "weight": leaf}, b), leaf)[0]
    same(found, expected, rtol=0.05, atol=0.05)


def test_a_backward_pass_after_its_transforms_have_ended() -> None:
    """What vjp and plain autograd give back may be used outside; the inner levels are gone by then."""
    w = W.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, pull_back = vjp(lambda b: as_args(w, b), INPUTS)
        found = pull_back(DB)[0]
    x = steps(w, INPUTS)
    same(torch.autograd.grad(value.sum(), w)[0], torch.autograd.grad(x.sum(), w)[0])
    same(found, vjp(lambda b: steps(W, b), INPUTS)[1](DB)[0])
