"""Variational dropout: one mask per solve, the same in every evaluation and in the backward pass."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import deqkit
from deqkit.solvers import SOLVERS

TIGHT: dict[str, Any] = {"rtol": 1e-13, "max_steps": 300}
GENERAL = [name for name, solver in SOLVERS.items() if not solver.for_affine]


class Cell(nn.Module):
    """tanh(D W x + inputs) with dropout D and |W| = 0.4, so that it contracts under any mask of rate 0.5."""

    def __init__(self, n: int = 6, p: float = 0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=torch.float64)
        nn.init.orthogonal_(self.linear.weight, gain=0.4)
        self.dropout = deqkit.nn.VariationalDropout(p)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen.append(self.dropout(torch.ones_like(x)).detach())
        return torch.tanh(self.dropout(self.linear(x)) + inputs)

    def masks(self) -> Tensor:
        """The masks of all evaluations, stacked; forgotten thereby."""
        seen, self.seen = torch.stack(self.seen), []
        return seen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(n: int = 6, size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.zeros(size, n, dtype=torch.float64), torch.randn(size, n, dtype=torch.float64)


def gradients(out: Tensor, module: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), list(module.parameters()))


def with_mask(cell: Cell, mask: Tensor, x: Tensor, inputs: Tensor, steps: int = 300) -> Tensor:
    """The explicit iteration of the cell with a mask put in by hand."""
    for _ in range(steps):
        x = torch.tanh(mask * cell.linear(x) + inputs)
    return x


@pytest.mark.parametrize("solver", GENERAL)
def test_one_mask_per_solve(solver: str) -> None:
    cell, (x0, inputs) = Cell(), batch()
    layer = deqkit.nn.FixedPoint(cell, solver=solver, **TIGHT)
    x = layer(x0, inputs)
    masks = cell.masks()
    assert layer.last_solution.converged.all() and len(masks) == layer.last_solution.num_fn_evals > 5
    assert (masks == masks[0]).all() and set(masks[0].unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(x, with_mask(cell, masks[0], x0, inputs))
    layer(x0, inputs)
    assert not torch.equal(cell.masks()[0], masks[0])  # another one for another solve


@pytest.mark.parametrize(
    "adjoint", ["implicit", "unrolled", deqkit.UnrolledAdjoint(checkpoint=True), deqkit.ImplicitAdjoint("gmres")]
)
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_belong_to_the_mask(adjoint: Any, whole: bool) -> None:
    """Also where the backward pass evaluates f again: checkpoints of a step, or of the layer as a whole."""
    cell, (x0, inputs) = Cell(), batch()
    layer = deqkit.nn.FixedPoint(cell, adjoint=adjoint, solver="fixed_point", **TIGHT)
    x: Any = checkpoint(layer, x0, inputs, use_reentrant=False) if whole else layer(x0, inputs)
    mask = cell.masks()[0]
    expected = gradients(with_mask(cell, mask, x0, inputs), cell)
    torch.testing.assert_close(gradients(x, cell), expected, rtol=1e-7, atol=1e-9)
    assert all((m == mask).all() for m in cell.seen)


def test_double_backward() -> None:
    cell, (x0, inputs) = Cell(n=3), batch(n=3, size=2)
    names = [name for name, _ in cell.named_parameters()]

    def solution(*values: Tensor) -> Tensor:
        torch.manual_seed(1)
        f = lambda x, *ps: functional_call(cell, dict(zip(names, ps, strict=True)), (x, inputs))  # noqa: E731
        return deqkit.solve(f, x0, args=values, **TIGHT).value

    values = [p.detach().clone().requires_grad_() for p in cell.parameters()]
    assert torch.autograd.gradcheck(solution, values) and torch.autograd.gradgradcheck(solution, values)


def test_two_forwards_before_one_backward() -> None:
    cell, (x0, inputs) = Cell(), batch()
    layer = deqkit.nn.FixedPoint(cell, **TIGHT)
    outs, expected = [], []
    for scale in (1.0, 2.0):
        outs.append(layer(x0, scale * inputs))
        expected.append(with_mask(cell, cell.masks()[0], x0, scale * inputs))
    mine, theirs = (gradients(torch.cat(xs), cell) for xs in (outs, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_checkpoints_inside_of_f() -> None:
    cell, (x0, inputs) = Cell(), batch()

    def solve(**settings: Any) -> Tensor:
        f = lambda x: checkpoint(cell, x, inputs, use_reentrant=False, **settings)  # noqa: E731
        return deqkit.solve(f, x0, **TIGHT).value

    with pytest.raises(RuntimeError, match="context_fn=deqkit.nn.hold_in_checkpoint"):
        solve()
    cell.masks()
    x = solve(context_fn=deqkit.nn.hold_in_checkpoint)
    expected = gradients(with_mask(cell, cell.masks()[0], x0, inputs), cell)
    torch.testing.assert_close(gradients(x, cell), expected, rtol=1e-7, atol=1e-9)
    assert cell.seen  # evaluated again


def test_the_shape_of_the_mask() -> None:
    x = torch.ones(8, 16, 5, 4)
    with deqkit.nn.hold():
        channels = deqkit.nn.VariationalDropout(0.4, shared_dims=(2, -1))(x)
        rows = deqkit.nn.VariationalDropout(0.4, shared_dims=3)(x)
        numbers = deqkit.nn.VariationalDropout(0.4)(x)
    assert torch.equal(channels, channels[:, :, :1, :1].expand_as(x)) and 0 < (channels == 0).float().mean() < 1
    assert torch.equal(rows, rows[..., :1].expand_as(x)) and not torch.equal(rows, rows[:, :, :1].expand_as(x))
    assert not torch.equal(numbers, numbers[..., :1].expand_as(x))
    for out in (channels, rows, numbers):
        torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert (numbers == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_the_expectation_is_the_input() -> None:
    dropout, x = deqkit.nn.VariationalDropout(0.3), torch.ones(100_000)
    with deqkit.nn.hold():
        assert dropout(x).mean().item() == pytest.approx(1, abs=0.01)


def test_several_uses_and_shapes() -> None:
    """A mask per module and shape: levels of a pyramid of different sizes, two modules on inputs of one size."""
    shared, other = deqkit.nn.VariationalDropout(0.5), deqkit.nn.VariationalDropout(0.5)
    small, large = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 8, 8)
    with deqkit.nn.hold():
        outs = [(shared(small), shared(large), shared(small), other(small)) for _ in range(3)]
    for a, b, again, c in outs:
        assert torch.equal(a, again) and torch.equal(a, outs[0][0]) and torch.equal(b, outs[0][1])
        assert not torch.equal(a, c) and torch.equal(c, outs[0][3])
    levels = [torch.zeros(2, 3, size, size) for size in (8, 4, 2)]
    channelwise = deqkit.nn.VariationalDropout(0.5, shared_dims=(2, 3))
    sol = deqkit.solve(lambda xs: [0.5 * channelwise(x) * 0.9 + 1 for x in xs], levels)
    assert sol.converged.all()
    flags = [(x != 1).flatten(2).any(2) for x in sol.value]
    assert torch.equal(flags[0], flags[1]) and torch.equal(flags[0], flags[2])  # the same channels in every level


def test_random_numbers_are_those_of_the_seed_whatever_the_number_of_steps() -> None:
    x0, inputs = batch()
    cell = Cell()
    values, after = [], []
    for solver, rtol in (("anderson", 1e-3), ("anderson", 1e-12), ("fixed_point", 1e-12)):
        torch.manual_seed(5)
        values.append(deqkit.solve(cell, x0, args=(inputs,), solver=solver, rtol=rtol, max_steps=300).value)
        after.append(torch.rand(3))
    torch.testing.assert_close(values[0], values[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(values[1], values[2])
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


def test_eval_mode_and_a_rate_of_zero() -> None:
    x = torch.randn(3, 4)
    torch.manual_seed(5)
    for dropout in (deqkit.nn.VariationalDropout(0.9).eval(), deqkit.nn.VariationalDropout(0.0)):
        assert dropout(x) is x  # outside of a solve, too
    first = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(1))  # none was drawn
    with deqkit.nn.hold():
        assert torch.equal(deqkit.nn.VariationalDropout(1.0)(x), torch.zeros_like(x))


def test_outside_of_a_solve_it_is_an_error() -> None:
    cell, (x0, inputs) = Cell(), batch()
    with pytest.raises(RuntimeError, match=r"no mask outside of a solve.*deqkit.nn.hold\(\)"):
        cell(x0, inputs)
    with deqkit.nn.hold():
        sol = deqkit.solve(cell, x0, args=(inputs,), **TIGHT)
        torch.testing.assert_close(cell(sol.value, inputs), sol.value)  # with the mask of the solve
        again = deqkit.solve(cell, x0, args=(inputs,), **TIGHT)
        assert torch.equal(again.value, sol.value)
    with pytest.raises(RuntimeError, match="no mask outside of a solve"):
        cell(x0, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    dropout, x = deqkit.nn.VariationalDropout(0.25), torch.ones(64, dtype=dtype)
    with deqkit.nn.hold():
        out = dropout(x)
        assert out.dtype == dtype and not (out.is_complex() and out.imag.any())
        torch.testing.assert_close(out.real.double().unique(), torch.tensor([0.0, 4 / 3]).double(), rtol=5e-3, atol=0)
        assert torch.equal(dropout(x.real.float()) == 0, out.real == 0)  # one mask, whatever the dtype


def test_device_of_the_input() -> None:
    cell = Cell().to("meta")
    cell.seen = []
    x0, inputs = (t.to("meta") for t in batch())
    settings: dict[str, Any] = {"rtol": 0, "max_steps": 3, "on_failure": "ignore"}
    sol = deqkit.solve(cell, x0, args=(inputs,), adjoint=deqkit.ImplicitAdjoint(rtol=0.0), **settings)
    sol.value.sum().backward()
    assert {m.device.type for m in cell.seen} == {"meta"} and cell.linear.weight.grad is not None


def test_autocast() -> None:
    cell, (x0, inputs) = Cell().float(), (t.float() for t in batch())
    with torch.autocast("cpu", torch.bfloat16):
        x = deqkit.solve(cell, x0, args=(inputs,), rtol=1e-2).value
    masks = cell.masks()
    assert (masks == masks[0]).all()
    torch.testing.assert_close(x, with_mask(cell, masks[0], x0, inputs), rtol=0.05, atol=0.05)
    assert all(g.isfinite().all() for g in gradients(x, cell))


def test_copies_and_pickles_in_the_middle_of_a_solve() -> None:
    dropout = deqkit.nn.VariationalDropout(0.5, shared_dims=[1])
    with deqkit.nn.hold():
        dropout(torch.ones(3, 4))
        others = copy.deepcopy(dropout), pickle.loads(pickle.dumps(dropout))
    for other in others:
        assert repr(other) == repr(dropout) == "VariationalDropout(p=0.5, shared_dims=(1,))"
        assert not other.state_dict()


def test_threads_have_masks_of_their_own() -> None:
    cell = Cell()
    layer = deqkit.nn.FixedPoint(cell, **TIGHT)

    def job(i: int) -> bool:
        x0, inputs = batch()
        x = layer(x0, inputs)
        first = x.detach()
        with deqkit.nn.hold():
            sol = deqkit.solve(cell, x0, args=(inputs,), **TIGHT)
            resolved = torch.allclose(cell(sol.value, inputs), sol.value)
        return bool(resolved and first.isfinite().all() and gradients(x, cell)[0].isfinite().all())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(12)))


def test_nested_solves() -> None:
    """An inner solve keeps its mask through all evaluations of the outer f."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deqkit.nn.FixedPoint(Cell(), **TIGHT)

        def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
            return 0.5 * self.inner(torch.zeros_like(x), 0.5 * x + inputs)

    outer, (x0, inputs) = Outer(), batch()
    layer = deqkit.nn.FixedPoint(outer, **TIGHT)
    layer(x0, inputs).sum().backward()
    assert layer.last_solution.converged.all()
    masks = outer.inner.module.masks()
    assert (masks == masks[0]).all()


