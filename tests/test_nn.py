"""The layer deqkit.nn.FixedPoint, states of the trajectory, and the auxiliary output."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from equations import affine, linear, tanh, tanh_layer
from torch import nn

import deqkit

TIGHT = {"rtol": 1e-12, "max_steps": 200}


class Cell(nn.Module):
    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=torch.float64)
        nn.init.orthogonal_(self.linear.weight, gain=0.7)

    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) + inputs)


class TellingCell(Cell):
    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> Any:
        fx = super().forward(x, inputs)
        return fx, {"norm": fx.norm(dim=1)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(n: int = 6, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(size, n, dtype=torch.float64), torch.randn(size, n, dtype=torch.float64)


def test_the_layer_is_a_solve() -> None:
    cell = Cell()
    layer = deqkit.nn.FixedPoint(cell, **TIGHT)
    x0, inputs = batch()
    x = layer(x0, inputs)
    expected = deqkit.solve(cell, x0, args=(inputs,), **TIGHT)
    assert torch.equal(x, expected.value)
    (mine,) = torch.autograd.grad(x.square().sum(), cell.linear.weight)
    (theirs,) = torch.autograd.grad(expected.value.square().sum(), cell.linear.weight)
    torch.testing.assert_close(mine, theirs)
    last = layer.last_solution
    assert last is not None and last.converged.all() and not last.value.requires_grad
    assert last.adjoint_stats.converged is not None and last.adjoint_stats.converged.all()


def test_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = deqkit.nn.FixedPoint(Cell(), **TIGHT)
    layer.to_empty(device="cpu").load_state_dict(deqkit.nn.FixedPoint(Cell()).state_dict())
    layer(*batch())
    assert layer.last_solution is not None and layer.last_solution.converged.all()


def test_it_trains() -> None:
    layer = deqkit.nn.FixedPoint(Cell())
    x0, inputs = batch(size=16)
    target = torch.randn(16, 6, dtype=torch.float64).tanh()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (layer(x0, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_limits_of_both_modes() -> None:
    layer = deqkit.nn.FixedPoint(Cell(), rtol=0, atol=0, max_steps=7, eval_max_steps=3)
    x0, inputs = batch()
    layer(x0, inputs)
    assert layer.last_solution.num_steps.tolist() == [7] * 3
    layer.eval()(x0, inputs)
    assert layer.last_solution.num_steps.tolist() == [3] * 3
    assert layer.settings["max_steps"] == 3 and "max_steps=3" in repr(layer)


def test_copies_and_pickles_come_without_the_last_solution() -> None:
    layer = deqkit.nn.FixedPoint(Cell())
    x0, inputs = batch()
    x = layer(x0, inputs)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.last_solution is None and torch.equal(other(x0, inputs), x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = deqkit.nn.FixedPoint(Cell())
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x0, inputs), x) and list(layer.state_dict()) == [
        "module.linear.weight",
        "module.linear.bias",
    ]


def test_warm_start() -> None:
    layer = deqkit.nn.FixedPoint(Cell(), warm_start=True)
    x0, inputs = batch()
    layer(x0, inputs)
    cold = layer.last_solution.num_steps
    layer(x0, inputs + 1e-6)
    assert (layer.last_solution.num_steps == 0).all() and (cold > 3).all()
    layer.reset()
    assert layer.last_solution is None
    layer(x0, inputs)
    assert torch.equal(layer.last_solution.num_steps, cold)
    layer(x0[:2], inputs[:2])  # another batch size: from x0
    assert torch.equal(layer.last_solution.num_steps, cold[:2])


def test_warm_start_of_a_fixed_number_of_steps() -> None:
    layer = deqkit.nn.FixedPoint(
        _Scaled(torch.tensor(0.5)), solver="fixed_point", warm_start=True, rtol=0.0, max_steps=4
    )
    x0 = torch.zeros(2, 3)
    first, second = (layer(x0) for _ in range(2))  # the way to 4 is halved by every step
    assert torch.equal(first, x0 + 4 - 4 / 2**4) and torch.equal(second, x0 + 4 - 4 / 2**8)


def test_warm_start_leaves_out_what_did_not_converge() -> None:
    gain = torch.tensor([[0.5], [-3.0]])
    layer = deqkit.nn.FixedPoint(
        _Scaled(gain), solver="fixed_point", warm_start=True, on_failure="ignore", max_steps=20
    )
    x0 = torch.ones(2, 1)
    layer(x0)
    starts: list[torch.Tensor] = []
    layer.module.register_forward_pre_hook(lambda _, args: starts.append(args[0].clone()))
    layer(x0)
    assert starts[0][1].item() == 1.0 and starts[0][0].item() == pytest.approx(4.0, rel=1e-3)


class _Scaled(nn.Module):
    def __init__(self, gain: torch.Tensor) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x + 2


def test_states_and_aux_of_the_layer() -> None:
    layer = deqkit.nn.FixedPoint(TellingCell(), keep=(2, 1), has_aux=True)
    x0, inputs = batch()
    states, aux = layer(x0, inputs)
    assert len(states) == 3 and torch.equal(states[-1], layer.last_solution.value)
    torch.testing.assert_close(states[0], layer.module(x0, inputs)[0])
    assert set(aux) == {"norm"} and aux["norm"].requires_grad
    assert not layer.last_solution.aux["norm"].requires_grad and not layer.last_solution.states[1].requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "newton"}, "unknown solver 'newton'"),
        ({"adjoint": "exact"}, "unknown adjoint 'exact'"),
        ({"rtol": -1.0}, "rtol must be finite and not negative"),
        ({"eval_max_steps": -1}, "max_steps must not be negative"),
        ({"warm_start": 1}, "warm_start must be True or False"),
        ({"keep": 3}, "keep must be the numbers of some steps"),
        ({"has_aux": "yes"}, "has_aux must be True or False"),
        ({"norm": "max"}, "unknown norm 'max'"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        deqkit.nn.FixedPoint(Cell(), **settings)


def test_the_module_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        deqkit.nn.FixedPoint(lambda x: x)  # pyright: ignore[reportArgumentType]


def test_states_are_those_of_the_trajectory() -> None:
    eq = tanh()
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver="fixed_point", keep=[0, 2, 500], max_steps=300)
    assert list(sol.states) == [0, 2, 500]
    assert torch.equal(sol.states[0], eq.x0) and torch.equal(sol.states[500], sol.value)
    torch.testing.assert_close(sol.states[2], eq.f(eq.f(eq.x0, *eq.args), *eq.args))


def test_a_sample_that_has_ended_shows_its_value() -> None:
    """Rates of convergence far apart: by step 10 the first sample has long been frozen."""
    rates = torch.tensor([[0.01], [0.9]], dtype=torch.float64)
    f = lambda x: rates * x + 1  # noqa: E731
    sol = deqkit.solve(f, torch.zeros(2, 1, dtype=torch.float64), solver="fixed_point", keep=[10], max_steps=100)
    assert torch.equal(sol.states[10][0], sol.value[0]) and sol.states[10][1] < 0.99 * sol.value[1]


@pytest.mark.parametrize("adjoint", ["implicit", "jfb", "unrolled"])
def test_gradients_of_states(adjoint: str) -> None:
    """The chosen adjoint, also where the solve ends before the step that was asked for."""
    a, b = (t.clone().requires_grad_() for t in tanh(3, 2, radius=0.6).args)

    def gradient(keep: list[int], pick: Any) -> torch.Tensor:
        sol = deqkit.solve(tanh_layer, torch.zeros_like(b), args=(a, b), adjoint=adjoint, keep=keep, **TIGHT)
        return torch.autograd.grad(pick(sol).square().sum(), a)[0]

    at_the_end = gradient([], lambda sol: sol.value)
    torch.testing.assert_close(gradient([150], lambda sol: sol.states[150]), at_the_end)
    assert gradient([1], lambda sol: sol.states[1]).abs().sum() != at_the_end.abs().sum()
    if adjoint == "unrolled":
        plain = deqkit.solve(
            tanh_layer, torch.zeros_like(b), args=(a, b), adjoint=adjoint, keep=[2], solver="fixed_point", **TIGHT
        )
        twice = tanh_layer(tanh_layer(torch.zeros_like(b), a, b), a, b)
        mine = torch.autograd.grad(plain.states[2].square().sum(), a)[0]
        torch.testing.assert_close(mine, torch.autograd.grad(twice.square().sum(), a)[0])


def test_aux_is_that_of_the_value_and_is_differentiable() -> None:
    eq = linear(4, 2, radius=0.5)
    a, b = (t.clone().requires_grad_() for t in eq.args)

    def f(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        fx = affine(x, a, b)
        return fx, fx.square().sum()

    calls: list[int] = []
    sol = deqkit.solve(lambda *xs: (calls.append(0), f(*xs))[1], eq.x0, args=(a, b), has_aux=True, **TIGHT)
    assert len(calls) == sol.num_fn_evals
    torch.testing.assert_close(sol.aux, sol.value.square().sum())
    (mine,) = torch.autograd.grad(sol.aux, a)
    (expected,) = torch.autograd.grad(deqkit.solve(affine, eq.x0, args=(a, b), **TIGHT).value.square().sum(), a)
    torch.testing.assert_close(mine, expected)


def test_aux_needs_a_pair() -> None:
    with pytest.raises(TypeError, match=r"has_aux=True: f must return a pair \(f\(x\), aux\), got Tensor"):
        deqkit.solve(lambda x: 0.5 * x, torch.ones(2, 2), has_aux=True)
