"""Penalties on df/dx, the correction loss and schedules: values and gradients against dense Jacobians."""

from __future__ import annotations

import copy
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from equations import matrix
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import deqkit

PENALTIES: dict[str, Callable[..., Tensor]] = {
    "jacobian_penalty": deqkit.jacobian_penalty,
    "spectral_norm_penalty": lambda *args, **kwargs: deqkit.spectral_norm_penalty(*args, target=0.1, **kwargs),
}


class Cell(nn.Module):
    """tanh(W x + V b)."""

    def __init__(self, n: int = 5, gain: float = 0.8, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = nn.Linear(n, n, dtype=dtype), nn.Linear(n, n, bias=False, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(gain * torch.randn(p.shape, dtype=torch.float64, generator=generator) / n**0.5)

    def forward(self, x: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) + self.outer(b))


def problem(batch: int = 3, n: int = 5, **settings: Any) -> tuple[Cell, Tensor, Tensor]:
    """A cell, a point and its input."""
    generator = torch.Generator().manual_seed(1)
    x, b = (torch.randn(batch, n, dtype=torch.float64, generator=generator) for _ in range(2))
    return Cell(n, **settings), x, b.requires_grad_()


def jacobians(f: Callable[..., Tensor], x: Tensor, *args: Tensor) -> Tensor:
    """df/dx per sample, (B, D, D), as differentiable functions of all that f depends on."""
    rows = []
    x = x.detach().requires_grad_() if not x.requires_grad else x.view_as(x)
    fx = f(x, *args)
    for i in range(x.shape[1]):
        rows.append(torch.autograd.grad(fx[:, i].sum(), x, create_graph=True)[0])
    return torch.stack(rows, dim=1)


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


# The Jacobian penalty


def check_unbiased(draws: Tensor, expected: Tensor) -> None:
    """The mean of independent draws (N, K) against what it should be (K,), in its own standard errors."""
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    off = (draws.mean(dim=0) - expected).abs()
    # Each is nearly normal: of a hundred, one exceeds 4 standard errors once in 150 tests.
    assert (off <= 4 * standard_error + 1e-12).all()
    assert (standard_error[0] < 0.1 * expected[0]).all()  # a bound that no wrong factor would pass


def test_jacobian_penalty_is_unbiased() -> None:
    """Value and gradient against the dense Frobenius norm."""
    f, x, b = problem()
    tensors = [*f.parameters(), b]
    true = (jacobians(f, x, b).square().sum(dim=(1, 2)) / 5).mean()
    expected = torch.cat([t.detach().flatten() for t in (true, *gradients(true, tensors))])
    generator = torch.Generator().manual_seed(2)
    draws = []
    for _ in range(400):
        penalty = deqkit.jacobian_penalty(f, x, (b,), generator=generator)
        draws.append(torch.cat([t.detach().flatten() for t in (penalty, *gradients(penalty, tensors))]))
    check_unbiased(torch.stack(draws), expected)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_gradient_with_given_probes_is_that_of_the_dense_formula(num_probes: int) -> None:
    f, x, b = problem()
    tensors = [*f.parameters(), b]
    penalty = deqkit.jacobian_penalty(f, x, (b,), num_probes, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    v = torch.stack([2.0 * torch.randint(0, 2, (3, 5), generator=generator) - 1 for _ in range(num_probes)]).double()
    images = torch.einsum("pbi,bij->pbj", v, jacobians(f, x, b))
    dense = images.square().sum(-1).mean(0).mean() / 5
    torch.testing.assert_close(penalty, dense, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(penalty, tensors), gradients(dense, tensors), rtol=1e-10, atol=1e-14)
    assert not all((g == 0).all() for g in gradients(penalty, tensors))


def test_signs_have_less_variance_than_gaussian_probes() -> None:
    """For J = 0.5 I they are exact."""
    penalty = deqkit.jacobian_penalty(lambda x: 0.5 * x, torch.zeros(4, 9), reduction="none")
    assert penalty.tolist() == [0.25] * 4


# The spectral norm penalty


@pytest.mark.parametrize("target", [0.0, 0.3])
def test_spectral_norm_penalty_against_dense_singular_values(target: float) -> None:
    """With as many steps as numbers, u is right, and so are value and gradient."""
    f, x, b = problem()
    tensors = [*f.parameters(), b]
    penalty = deqkit.spectral_norm_penalty(f, x, (b,), target, num_steps=5)
    norms = torch.linalg.matrix_norm(jacobians(f, x, b), 2)
    assert (norms > target).any()
    dense = torch.relu(norms - target).mean()
    torch.testing.assert_close(penalty, dense, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients(penalty, tensors), gradients(dense, tensors), rtol=1e-6, atol=1e-9)


def test_below_the_target_there_is_neither_penalty_nor_gradient() -> None:
    f, x, b = problem()
    penalty = deqkit.spectral_norm_penalty(f, x, (b,), target=10.0)
    assert penalty.item() == 0 and all((g == 0).all() for g in gradients(penalty, list(f.parameters())))


def test_few_steps_already_come_close_and_never_exceed() -> None:
    f, x, b = problem(batch=8, n=60, gain=1.0)
    true = torch.linalg.matrix_norm(jacobians(f, x, b), 2).detach()
    last = torch.zeros_like(true)
    for num_steps in (1, 3, 5, 10, 60, 100):
        torch.manual_seed(0)
        found = deqkit.spectral_norm_penalty(f, x, (b,), 0.0, num_steps=num_steps, reduction="none").detach()
        assert (found <= true * (1 + 1e-9)).all() and (found >= last * (1 - 1e-9)).all()
        last = found
        if num_steps == 5:
            assert (found > 0.9 * true).all()
    torch.testing.assert_close(last, true, rtol=1e-8, atol=0)


# What holds for both


@pytest.mark.parametrize("penalty", PENALTIES)
def test_x_is_a_constant_unless_told_otherwise(penalty: str) -> None:
    function = PENALTIES[penalty]
    f, x, b = problem()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    loss = function(f, x * scale, (b,))
    assert torch.autograd.grad(loss, scale, allow_unused=True)[0] is None

    def at(scale: Tensor, **settings: Any) -> Tensor:
        torch.manual_seed(0)
        return function(f, x * scale, (b,), **settings)

    assert torch.autograd.gradcheck(lambda s: at(s, through_x=True), (scale,))
    assert torch.equal(at(scale, through_x=True), loss)
    assert torch.equal(at(scale.detach(), through_x=True), loss)  # which has no way through x to offer


@pytest.mark.parametrize("penalty", PENALTIES)
def test_through_the_backward_pass_of_a_solve(penalty: str) -> None:
    """The whole derivative at x*(theta), x* included, against differences."""
    f, _, b = problem(gain=0.4)

    def at(b: Tensor) -> Tensor:
        sol = deqkit.solve(f, torch.zeros_like(b), args=(b,), rtol=1e-13, max_steps=100)
        torch.manual_seed(0)
        return PENALTIES[penalty](f, sol.value, (b,), through_x=True)

    assert torch.autograd.gradcheck(at, (b,), atol=1e-7)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_line_in_a_training_loop(penalty: str) -> None:
    """At the solution and at a random step; every parameter gets a gradient, the radius falls, the task is learnt."""
    torch.manual_seed(0)
    cell = Cell(8, gain=1.2, dtype=torch.float32)
    layer = deqkit.nn.FixedPoint(cell, max_steps=60, on_failure="ignore", keep=(2,))
    inputs = torch.randn(16, 8)
    target = torch.tanh(inputs.flip(1))
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    schedule = deqkit.LinearSchedule(0.0, 1.0, steps=20)
    before = deqkit.spectral_norm(cell, layer(torch.zeros(16, 8), inputs)[-1], (inputs,)).mean()
    losses = []
    for step in range(60):
        kept, x = layer(torch.zeros(16, 8), inputs)
        point = x if step % 2 else kept
        task = (x - target).square().mean()
        loss = task + schedule(step) * PENALTIES[penalty](cell, point, (inputs,))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())
        optimizer.step()
        losses.append(task.item())
    after = deqkit.spectral_norm(cell, x, (inputs,)).mean()
    assert after < 0.6 * before and losses[-1] < 0.7 * losses[0]


def test_the_penalty_alone_reaches_every_parameter_that_the_jacobian_depends_on() -> None:
    f, x, b = problem()
    for function in PENALTIES.values():
        f.zero_grad()
        function(f, x, (b,)).backward()
        assert all(p.grad is not None and (p.grad != 0).any() for p in f.parameters())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_without_gradients_the_value_is_the_same_and_has_no_graph(penalty: str) -> None:
    f, x, b = problem()
    values = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with context():
            values.append(PENALTIES[penalty](f, x, (b,)))
    assert values[0].requires_grad and not values[1].requires_grad and not values[2].requires_grad
    assert values[0].item() == values[1].item() == values[2].item()
    f.eval()
    torch.manual_seed(0)
    assert PENALTIES[penalty](f, x, (b,)).item() == values[0].item()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_reduction_and_batch_dims(penalty: str, batch_dims: int) -> None:
    f, x, b = problem(batch=6)
    shape = (6,) if batch_dims == 1 else (2, 3)[:batch_dims]
    x, b = (t.reshape(*shape, -1)[..., :5] if batch_dims else t[0] for t in (x, b))
    for reduction, expected in (("none", shape), ("mean", ())):
        torch.manual_seed(0)
        value = PENALTIES[penalty](f, x, (b,), batch_dims=batch_dims, reduction=reduction)
        assert value.shape == expected
        if reduction == "none":
            each = value
    torch.testing.assert_close(value, each.mean())
    assert (each > 0).all()


def pytree(x: dict[str, Tensor], w: Tensor) -> dict[str, Tensor]:
    """Not holomorphic in its complex leaf."""
    return {"a": torch.tanh(x["a"] @ w) + x["c"].real, "c": 0.5j * x["c"] + 0.3 * x["c"].conj() * x["a"]}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_pytrees_and_complex_states(penalty: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {} if penalty == "jacobian_penalty" else {"num_steps": 9}
    generator = torch.Generator().manual_seed(0)
    w = matrix(3, 0.8, seed=0).requires_grad_()
    a, c = (torch.randn(2, 3, dtype=d, generator=generator) for d in (torch.float64, torch.complex128))

    def real(v: Tensor, w: Tensor) -> Tensor:
        out = pytree({"a": v[:, :3], "c": torch.view_as_complex(v[:, 3:].reshape(-1, 3, 2).contiguous())}, w)
        return torch.cat([out["a"], torch.view_as_real(out["c"]).reshape(-1, 6)], dim=1)

    dense = jacobians(real, torch.cat([a, torch.view_as_real(c).reshape(-1, 6)], dim=1), w)
    if penalty == "jacobian_penalty":
        true = dense.square().sum((1, 2)).mean() / 9
    else:
        true = torch.linalg.matrix_norm(dense, 2).mean() - 0.1
    expected = torch.cat([true.detach().reshape(1), gradients(true, [w])[0].flatten()])
    draws = []
    for _ in range(300 if penalty == "jacobian_penalty" else 1):
        value = PENALTIES[penalty](pytree, {"a": a, "c": c}, (w,), **settings)
        draws.append(torch.cat([value.detach().reshape(1), gradients(value, [w])[0].flatten()]))
    if penalty == "jacobian_penalty":
        check_unbiased(torch.stack(draws), expected)
    else:
        torch.testing.assert_close(draws[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(penalty: str, dtype: torch.dtype) -> None:
    """The same draws, the same value and gradient up to the dtype's resolution; values in float32."""
    f, x, b = problem(batch=4, n=16)
    low = copy.deepcopy(f).to(dtype)
    results = []
    for cell, t in ((f, torch.float64), (low, dtype)):
        torch.manual_seed(0)
        value = PENALTIES[penalty](cell, x.to(t), (b.detach().to(t),))
        value.backward()
        grads = [p.grad for p in cell.parameters()]
        assert all(g is not None and g.dtype == t for g in grads)
        results.append((value, torch.cat([g.double().flatten() for g in grads if g is not None])))
    assert results[1][0].dtype == torch.float32
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(results[1][0].double(), results[0][0], rtol=tolerance, atol=0)
    assert (results[1][1] - results[0][1]).norm() < tolerance * results[0][1].norm()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_autocast(penalty: str) -> None:
    f, x, b = problem(n=16, dtype=torch.float32)
    x, b = x.float(), b.detach().float()
    results = []
    for enabled in (False, True):
        f.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = PENALTIES[penalty](f, x, (b,))
        assert value.dtype == torch.float32
        value.backward()
        results.append((value, torch.cat([p.grad.flatten() for p in f.parameters() if p.grad is not None])))
    assert results[0][1].shape == results[1][1].shape and results[0][0] != results[1][0]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.1, atol=0)
    assert (results[1][1] - results[0][1]).norm() < 0.1 * results[0][1].norm()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_sample_that_is_not_finite_is_nan_and_alone(penalty: str) -> None:
    f, x, b = problem()
    spoilt = x.clone()
    spoilt[1] = torch.nan
    values = []
    for point in (x, spoilt):
        torch.manual_seed(0)
        values.append(PENALTIES[penalty](f, point, (b,), reduction="none"))
    assert torch.equal(values[0][[0, 2]], values[1][[0, 2]]) and values[1][1].isnan()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_nothing_to_penalise(penalty: str) -> None:
    """No dependence on x, an empty batch, no numbers: zero, and a backward pass that goes through."""
    w = torch.ones(3, requires_grad=True)

    def never(x: Tensor) -> Tensor:
        raise AssertionError("called for nothing")

    for f, x in (
        (lambda x: w.expand(2, 3), torch.zeros(2, 3)),
        (lambda x: x.detach() * w, torch.zeros(2, 3)),
        (lambda x: 0 * w * x, torch.ones(2, 3)),
        (never, torch.zeros(0, 3)),
        (lambda x: x, torch.zeros(2, 0)),
    ):
        value = PENALTIES[penalty](f, x)
        assert value.item() == 0
        (value + w.sum()).backward()
        assert w.grad is not None and w.grad.isfinite().all()
        assert PENALTIES[penalty](f, x, reduction="none").shape == x.shape[:1]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_random_numbers(penalty: str) -> None:
    """From the global generator, as those of dropout, or from the caller's, and then the global one stays put."""
    f, x, b = problem(n=20)
    draw = lambda **settings: PENALTIES[penalty](f, x, (b,), **settings).item()  # noqa: E731
    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert first == draw() and first != second
    before = torch.get_rng_state()
    seeded = [draw(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2] and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_inside_a_compiled_step(penalty: str) -> None:
    """Where f itself must not be compiled, for what is compiled has no second derivative."""
    torch._dynamo.reset()
    f, x, b = problem()

    def step(x: Tensor, b: Tensor) -> Tensor:
        return x.square().mean() + PENALTIES[penalty](f, x, (b,))

    torch.manual_seed(0)
    expected = step(x, b)
    torch.manual_seed(0)
    found = torch.compile(step, backend="aot_eager")(x, b)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, list(f.parameters())), gradients(expected, list(f.parameters())))


def _train_on_one_rank(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.save(_penalised_gradients(rank, DistributedDataParallel), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _penalised_gradients(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
    """Of task and both penalties, on the share of one rank."""
    layer = deqkit.nn.FixedPoint(Cell(gain=0.5), rtol=1e-12, max_steps=100)
    inputs = problem(batch=4)[2].detach()[2 * rank : 2 * rank + 2]
    wrapped = wrap(layer)  # which must live until the backward pass
    x = wrapped(torch.zeros_like(inputs), inputs)
    loss = x.square().mean()
    for penalty in PENALTIES.values():
        loss = loss + penalty(layer.module, x, (inputs,), generator=torch.Generator().manual_seed(rank))
    loss.backward()
    return [p.grad for p in layer.parameters() if p.grad is not None]


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """The gradients of both terms are averaged over the ranks, those of all parameters."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_train_on_one_rank, (port, tmp_path), nprocs=2)  # pyright: ignore
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = [_penalised_gradients(rank, lambda m: m) for rank in range(2)]
    expected = [(a + b) / 2 for a, b in zip(*alone, strict=True)]
    assert len(expected) == 3
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reduction": "sum"}, ValueError, "unknown reduction 'sum': choose one of"),
        ({"through_x": 1}, TypeError, "through_x must be True or False"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None"),
        ({"args": torch.zeros(1)}, TypeError, "args must be a tuple"),
        ({"batch_dims": 3}, ValueError, "fewer dims than batch_dims=3"),
        ({"f": None}, TypeError, "f must be callable"),
    ],
)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_bad_settings_are_named(penalty: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"f": lambda x: 0.5 * x, "args": ()} | settings
    with pytest.raises(error, match=message):
        PENALTIES[penalty](given.pop("f"), torch.zeros(2, 3), given.pop("args"), **given)


def test_bad_numbers_are_named() -> None:
    f, x = lambda x: 0.5 * x, torch.zeros(2, 3)
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        deqkit.jacobian_penalty(f, x, (), 0)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        deqkit.spectral_norm_penalty(f, x, num_steps=0)
    with pytest.raises(TypeError, match="target must be a number, got 'low'"):
        deqkit.spectral_norm_penalty(f, x, (), "low")  # pyright: ignore


# The correction loss


def test_correction_loss_is_the_weighted_sum() -> None:
    states = [torch.tensor([float(i)], requires_grad=True) for i in (1, 2, 4)]
    loss = deqkit.correction_loss(states, torch.Tensor.sum, discount=0.5)
    assert loss.item() == 0.25 * 1 + 0.5 * 2 + 1 * 4
    loss.backward()
    assert [s.grad.item() for s in states if s.grad is not None] == [0.25, 0.5, 1.0]
    assert deqkit.correction_loss(states, torch.Tensor.sum, weights=(3, 0, -1)).item() == -1.0
    assert deqkit.correction_loss(states[:1], torch.Tensor.sum, discount=0.0).item() == 1.0
    assert deqkit.correction_loss(states, torch.Tensor.sum).item() == pytest.approx(0.64 + 1.6 + 4)
    by_step = {20: states[2], 3: states[0], 10: states[1]}  # an order of its own
    assert deqkit.correction_loss(by_step, torch.Tensor.sum, discount=0.5).item() == 5.25
    per_sample = deqkit.correction_loss([{"x": torch.ones(2)}] * 2, lambda s: s["x"], weights=[1, 2])
    assert per_sample.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("adjoint", ["implicit", "jfb", "unrolled"])
def test_correction_loss_of_a_layer_and_of_a_solution(adjoint: str) -> None:
    f, _, b = problem(gain=0.5)
    task = lambda x: (x - 0.3).square().mean()  # noqa: E731
    settings: dict[str, Any] = {"adjoint": adjoint, "rtol": 1e-10, "max_steps": 100, "keep": (1, 4)}
    layer = deqkit.nn.FixedPoint(f, **settings)
    loss = deqkit.correction_loss(layer(torch.zeros_like(b), b), task)
    sol = deqkit.solve(f, torch.zeros_like(b), args=(b,), **settings)
    assert loss == deqkit.correction_loss([*sol.states.values(), sol.value], task)
    expected = 0.64 * task(sol.states[1]) + 0.8 * task(sol.states[4]) + task(sol.value)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    found, wanted = gradients(loss, list(f.parameters())), gradients(expected, list(f.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    early = deqkit.correction_loss(sol.states, task)
    assert early == 0.8 * task(sol.states[1]) + task(sol.states[4])


def test_correction_loss_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no states to correct: ask the solve for some with keep="):
        deqkit.correction_loss({}, torch.Tensor.sum)
    with pytest.raises(ValueError, match="one weight for each of the 1 states, got 2"):
        deqkit.correction_loss([torch.ones(1)], torch.Tensor.sum, weights=[1, 2])
    with pytest.raises(ValueError, match=r"discount must be in \[0, 1\], got 1.5"):
        deqkit.correction_loss([torch.ones(1)], torch.Tensor.sum, discount=1.5)
    with pytest.raises(TypeError, match="every weight must be a number"):
        deqkit.correction_loss([torch.ones(1)], torch.Tensor.sum, weights=["a"])  # pyright: ignore
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        deqkit.correction_loss([torch.ones(1)], 3)  # pyright: ignore


# Schedules


def test_schedules() -> None:
    linear = deqkit.LinearSchedule(0.0, 1.0, steps=4, begin=2)
    assert [linear(i) for i in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    falling = deqkit.CosineSchedule(2.0, 0.0, steps=4)
    assert [falling(i) for i in (-1, 0, 1, 2, 4, 9)] == pytest.approx([2, 2, 1 + 0.5**0.5, 1, 0, 0])
    assert linear(3.5) == 0.375
    assert [deqkit.ConstantSchedule(0.3)(i) for i in (0, 100)] == [0.3, 0.3]
    steps = deqkit.StepSchedule((0.0, 1.0, 0.5), milestones=(10, 20))
    assert [steps(i) for i in (0, 9, 10, 19, 20, 99)] == [0, 0, 1, 1, 0.5, 0.5]
    for schedule in (linear, falling, steps, deqkit.ConstantSchedule(1)):
        assert isinstance(schedule, deqkit.Schedule) and isinstance(schedule(0), float)
        assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    with pytest.raises(AttributeError):
        linear.start = 3.0  # pyright: ignore


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: deqkit.LinearSchedule(0, 1, steps=0), ValueError, "LinearSchedule: steps must be at least 1"),
        (lambda: deqkit.CosineSchedule(0, 1, 5, begin=-1), ValueError, "CosineSchedule: begin must be at least 0"),
        (lambda: deqkit.LinearSchedule("0", 1, 5), TypeError, "LinearSchedule: start must be a number"),
        (lambda: deqkit.ConstantSchedule(float("nan")), ValueError, "ConstantSchedule: value must be in"),
        (lambda: deqkit.StepSchedule((1, 2), (3, 4)), ValueError, "one value more than milestones, got 2 and 2"),
        (lambda: deqkit.StepSchedule((1, 2, 3), (4, 4)), ValueError, "milestones must rise"),
        (lambda: deqkit.StepSchedule((1, None), (4,)), TypeError, "StepSchedule: values must be a number"),
        (lambda: deqkit.ConstantSchedule(1)("2"), TypeError, "step must be a number"),
    ],
)
def test_bad_schedules_are_named(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
