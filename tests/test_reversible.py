"""The reversible iteration and its adjoint: the unrolled gradient of the same steps, without their memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import linear, matrix, tanh, tanh_layer
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import deqkit

BOTH = {"solver": "reversible", "adjoint": "reversible"}


def compare(run: Callable[[Any], tuple[Tensor, ...]]) -> float:
    """The largest difference of the gradients that ``run`` returns for an adjoint, relative to each one's size."""
    unrolled, reversible = run("unrolled"), run("reversible")
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in unrolled)
    errors = [(a - b).norm() / a.norm() for a, b in zip(unrolled, reversible, strict=True)]
    return float(torch.stack(errors).max())


def gradients(eq: Any, adjoint: Any, *, damping: float = 0.2, dtype: torch.dtype = torch.float64, **settings: Any):
    """Towards the parameters, what f closes over, and the starting point."""
    a, b, x0 = (t.to(dtype).clone().requires_grad_() for t in (*eq.args, eq.x0))
    sol = deqkit.solve(
        lambda x, b: eq.f(x, a, b), x0, args=(b,), solver=deqkit.ReversibleIteration(damping), adjoint=adjoint,
        **settings,
    )  # fmt: skip
    weight = torch.linspace(-1, 1, eq.x0.shape[1], dtype=dtype)
    return torch.autograd.grad((sol.value * weight).sum(), (a, b, x0))


@pytest.mark.parametrize("damping", [0.1, 0.5, 0.9])
def test_the_iteration_is_the_published_one(damping: float) -> None:
    """Pairs y <- (1 - b) y + b f(z), z <- (1 - b) z + b f(y) with b = 1 - damping: our odd and even points."""
    eq = tanh(6, 2)
    kept = deqkit.solve(
        eq.f, eq.x0, args=eq.args, solver=deqkit.ReversibleIteration(damping), rtol=0, max_steps=8, keep=range(1, 9)
    ).states
    y = z = eq.x0
    beta = 1 - damping
    for k in range(4):
        y = (1 - beta) * y + beta * eq.f(z, *eq.args)
        z = (1 - beta) * z + beta * eq.f(y, *eq.args)
        torch.testing.assert_close(kept[2 * k + 1], y)
        torch.testing.assert_close(kept[2 * k + 2], z)


@pytest.mark.parametrize(("damping", "steps"), [(0.1, 8), (0.2, 12), (0.5, 24), (0.8, 100)])
@pytest.mark.parametrize("radius", [0.5, 0.95])
def test_the_gradient_is_the_unrolled_one(radius: float, damping: float, steps: int) -> None:
    """But for what rounding errors grow to: the roots of damping z^2 = 1 + (1 - damping) radius z per step back."""
    eq = tanh(20, 4, radius=radius)
    settings = {"damping": damping, "rtol": 0, "max_steps": steps, "on_failure": "raise"}
    half = (1 - damping) * radius / 2
    growth = (half + (half**2 + damping) ** 0.5) / damping
    assert compare(lambda adjoint: gradients(eq, adjoint, **settings)) < 1e-16 * growth**steps


@pytest.mark.parametrize(("damping", "steps"), [(0.2, 16), (0.5, 40)])
def test_in_float32_it_is_the_unrolled_one_to_the_last_digit(damping: float, steps: int) -> None:
    """The sums in float64 give back exactly the points that f has seen."""
    eq = tanh(20, 4, radius=0.95)
    settings = {"damping": damping, "dtype": torch.float32, "rtol": 0, "max_steps": steps}
    assert compare(lambda adjoint: gradients(eq, adjoint, **settings)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [40, 100])
def test_where_the_way_back_is_lost_the_error_is_of_the_order_of_the_residual(steps: int, dtype: torch.dtype) -> None:
    """Rounding errors alone, 1e-16 times 2.2^100 and more, would leave nothing of the gradient; here: about 1e-6."""
    eq = tanh(60, 3, radius=0.9)
    settings = {"dtype": dtype, "rtol": 0, "max_steps": steps, "on_failure": "ignore"}
    with torch.no_grad():
        args = tuple(t.to(dtype) for t in eq.args)
        sol = deqkit.solve(eq.f, eq.x0.to(dtype), args=args, solver="reversible", rtol=0, max_steps=steps)
    parameters = lambda adjoint: gradients(eq, adjoint, **settings)[:2]  # noqa: E731
    assert compare(parameters) < 10 * float(sol.relative_residual.max()) + 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("policy", ["warn", "raise", "ignore"])