def test_compiled_f() -> None:
    torch._dynamo.reset()
    cell, (x0, inputs) = Cell(), batch()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    values = []
    for _ in range(2):
        with deqkit.nn.hold():
            sol = deqkit.solve(compiled, x0, args=(inputs,), **TIGHT)
            values.append(sol.value)
            torch.testing.assert_close(cell(sol.value, inputs), sol.value)  # uncompiled, with the same mask
            expected = with_mask(cell, cell.masks()[0], x0, inputs)
        torch.testing.assert_close(gradients(sol.value, cell), gradients(expected, cell), rtol=1e-7, atol=1e-9)
    assert not torch.allclose(*values)


def test_fixed_steps_in_one_graph() -> None:
    torch._dynamo.reset()
    cell, (x0, inputs) = Cell(), batch()
    settings: dict[str, Any] = {"rtol": 0, "max_steps": 3, "on_failure": "ignore", "solver": "fixed_point"}
    layer = deqkit.nn.FixedPoint(cell, adjoint="unrolled", **settings)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = compiled(x0, inputs)
    with deqkit.nn.hold(solution=layer.last_solution):
        mask = cell.dropout(torch.ones_like(x0))
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    expected = with_mask(cell, mask, x0, inputs, steps=3)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(gradients(x, cell), gradients(expected, cell))
    assert not torch.equal(compiled(x0, inputs), x)


