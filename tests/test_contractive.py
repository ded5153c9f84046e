"""Blocks that contract by construction: their bounds hold, and plain iteration keeps the rate they promise."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import deqkit
from deqkit.nn.contractive import ACTIVATIONS

Block = nn.Module
IMAGE = (3, 5, 6)


def contractive(bound: float = 0.8, **settings: Any) -> dict[str, tuple[Callable[[], Any], tuple[int, ...]]]:
    conv = lambda **extra: lambda: deqkit.nn.ContractiveConv2d(3, 3, bound, **settings | extra)  # noqa: E731
    return {
        "linear": (lambda: deqkit.nn.ContractiveLinear(6, bound, **settings), (6,)),
        "conv": (conv(), IMAGE),
        "conv, circular": (conv(padding_mode="circular"), IMAGE),
        "conv, reshaped": (conv(conv_bound="reshaped"), IMAGE),
        "conv, groups": (conv(groups=3), IMAGE),
    }


MONOTONE: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "linear": (lambda **kw: deqkit.nn.MonotoneLinear(6, **kw), (6,)),
    "conv": (lambda **kw: deqkit.nn.MonotoneConv2d(3, 3, **kw), IMAGE),
    "conv, reshaped": (lambda **kw: deqkit.nn.MonotoneConv2d(3, (3, 1), conv_bound="reshaped", **kw), IMAGE),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def jacobian_norm(block: Block, x: Tensor, inputs: Tensor) -> float:
    """|df/dx|_2 at one point, by the dense Jacobian."""
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x, inputs), x)
    return torch.linalg.matrix_norm(jacobian.reshape(x.numel(), -1).double(), 2).item()  # pyright: ignore


def worst_norm(block: Block, shape: tuple[int, ...], dtype: torch.dtype, points: int = 6) -> float:
    scales = [10.0 ** (i % 3 - 1) for i in range(points)]
    return max(
        jacobian_norm(block, s * torch.randn(1, *shape, dtype=dtype), s * torch.randn(1, *shape, dtype=dtype))
        for s in scales
    )


def expand(block: Block, shape: tuple[int, ...], dtype: torch.dtype, steps: int = 30) -> None:
    """Train the block to be no contraction."""
    optimizer = torch.optim.Adam(block.parameters(), lr=0.3)
    for _ in range(steps):
        x, y = (torch.randn(16, *shape, dtype=dtype) for _ in range(2))
        fx, fy = (block(z, torch.ones_like(z)) for z in (x, y))
        loss = -((fx - fy).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", contractive())
def test_the_bound_holds(kind: str, dtype: torch.dtype) -> None:
    """At random points, after training against it, in both modes, with weights loaded and blown up."""
    make, shape = contractive(0.8, dtype=dtype)[kind]
    block = make()
    assert block.bound == 0.8
    limit = 0.8 * (1 + 1e-6)
    assert worst_norm(block, shape, dtype) <= limit
    expand(block, shape, dtype)
    assert 0.5 * 0.8 < worst_norm(block, shape, dtype) <= limit  # it tried
    assert worst_norm(block.eval(), shape, dtype) <= limit
    fresh = make()
    fresh.load_state_dict({k: 100 * torch.randn_like(v) for k, v in block.state_dict().items()})
    assert worst_norm(fresh, shape, dtype) <= limit
    for other in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        assert worst_norm(other, shape, dtype) <= limit


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_activation_is_steeper_than_one(activation: str) -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)
    assert slope.abs().max() <= 1
    block = deqkit.nn.ContractiveLinear(4, 0.5, activation=activation)
    assert deqkit.nn.FixedPoint(block, rtol=1e-5)(torch.zeros(2, 4), torch.randn(2, 4)).isfinite().all()


def root_by_newton(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The fixed point by many plain steps, then Newton's with the dense Jacobian: no solver of deqkit's is asked."""
    identity = torch.eye(x.numel(), dtype=x.dtype)
    with torch.no_grad():
        for _ in range(4000):
            x = f(x)
    for _ in range(100):
        jacobian = torch.autograd.functional.jacobian(f, x).reshape(x.numel(), x.numel())  # pyright: ignore
        r = (f(x) - x).detach()
        if r.norm() < 1e-12:
            return x
        x = x + torch.linalg.solve(identity - jacobian, r.reshape(-1)).reshape(x.shape)
    raise AssertionError(f"Newton's method ends at a residual of {float(r.norm()):.1e}")