def test_a_fixed_number_of_steps_that_is_not_taken_back_exactly_is_reported(policy: str) -> None:
    """Of a map that expands, so that the steps do not come to rest."""
    eq = tanh(30, 3, radius=1.5)
    run = lambda: gradients(eq, "reversible", rtol=0, max_steps=60, on_failure=policy)  # noqa: E731
    words = r"adjoint: the gradient of 60 steps is not exact: .* a larger damping \(it is 0.2\)"
    if policy == "warn":
        with pytest.warns(deqkit.ConvergenceWarning, match=words):
            assert all(g.isfinite().all() for g in run())
    elif policy == "raise":
        with pytest.raises(deqkit.ConvergenceError, match=words):
            run()
    else:
        assert all(g.isfinite().all() for g in run())


def test_samples_that_end_at_different_steps() -> None:
    """One at once, one not at all."""
    a = torch.stack([matrix(10, r, seed=3) for r in (0.0, 0.5, 0.9, 1.1)])
    b = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statuses = set()

    def run(adjoint: str, check_every: int = 1, max_steps: int = 20) -> tuple[Tensor, ...]:
        x0 = torch.cat([torch.tanh(b[:1]), torch.zeros_like(b[1:])])
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_(), x0.requires_grad_()
        f = lambda x: torch.tanh((leaves[0] @ x.unsqueeze(2)).squeeze(2) + leaves[1])  # noqa: E731
        solver = deqkit.ReversibleIteration(0.4, check_every=check_every)
        sol = deqkit.solve(
            f, leaves[2], solver=solver, adjoint=adjoint, rtol=1e-2, max_steps=max_steps, on_failure="ignore",
            keep=(2, 6),
        )  # fmt: skip
        statuses.update(sol.status.tolist())
        assert len(set(sol.num_steps.tolist())) >= 2 + (max_steps == 20)
        return torch.autograd.grad(sol.value.square().sum() + sol.states[2].sum() + sol.states[6].sum(), leaves)

    for options in ({}, {"check_every": 3}, {"max_steps": 9}):
        assert compare(lambda adjoint, options=options: run(adjoint, **options)) < 1e-9
    assert statuses == {deqkit.Status.CONVERGED, deqkit.Status.MAX_STEPS}


def test_the_best_point_may_lie_before_the_last() -> None:
    """The residuals of this map rise and fall; its gradient is that of the point that is returned."""
    c = torch.tensor([[-1.2]], dtype=torch.float64)

    def run(adjoint: str) -> tuple[Tensor, ...]:
        weight = c.clone().requires_grad_()
        f = lambda x: torch.sin(weight * x) + 1  # noqa: E731
        steps: list[float] = []
        sol = deqkit.solve(
            f, torch.full_like(c, 0.9), solver="reversible", adjoint=adjoint, rtol=0, max_steps=3,
            callback=lambda info: steps.append(info.residual.item()), on_failure="ignore",
        )  # fmt: skip
        assert min(steps) == sol.residual.item() < steps[-1]
        return torch.autograd.grad(sol.value.sum(), weight)

    assert compare(run) < 1e-13


def test_gradients_reach_tensors_with_a_graph_of_their_own_and_pytrees_of_mixed_dtypes() -> None:
    encoder, cell = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)
    torch.nn.init.orthogonal_(cell.weight, gain=0.5, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    w = torch.tensor([0.3 + 0.2j, -0.4j, 0.1], dtype=torch.complex128, requires_grad=True)

    def run(adjoint: str) -> tuple[Tensor, ...]:
        hidden = torch.tanh(encoder(inputs))  # not named to the solve

        def f(s: dict[str, Any]) -> dict[str, Any]:
            z = w * s["z"] + 1
            return {"x": torch.tanh(cell(s["x"]) + hidden + z.abs().float().sum(1, keepdim=True)), "z": z}

        x0 = {"x": torch.zeros(2, 4), "z": torch.ones(2, 3, dtype=torch.complex128)}
        sol = deqkit.solve(f, x0, solver="reversible", adjoint=adjoint, rtol=1e-3, norm="leaf_max")
        leaves = (w, *encoder.parameters(), *cell.parameters())
        return torch.autograd.grad(sol.value["x"].square().sum() + sol.value["z"].real.sum(), leaves)

    assert compare(run) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_half_precision_and_batch_dims(dtype: torch.dtype, batch_dims: int) -> None:
    def run(adjoint: str) -> tuple[Tensor, ...]:
        c = torch.linspace(0.1, 0.8, 24).reshape(2, 3, 4).to(dtype).requires_grad_()
        settings: dict[str, Any] = {"rtol": 2e-2, "batch_dims": batch_dims, "solver": "reversible"}
        sol = deqkit.solve(lambda x: c * torch.cos(x), torch.zeros_like(c), adjoint=adjoint, **settings)
        return torch.autograd.grad(sol.value.float().sum(), c)

    assert compare(run) == 0.0


def test_under_autocast() -> None:
    layer = torch.nn.Linear(8, 8)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)
    b = torch.randn(4, 8)

    def run(adjoint: str) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            f = lambda x: torch.tanh(layer(x)).float() + b  # noqa: E731
            x = deqkit.solve(f, torch.zeros(4, 8), solver="reversible", adjoint=adjoint, rtol=1e-2).value
        return torch.autograd.grad(x.square().sum(), tuple(layer.parameters()))

    assert compare(run) < 1e-6


