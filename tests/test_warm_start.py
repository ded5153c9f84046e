"""Starting points: the cache of fixed points by sample, and the learned start."""

from __future__ import annotations

import concurrent.futures
import copy
import io
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import deqkit
from deqkit.nn import FixedPointCache, LearnedStart


class Cell(nn.Module):
    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)
        nn.init.orthogonal_(self.linear.weight, gain=0.7)

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + inputs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def solution(value: Any, status: list[int] | Tensor | None = None, rtol: float = 1e-4) -> deqkit.Solution:
    """A solution with this value; all samples of one batch dim have converged unless said otherwise."""
    leaf = torch.utils._pytree.tree_leaves(value)[0]
    codes = torch.zeros(len(leaf), dtype=torch.int64) if status is None else torch.as_tensor(status)
    residual = torch.zeros(codes.shape)
    return deqkit.Solution(value, codes, residual, residual, codes, 1, rtol=rtol)


def rows(*numbers: float, width: int = 3) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1).expand(-1, width).clone()


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def test_points_come_back_to_their_samples() -> None:
    cache = FixedPointCache()
    cache.store(["a", "b", "c"], solution(rows(1, 2, 3)))
    x0 = torch.zeros(4, 3)
    start = cache.start(["c", "z", "a", "c"], x0)
    assert torch.equal(start, rows(3, 0, 1, 3)) and torch.equal(x0, torch.zeros(4, 3))
    assert (cache.hits, cache.misses) == (3, 1) and len(cache) == 3 and "b" in cache and "z" not in cache
    assert cache.num_bytes == 3 * 3 * 4 and "3 samples" in repr(cache)
    start += 1  # what is handed out is nobody else's
    assert torch.equal(cache.start(["c"], x0[:1]), rows(3))
    cache.store(["c", "c"], solution(rows(5, 6)))
    assert torch.equal(cache.start(["c"], x0[:1]), rows(6)) and len(cache) == 3
    cache.clear()
    assert len(cache) == cache.num_bytes == cache.hits == 0 and cache.start(["a"], x0[:1]) is not None


@pytest.mark.parametrize(
    "ids", [torch.tensor([7, 8]), np.array([7, 8]), [7, 8], (7, 8), range(7, 9), [torch.tensor(7), torch.tensor(8)]]
)
def test_kinds_of_ids(ids: Any) -> None:
    cache = FixedPointCache()
    cache.store(ids, solution(rows(1, 2)))
    assert 7 in cache and 8 in cache
    assert torch.equal(cache.start([8, 7], torch.zeros(2, 3)), rows(2, 1))


def test_batch_dims() -> None:
    cache = FixedPointCache()
    values = torch.arange(12.0).reshape(2, 2, 3)
    cache.store(torch.tensor([[0, 1], [2, 3]]), solution(values, torch.zeros(2, 2, dtype=torch.int64)))
    start = cache.start(torch.tensor([[3, 9], [1, 0]]), torch.zeros(2, 2, 3))
    expected = torch.stack([values[1, 1], torch.zeros(3), values[0, 1], values[0, 0]]).reshape(2, 2, 3)
    assert torch.equal(start, expected)
    one = FixedPointCache()
    one.store("the only one", deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(3), batch_dims=0))
    torch.testing.assert_close(one.start("the only one", torch.zeros(3)), torch.full((3,), 2.0), rtol=1e-3, atol=0)
    assert torch.equal(one.start("another", torch.zeros(3)), torch.zeros(3))


def test_pytrees_complex_numbers_and_empty_batches() -> None:
    def value(*numbers: float) -> dict[str, Any]:
        return {
            "a": rows(*numbers),
            "b": [1j * torch.tensor(numbers, dtype=torch.float32), torch.zeros(len(numbers), 0)],
        }

    cache = FixedPointCache(dtype=torch.float16)
    cache.store([1, 2], solution(value(1, 2)))
    start = cache.start([2, 3], value(0, 0))
    assert torch.equal(start["a"], rows(2, 0)) and torch.equal(start["b"][0], torch.tensor([2j, 0]))
    assert start["a"].dtype == torch.float32 and start["b"][0].dtype == torch.complex64
    cache.store([], solution(value()))
    assert torch.equal(cache.start([], value())["a"], rows())
    assert cache.num_bytes == 2 * (3 * 2 + 8)