def errors_of_plain_iteration(block: Block, shape: tuple[int, ...], steps: int) -> list[float]:
    """|x_k - x*| for k = 0 .. steps."""
    x0, inputs = (torch.randn(1, *shape, dtype=torch.float64) for _ in range(2))
    with deqkit.nn.hold(block):
        solution = root_by_newton(lambda x: block(x, inputs), x0)
    with torch.no_grad():
        plain = deqkit.solve(
            block, x0, args=(inputs,), solver="fixed_point", rtol=0, max_steps=steps, keep=range(steps + 1)
        )
        return [(x - solution).norm().item() for x in plain.states.values()]


@pytest.mark.parametrize("kind", contractive())
def test_plain_iteration_keeps_the_rate(kind: str) -> None:
    make, shape = contractive(0.7, dtype=torch.float64)[kind]
    block = make()
    expand(block, shape, torch.float64, steps=10)
    errors = errors_of_plain_iteration(block, shape, 40)
    assert all(e <= 0.7**k * errors[0] + 1e-9 for k, e in enumerate(errors)) and errors[0] > 0.1
    layer = deqkit.nn.FixedPoint(block, solver="fixed_point", rtol=1e-4, max_steps=math.ceil(math.log(1e-5, 0.7)))
    layer(torch.zeros(5, *shape, dtype=torch.float64), torch.randn(5, *shape, dtype=torch.float64))
    assert layer.last_solution.converged.all()


@pytest.mark.parametrize("margin", [0.3, 1.0])
@pytest.mark.parametrize("kind", MONOTONE)
def test_monotone_blocks_contract(kind: str, margin: float) -> None:
    make, shape = MONOTONE[kind]
    block = make(margin=margin, dtype=torch.float64)
    for trained in (False, True):
        if trained:
            expand(block, shape, torch.float64)
        assert worst_norm(block, shape, torch.float64) <= block.rate < 1
    errors = errors_of_plain_iteration(block, shape, 40)
    rate = block.rate
    assert all(e <= rate**k * errors[0] + 1e-8 for k, e in enumerate(errors))


@pytest.mark.parametrize("kind", MONOTONE)
def test_monotone_blocks_have_the_fixed_point_of_their_network(kind: str) -> None:
    """x = relu(W x + b + inputs), with W written out; the iteration of that map itself diverges."""
    make, shape = MONOTONE[kind]
    block = make(dtype=torch.float64)
    with torch.no_grad():
        block.antisymmetric.weight.mul_(8)
        block.bias.normal_()
    n = torch.Size(shape).numel()
    zero = torch.zeros(1, *shape, dtype=torch.float64)

    def matrix(part: nn.Module) -> Tensor:
        return torch.autograd.functional.jacobian(part, zero).reshape(n, n)  # pyright: ignore

    a, b = matrix(block.symmetric), matrix(block.antisymmetric)
    w = -a.mT @ a + b - b.mT  # the margin is 1
    bias = block.bias if len(shape) == 1 else block.bias[:, None, None].expand(shape)
    inputs = torch.randn(20, *shape, dtype=torch.float64)
    sol = deqkit.solve(block, torch.zeros_like(inputs), args=(inputs,), solver="auto", rtol=1e-12, max_steps=2000)
    network = lambda x: torch.relu(x @ w.mT + (bias + inputs).reshape(20, n))  # noqa: E731
    flat = sol.value.reshape(20, n)
    torch.testing.assert_close(network(flat), flat, rtol=1e-8, atol=1e-9)
    symmetric_part = torch.linalg.eigvalsh(torch.eye(n) - (w + w.mT) / 2)
    assert symmetric_part.min() >= 1 - 1e-9
    x0, settings = torch.zeros_like(flat), {"rtol": 1e-6, "max_steps": 500, "on_failure": "ignore"}
    assert not deqkit.solve(network, x0, solver="fixed_point", **settings).converged.all()  # pyright: ignore