def test_first_and_second_derivatives_against_finite_differences() -> None:
    a, b = (t.clone().requires_grad_() for t in tanh(2, 2, radius=0.6).args)

    def value(a: Tensor, b: Tensor) -> Tensor:
        return deqkit.solve(tanh_layer, torch.zeros_like(b), args=(a, b), rtol=0, max_steps=6, **BOTH).value

    assert gradcheck(value, (a, b)) and gradgradcheck(value, (a, b))


def test_retained_graphs_and_several_solves_in_one_graph() -> None:
    eq = tanh(6, 2)
    b = eq.args[1].clone().requires_grad_()

    def value(b: Tensor, adjoint: str) -> Tensor:
        solver = deqkit.ReversibleIteration(damping=0.5)
        return deqkit.solve(eq.f, eq.x0, args=(eq.args[0], b), solver=solver, adjoint=adjoint, rtol=1e-3).value

    x = value(b, "reversible")
    first = torch.autograd.grad(x.sum(), b, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(x.sum(), b)[0])
    assert compare(lambda adjoint: torch.autograd.grad((value(b, adjoint) * value(2 * b, adjoint)).sum(), b)) < 1e-8
    nested = lambda adjoint: torch.autograd.grad(value(value(b, adjoint), adjoint).sum(), b)  # noqa: E731
    assert compare(nested) < 1e-8


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpointing(use_reentrant: bool) -> None:
    eq = tanh(6, 2)
    b = eq.args[1].clone().requires_grad_()
    run = lambda b: deqkit.solve(eq.f, eq.x0, args=(eq.args[0], b), **BOTH).value  # noqa: E731
    expected = torch.autograd.grad(run(b).sum(), b)[0]
    checkpoint(run, b, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(b.grad, expected)


def peak_memory(adjoint: Any, steps: int) -> float:
    """Of a forward and a backward pass, in states."""
    eq = linear(256, 64, radius=0.9)
    b = eq.args[1].clone().requires_grad_()
    f = lambda x: torch.sin(torch.sin(x)) @ eq.args[0].T + b  # noqa: E731
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        sol = deqkit.solve(f, eq.x0, solver="reversible", adjoint=adjoint, rtol=0, max_steps=steps, on_failure="ignore")
        sol.value.sum().backward()
    changes = [(e.start_ns(), e.nbytes()) for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak / (eq.x0.numel() * eq.x0.element_size())


def test_memory_is_flat_in_the_number_of_steps() -> None:
    """Every step but the first few would add its states: two to the unrolled graph, one to the checkpointed one."""
    assert peak_memory("unrolled", 30) > peak_memory("unrolled", 10) + 2 * 20
    assert peak_memory(deqkit.UnrolledAdjoint(checkpoint=True), 30) > 20
    few, many = peak_memory("reversible", 10), peak_memory("reversible", 30)
    assert 0 < many <= few + 1


def test_a_graph_is_freed_by_reference_counts_alone() -> None:
    b = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)

    class F:
        def __call__(self, x: Tensor) -> Tensor:
            return 0.5 * torch.tanh(x) + b

    gc.disable()
    try:
        for with_backward in (True, False):
            f = F()
            held = weakref.ref(f)
            x = deqkit.solve(f, torch.zeros(2, 3, dtype=torch.float64), **BOTH).value
            if with_backward:
                x.sum().backward()
            del f, x
            assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["dropout", "parameter"])