def test_only_what_can_be_trusted_is_kept() -> None:
    S = deqkit.Status
    codes = [S.CONVERGED, S.MAX_STEPS, S.STAGNATED, S.DIVERGED, S.NONFINITE]
    cache = FixedPointCache()
    cache.store(range(5), solution(rows(0, 1, 2, 3, math.nan), [int(c) for c in codes]))
    assert [k in cache for k in range(5)] == [True, False, False, False, False]
    cache.store([0], solution(rows(9), [int(S.DIVERGED)]))  # the older point stays
    assert torch.equal(cache.start([0], rows(1)), rows(0))
    fixed = FixedPointCache()  # a fixed number of steps has nothing to reach
    fixed.store([1, 4], solution(rows(1, math.nan), [int(S.MAX_STEPS), int(S.NONFINITE)], rtol=0.0))
    assert 1 in fixed and 4 not in fixed
    half = FixedPointCache(dtype=torch.float16)
    half.store([0, 1], solution(rows(1, 1e6)))  # which float16 cannot hold
    assert 0 in half and 1 not in half


def test_other_shapes_or_structures_start_from_x0() -> None:
    cache = FixedPointCache()
    cache.store([0, 1], solution(rows(1, 2)))
    for x0 in (torch.zeros(2, 4), [torch.zeros(2, 3)], torch.zeros(2, 3, dtype=torch.complex64)):
        assert cache.start([0, 1], x0) is x0
    assert cache.misses == 6 and cache.hits == 0
    double = cache.start([0, 1], torch.zeros(2, 3, dtype=torch.float64))
    assert double.dtype == torch.float64 and double[1, 0] == 2
    cache.store([1], solution(rows(5, width=4)))
    assert torch.equal(cache.start([0, 1], torch.zeros(2, 3)), rows(1, 0)) and cache.num_bytes == 4 * (3 + 4)


def test_the_least_recently_used_leave() -> None:
    for limits in ({"max_samples": 3}, {"max_bytes": 3 * 12}, {"max_samples": 3, "max_bytes": None}):
        cache = FixedPointCache(**limits)
        cache.store([0, 1, 2], solution(rows(0, 1, 2)))
        cache.start([0], rows(0))
        cache.store([3], solution(rows(3)))
        assert [k in cache for k in range(4)] == [True, False, True, True] and cache.num_bytes == 36
        cache.store([2], solution(rows(2)))
        cache.store([4, 5], solution(rows(4, 5)))
        assert [k in cache for k in range(6)] == [False, False, True, False, True, True]
    with pytest.raises(ValueError, match="max_bytes=11 cannot hold one sample of 12 bytes"):
        FixedPointCache(max_bytes=11).store([0], solution(rows(0)))


def test_memory_is_that_of_the_samples_kept() -> None:
    """Not of the batches that they came in."""
    cache = FixedPointCache(max_samples=2)
    for k in range(10):
        cache.store(range(k, k + 50), solution(torch.randn(50, 100)))
    entries = list(cache._entries.values())
    assert sum(leaf.untyped_storage().nbytes() for entry in entries for leaf in entry.leaves) == 2 * 400
    assert cache.num_bytes == 800


def test_the_value_may_change_afterwards() -> None:
    cache, value = FixedPointCache(device="same"), rows(1)
    cache.store([0], solution(value))
    value.zero_()
    assert torch.equal(cache.start([0], rows(0)), rows(1))


def test_devices() -> None:
    """The meta device stands for another one: it refuses to mix, too."""
    assert FixedPointCache().device == torch.device("cpu") and FixedPointCache(device="same").device is None
    cache = FixedPointCache(device="cpu")
    cache.store([0], solution(rows(1)))
    start = cache.start([0, 1], torch.zeros(2, 3, device="meta"))
    assert start.device.type == "meta" and start.shape == (2, 3)
    far = FixedPointCache(device="meta")
    far.store([0], solution(rows(1)))
    assert far._entries[0].leaves[0].device.type == "meta"
    far.device = None
    far.store([1], solution(rows(1)))
    assert far.start([0, 1], torch.zeros(2, 3, device="meta")).shape == (2, 3)


def test_gradients_of_x0_pass_where_it_is_used() -> None:
    cache = FixedPointCache()
    cache.store([0], solution(rows(1).requires_grad_()))
    x0 = torch.zeros(2, 3, requires_grad=True)
    start = cache.start([0, 1], x0)
    (grad,) = torch.autograd.grad(start.sum(), x0)
    assert torch.equal(grad, rows(0, 1)) and not any(e.leaves[0].requires_grad for e in cache._entries.values())