@pytest.mark.parametrize("kind", MONOTONE)
def test_gradients_of_monotone_blocks(kind: str) -> None:
    """The step size is held constant, which the gradient of the fixed point may not see: by finite differences."""
    make, shape = MONOTONE[kind]
    block = make(dtype=torch.float64)
    inputs = torch.randn(1, *shape, dtype=torch.float64)

    def loss(scale: Tensor) -> Tensor:
        parts = {name: p * (1 + scale * direction[name]) for name, p in block.named_parameters()}
        f = lambda x: torch.func.functional_call(block, parts, (x, inputs))  # noqa: E731
        return deqkit.solve(f, torch.zeros_like(inputs), rtol=1e-12, max_steps=2000).value.square().sum()

    direction = {name: torch.randn_like(p) for name, p in block.named_parameters()}
    assert torch.autograd.gradcheck(loss, torch.zeros((), dtype=torch.float64, requires_grad=True))


def test_the_step_size_is_computed_once_per_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    block, count = deqkit.nn.MonotoneLinear(6), []
    bound = block._norm_bound
    monkeypatch.setattr(block, "_norm_bound", lambda: count.append(0) or bound())
    layer = deqkit.nn.FixedPoint(block)
    layer(torch.zeros(2, 6), torch.randn(2, 6)).sum().backward()
    assert len(count) == 1 and layer.last_solution.num_fn_evals > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    for block, shape in (
        (deqkit.nn.ContractiveLinear(16, 0.7, dtype=dtype), (16,)),
        (deqkit.nn.ContractiveConv2d(4, 3, 0.7, dtype=dtype), (4, 6, 6)),
        (deqkit.nn.MonotoneLinear(16, dtype=dtype), (16,)),
    ):
        layer = deqkit.nn.FixedPoint(block, rtol=2e-2)
        out = layer(torch.zeros(3, *shape, dtype=dtype), torch.randn(3, *shape, dtype=dtype))
        out.float().square().sum().backward()
        assert out.dtype == dtype and layer.last_solution.converged.all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    full = deqkit.nn.FixedPoint(deqkit.nn.ContractiveLinear(16, 0.7), rtol=2e-2)
    with torch.autocast("cpu", dtype):
        assert full(torch.zeros(3, 16), torch.randn(3, 16)).isfinite().all()


def test_training_with_the_layer() -> None:
    block = deqkit.nn.ContractiveConv2d(3, 3, 0.9, activation="tanh")
    layer = deqkit.nn.FixedPoint(block, rtol=1e-4)
    inputs, target = torch.randn(8, 3, 5, 5), torch.randn(8, 3, 5, 5).tanh()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(torch.zeros_like(inputs), inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and repr(block).startswith("ContractiveConv2d(\n  bound=0.9, activation='tanh'")


def test_a_block_without_its_cap_is_bounded_by_nothing() -> None:
    block = deqkit.nn.ContractiveLinear(4, 0.7)
    assert block.bound == 0.7
    parametrize.remove_parametrizations(block.layer, "weight")
    assert block.bound == float("inf") and "bound=inf" in repr(block)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: deqkit.nn.ContractiveLinear(4, 1.0), ValueError, "bound must lie between 0 and 1, got 1.0"),
        (lambda: deqkit.nn.ContractiveLinear(4, True), TypeError, "bound must be a number, got True"),
        (lambda: deqkit.nn.ContractiveLinear(4, activation="gelu"), ValueError, "unknown activation 'gelu'"),
        (lambda: deqkit.nn.ContractiveConv2d(4, 2), ValueError, "kernel_size must be odd"),
        (lambda: deqkit.nn.ContractiveConv2d(4, padding_mode="reflect"), ValueError, "padding_mode='reflect'"),  # pyright: ignore
        (lambda: deqkit.nn.MonotoneLinear(4, 0.0), ValueError, "margin must be positive and finite, got 0.0"),
        (lambda: deqkit.nn.MonotoneConv2d(4, margin="1"), TypeError, "margin must be a number, got '1'"),  # pyright: ignore
        (lambda: deqkit.nn.MonotoneConv2d(4, conv_bound="svd"), ValueError, "unknown conv_bound 'svd'"),  # pyright: ignore
    ],
)
def test_bad_settings(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