def test_the_masks_of_a_solve_can_be_held_afterwards() -> None:
    cell, (x0, inputs) = Cell(), batch()
    layer = deqkit.nn.FixedPoint(cell, **TIGHT)
    first, second = (layer(x0, inputs) for _ in range(2))
    solution = layer.last_solution
    with deqkit.nn.hold(), deqkit.nn.hold(solution=solution):
        torch.testing.assert_close(cell(second, inputs), second)
        penalty = deqkit.jacobian_penalty(cell, second, (inputs,))
        error = deqkit.gradient_error(cell, second, "implicit", args=(inputs,))
        assert error.relative_error < 1e-3
    assert not torch.allclose(first, second) and penalty > 0
    for other in (copy.copy(solution), copy.deepcopy(solution), pickle.loads(pickle.dumps(solution))):
        assert not other.masks and torch.equal(other.value, solution.value)
    with pytest.raises(TypeError, match="solution must be a deqkit.Solution, got Tensor"), deqkit.nn.hold(solution=x0):  # pyright: ignore
        pass


def test_masks_drawn_in_inference_mode_serve_with_gradients() -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(4, 4), deqkit.nn.VariationalDropout(0.4), nn.Tanh())
    nn.init.orthogonal_(f[0].weight, 0.4)  # pyright: ignore
    with torch.inference_mode():
        sol = deqkit.solve(f, torch.zeros(2, 4))
    with deqkit.nn.hold(solution=sol):
        f(sol.value.clone()).sum().backward()
    assert f[0].weight.grad is not None and bool(f[0].weight.grad.abs().sum() > 0)  # pyright: ignore