def test_what_inference_mode_stored_serves_in_training() -> None:
    layer, cache = deqkit.nn.FixedPoint(Cell()), FixedPointCache()
    inputs = torch.randn(2, 6)
    with torch.inference_mode():
        layer(torch.zeros(2, 6), inputs)
        cache.store([0, 1], layer.last_solution)
    x0 = torch.zeros(3, 6, requires_grad=True)
    layer(cache.start([0, 1, 2], x0), torch.randn(3, 6)).sum().backward()
    assert layer.module.linear.weight.grad is not None


def test_a_cached_start_saves_the_steps_and_changes_nothing_else() -> None:
    layer, cache = deqkit.nn.FixedPoint(Cell(), rtol=1e-5), FixedPointCache()
    inputs = torch.randn(5, 6)
    cold = layer(torch.zeros(5, 6), inputs)
    (cold_gradient,) = torch.autograd.grad(cold.square().sum(), layer.module.linear.weight)
    steps = layer.last_solution.num_steps
    cache.store(torch.arange(5), layer.last_solution)
    order = torch.tensor([3, 1, 4])
    warm = layer(cache.start(order, torch.zeros(3, 6)), inputs[order] + 1e-4)
    assert (layer.last_solution.num_steps <= 0.7 * steps[order]).all()
    torch.testing.assert_close(warm, layer(torch.zeros(3, 6), inputs[order] + 1e-4), rtol=1e-4, atol=1e-5)
    again = layer(cache.start(range(5), torch.zeros(5, 6)), inputs)
    assert (layer.last_solution.num_steps == 0).all()
    (gradient,) = torch.autograd.grad(again.square().sum(), layer.module.linear.weight)
    torch.testing.assert_close(gradient, cold_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_copies_pickles_and_state_dicts(dtype: torch.dtype | None) -> None:
    cache = FixedPointCache(max_samples=3, dtype=dtype)
    cache.store([0, "b", 2], solution({"x": rows(1, 2, 3)}))
    x0 = {"x": torch.zeros(3, 3)}
    cache.start([0], {"x": torch.zeros(1, 3)})
    buffer = io.BytesIO()
    torch.save(cache.state_dict(), buffer)
    buffer.seek(0)
    loaded = FixedPointCache(max_samples=3, dtype=dtype)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), loaded):
        assert torch.equal(other.start([0, "b", 2], x0)["x"], rows(1, 2, 3))
        assert other.num_bytes == cache.num_bytes and len(other) == 3
    last = FixedPointCache(max_samples=1)
    last.load_state_dict(cache.state_dict())
    assert 0 in last and len(last) == 1, "the one used last"


def test_cache_in_threads() -> None:
    cache = FixedPointCache(max_samples=20)

    def job(k: int) -> None:
        for i in range(30):
            cache.store([i, i + 1], solution(rows(i, i + 1)))
            start = cache.start([i], torch.full((1, 3), -1.0))
            assert start[0, 0].item() in (i, -1)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(job, range(16)))
    assert len(cache) == 20 and cache.num_bytes == 20 * 12 and cache.hits + cache.misses == 16 * 30


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1, got 0"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an integer"),
        ({"device": "gpu7"}, RuntimeError, "gpu7"),
        ({"dtype": "half"}, TypeError, "dtype must be a floating dtype"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating dtype"),
    ],
)
def test_bad_settings_of_the_cache_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FixedPointCache(**settings)


def test_ids_must_fit() -> None:
    cache = FixedPointCache()
    with pytest.raises(ValueError, match=r"ids of the batch shape \(2,\) do not fit a state of the shape \(3, 4\)"):
        cache.start([0, 1], torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"ids of the batch shape \(1,\) do not fit"):
        cache.store(torch.tensor([5]), solution(rows(1, 2)))
    flat, nested = (deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(3, 2, 4), batch_dims=d) for d in (0, 2))
    for sol, shape in ((flat, r"\(\)"), (nested, r"\(3, 2\)")):
        with pytest.raises(ValueError, match=rf"ids of the batch shape \(3,\) do not fit a solve of {shape}"):
            cache.store([0, 1, 2], sol)
    with pytest.raises(TypeError, match="solution must be a deqkit.Solution, got Tensor"):
        cache.store([0], rows(1))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------------------------------------
# the learned start