def test_another_function_in_the_backward_pass_is_refused(change: str) -> None:
    torch.manual_seed(0)
    layer, dropout = torch.nn.Linear(6, 6), torch.nn.Dropout(0.3 if change == "dropout" else 0.0)
    b = torch.ones(3, 6, requires_grad=True)
    f = lambda x: torch.tanh(0.3 * dropout(layer(x)) + b)  # noqa: E731
    x = deqkit.solve(f, torch.zeros(3, 6), rtol=0, max_steps=8, **BOTH).value
    if change == "parameter":
        with torch.no_grad():
            layer.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="f is not the function it was in the forward pass"):
        x.sum().backward()


def test_another_function_is_refused_where_the_best_point_was_not_the_last() -> None:
    """The backward pass then does not begin with the last evaluation; and a second one begins anew."""
    b, factor = torch.full((1, 1), 0.2, dtype=torch.float64, requires_grad=True), [-1.2]
    f = lambda x: factor[0] * torch.sin(x) + b  # noqa: E731
    x0 = torch.zeros_like(b).requires_grad_()
    sol = deqkit.solve(f, x0, rtol=0, max_steps=7, on_failure="ignore", trace=True, **BOTH)
    assert sol.trace is not None and sol.trace.argmin() == 2
    sol.value.backward(retain_graph=True)
    factor[0] = -1.1
    with pytest.raises(RuntimeError, match="f is not the function it was in the forward pass"):
        sol.value.backward()


def test_a_sample_that_leaves_the_domain_ends_there() -> None:
    """A step that was replaced by another could not be taken back."""
    b = torch.tensor([[0.3], [4.0], [0.1]], dtype=torch.float64, requires_grad=True)
    f = lambda x: torch.where(x <= 1, 0.5 * x + b, torch.nan)  # noqa: E731
    sol = deqkit.solve(f, torch.zeros_like(b), on_failure="ignore", **BOTH)
    assert sol.status.tolist() == [deqkit.Status.CONVERGED, deqkit.Status.NONFINITE, deqkit.Status.CONVERGED]
    assert sol.num_steps[1] == 1 and sol.value[1] == 0.0
    (grad,) = torch.autograd.grad(sol.value[[0, 2]].sum(), b)
    torch.testing.assert_close(grad[[0, 2]], torch.full((2, 1), 2.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_what_it_does_not_go_through_is_refused_by_name() -> None:
    b = torch.ones(2, 3)
    run = lambda b: deqkit.solve(lambda x: 0.5 * x + b, torch.zeros(2, 3), **BOTH).value.sum()  # noqa: E731
    for transform in (torch.func.grad(run), lambda b: torch.func.jvp(run, (b,), (b,))):
        with pytest.raises(
            NotImplementedError, match="torch.func does not go through adjoint='reversible'.*'unrolled'"
        ):
            transform(b)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="does not go through adjoint='reversible'"):
            run(torch.autograd.forward_ad.make_dual(b, b))


@pytest.mark.parametrize("settings", [{}, {"rtol": 0.0, "max_steps": 6}])
def test_compiled_around(settings: dict[str, Any]) -> None:
    b = torch.full((2, 3), 0.3, requires_grad=True)
    run = lambda b: deqkit.solve(lambda x: 0.5 * torch.tanh(x) + b, torch.zeros(2, 3), **BOTH, **settings).value * 1.0  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(g(b).sum(), b)[0] for g in (compiled, run)))


def test_as_a_layer() -> None:
    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(0.3 * self.linear(x) + inputs)
            return y, y.sum()

    layer = deqkit.nn.FixedPoint(Cell(), has_aux=True, keep=(2,), **BOTH)
    inputs = torch.randn(3, 4, requires_grad=True)
    (state, x), aux = layer(torch.zeros(3, 4), inputs)
    (state.sum() + x.sum() + aux).backward()
    assert inputs.grad is not None and layer.last_solution is not None and layer.last_solution.converged.all()
    with pytest.raises(ValueError, match="solver='anderson' does not record"):
        deqkit.nn.FixedPoint(Cell(), adjoint="reversible")
    x = deqkit.solve(lambda x: 0.5 * x + inputs[:0], torch.zeros(0, 4), **BOTH).value
    x.sum().backward()