def test_the_doctor_examines_f_under_one_mask() -> None:
    cell, (x0, inputs) = Cell(), batch()
    found = deqkit.diagnose(cell, x0, args=(inputs,))
    assert found.healthy and found.adjoints
    masks = torch.stack([m for m in cell.seen if m.shape == x0.shape])
    assert (masks == masks[0]).all()


def test_saved_tensors_may_be_offloaded() -> None:
    cell, (x0, inputs) = Cell(), batch()

    def f(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return cell(x, inputs)

    x = deqkit.solve(f, x0, **TIGHT).value
    expected = with_mask(cell, cell.masks()[0], x0, inputs)
    torch.testing.assert_close(gradients(x, cell), gradients(expected, cell), rtol=1e-7, atol=1e-9)


def test_a_monitor_measures_the_radius_under_the_masks_of_the_solve() -> None:
    cell, (x0, inputs) = Cell(), batch()
    layer = deqkit.nn.FixedPoint(cell, **TIGHT)
    with deqkit.Monitor(layer, radius_every=1) as monitor:
        x = layer(x0, inputs)
        figures = monitor.compute()
    with deqkit.nn.hold(solution=layer.last_solution):
        expected = deqkit.spectral_radius(cell, x.detach(), (inputs,)).max().item()
    with deqkit.nn.hold(cell):
        other = deqkit.spectral_radius(cell, x.detach(), (inputs,)).max().item()
    (found,) = (value for name, value in figures.items() if name.endswith("spectral_radius_max"))
    assert found == pytest.approx(expected, rel=2e-2) and abs(other / expected - 1) > 5e-2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"p": 1.5}, ValueError, r"p must be a probability in \[0, 1\], got 1.5"),
        ({"p": float("nan")}, ValueError, "got nan"),
        ({"p": "0.5"}, TypeError, "p must be a number, got '0.5'"),
        ({"shared_dims": 2.0}, TypeError, r"shared_dims must be dims such as \(2, 3\), got 2.0"),
        ({"shared_dims": "23"}, TypeError, "shared_dims must be dims"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deqkit.nn.VariationalDropout(**settings)


def test_a_missing_dim_is_named() -> None:
    with deqkit.nn.hold(), pytest.raises(IndexError, match=r"x has shape \(2, 3\), without the shared dim 2"):
        deqkit.nn.VariationalDropout(0.5, shared_dims=(2, 3))(torch.ones(2, 3))