def test_it_learns_where_the_fixed_points_are() -> None:
    layer = deqkit.nn.FixedPoint(Cell(), solver="fixed_point")
    start = LearnedStart(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    optimizer = torch.optim.Adam(start.parameters(), lr=1e-2)
    unseen = torch.randn(64, 6)
    layer(torch.zeros(64, 6), unseen)
    cold = layer.last_solution.num_steps.double().mean()
    for _ in range(150):
        inputs = torch.randn(64, 6)
        x0 = start(inputs)
        layer(x0, inputs)
        loss = start.loss(x0, layer.last_solution)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer(start(unseen), unseen)
    warm = layer.last_solution.num_steps.double().mean()
    assert loss < 0.1 and warm < cold - 1


def test_the_loss_is_the_relative_squared_distance_of_what_can_be_trusted() -> None:
    start = LearnedStart(nn.Identity())
    x0, value = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    value[3] = math.nan
    sol = solution(value, [0, 0, 1, 4])
    loss = start.loss(x0, sol)
    assert loss.item() == pytest.approx(((x0 - value)[:2].square().sum() / value[:2].square().sum()).item())
    loss.backward()
    assert (x0.grad[2:] == 0).all() and (x0.grad[:2] != 0).all()
    assert start.loss(torch.zeros(4, 3), sol).item() == pytest.approx(1)
    fixed = replace(sol, rtol=0.0)
    assert start.loss(x0, fixed).item() == pytest.approx(
        ((x0 - value)[:3].square().sum() / value[:3].square().sum()).item()
    )
    nothing = start.loss(x0, solution(value, [4, 4, 4, 4]))
    assert nothing.item() == 0 and nothing.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_loss_of_other_states(dtype: torch.dtype, batch_dims: int) -> None:
    f = lambda x: tree_map(lambda t: 0.5 * t + 1, x)  # noqa: E731
    x0 = {"a": torch.randn(2, 2, 3, dtype=dtype), "b": torch.randn(2, 2, dtype=dtype)}
    sol = deqkit.solve(f, tree_map(torch.zeros_like, x0), rtol=0.02, batch_dims=batch_dims)
    loss = LearnedStart(nn.Identity()).loss(x0, sol)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    flat = lambda x: torch.cat([t.to(wide).flatten() for t in x.values()])  # noqa: E731
    expected = (flat(x0) - flat(sol.value)).abs().square().sum() / flat(sol.value).abs().square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and not loss.is_complex()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_an_empty_batch_costs_nothing() -> None:
    layer, start = deqkit.nn.FixedPoint(Cell()), LearnedStart(nn.Linear(6, 6))
    inputs = torch.zeros(0, 6)
    x0 = start(inputs)
    layer(x0, inputs)
    loss = start.loss(x0, layer.last_solution)
    loss.backward()
    assert loss.item() == 0


def test_the_two_losses_do_not_mix() -> None:
    """The task trains the equilibrium, the auxiliary loss the start."""
    layer, start, inputs = deqkit.nn.FixedPoint(Cell()), LearnedStart(nn.Linear(6, 6)), torch.randn(3, 6)
    mine, theirs = list(start.parameters()), list(layer.parameters())
    x0 = start(inputs)
    x = layer(x0, inputs)
    task, auxiliary = x.square().sum(), start.loss(x0, layer.last_solution)
    assert torch.autograd.grad(task, mine, allow_unused=True, retain_graph=True) == (None, None)
    assert torch.autograd.grad(auxiliary, theirs, allow_unused=True, retain_graph=True) == (None, None)
    (task + auxiliary).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*mine, *theirs))
    # Neither does a solution that still has its graph change that.
    sol = deqkit.solve(layer.module, start(inputs), args=(inputs,))
    auxiliary = start.loss(start(inputs), sol)
    assert torch.autograd.grad(auxiliary, theirs, allow_unused=True) == (None, None)


def test_the_state_keeps_its_precision_under_autocast() -> None:
    layer, start, inputs = deqkit.nn.FixedPoint(Cell(), rtol=1e-2), LearnedStart(nn.Linear(6, 6)), torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0 = start(inputs)
        assert x0.dtype == torch.float32 and layer(x0, inputs).dtype == torch.float32
        start.loss(x0, layer.last_solution).backward()
    assert LearnedStart(nn.Linear(6, 6).bfloat16())(inputs.bfloat16()).dtype == torch.bfloat16


def test_the_start_is_a_module() -> None:
    start = LearnedStart(nn.Linear(6, 6))
    inputs = torch.randn(3, 6)
    for other in (copy.deepcopy(start), pickle.loads(pickle.dumps(start))):
        assert torch.equal(other(inputs), start(inputs))
    assert list(start.state_dict()) == ["module.weight", "module.bias"]
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        LearnedStart(lambda x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="x0 must have the structure and the shapes of the solution's value"):
        start.loss(torch.zeros(2, 6), solution(torch.zeros(3, 6)))
    with pytest.raises(TypeError, match="solution must be a deqkit.Solution, got Tensor"):
        start.loss(inputs, inputs)  # pyright: ignore[reportArgumentType]
