"""Parametrised weights in a solve: computed once, differentiated, copied, pickled."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import deqkit

TIGHT: dict[str, Any] = {"rtol": 1e-13, "max_steps": 200}
FIXED: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "max_steps": 5, "on_failure": "ignore"}
Wrap = Callable[[nn.Module], nn.Module]

WRAPS: dict[str, Wrap] = {
    "weight_norm": lambda m: deqkit.nn.weight_norm(m, 0.3),
    "spectral_norm": lambda m: deqkit.nn.spectral_norm(m, 0.6),
    "both": lambda m: deqkit.nn.spectral_norm(deqkit.nn.weight_norm(m), 0.6),
    "torch": parametrizations.orthogonal,
}


class Cell(nn.Module):
    """tanh(0.9 W x + inputs) with a parametrised W."""

    def __init__(self, wrap: Wrap, n: int = 3) -> None:
        super().__init__()
        self.linear = wrap(nn.Linear(n, n, dtype=torch.float64))
        with torch.no_grad():  # away from the caps, where a weight has no derivative
            for p in self.parameters():
                p.add_(0.05 * torch.randn_like(p))

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(0.9 * self.linear(x) + inputs)


class Counting(nn.Module):
    """A parametrisation that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return 0.5 * weight / weight.norm()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=WRAPS)
def cell(request: pytest.FixtureRequest) -> Cell:
    return Cell(WRAPS[request.param])


def batch(n: int = 3, size: int = 2) -> tuple[Tensor, Tensor]:
    return torch.zeros(size, n, dtype=torch.float64), torch.randn(size, n, dtype=torch.float64)


def gradients(out: Tensor, module: nn.Module, **settings: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), list(module.parameters()), **settings)


@pytest.mark.parametrize("adjoint", ["implicit", deqkit.UnrolledAdjoint(), deqkit.UnrolledAdjoint(checkpoint=True)])
@pytest.mark.parametrize("wrap", WRAPS)
def test_gradients_through_a_solve(wrap: str, adjoint: Any) -> None:
    """Against those of the explicit iteration with the weight computed anew every time."""
    cell = Cell(WRAPS[wrap])
    x0, inputs = batch()
    x = x0
    for _ in range(400):
        x = cell(x, inputs)
    layer = deqkit.nn.FixedPoint(cell, adjoint=adjoint, solver="fixed_point", **TIGHT | {"max_steps": 500})
    mine = layer(x0, inputs)
    torch.testing.assert_close(mine, x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients(mine, cell), gradients(x, cell), rtol=1e-7, atol=1e-9)


def test_double_backward_through_a_solve(cell: Cell) -> None:
    x0, inputs = batch()
    names = [name for name, _ in cell.named_parameters()]

    def solution(*values: Tensor) -> Tensor:
        f = lambda x, *ps: functional_call(cell, dict(zip(names, ps, strict=True)), (x, inputs))  # noqa: E731
        return deqkit.solve(f, x0, args=values, **TIGHT).value

    values = [p.detach().clone().requires_grad_() for p in cell.parameters()]
    assert torch.autograd.gradcheck(solution, values) and torch.autograd.gradgradcheck(solution, values)


def test_double_backward_to_parameters_that_f_closes_over(cell: Cell) -> None:
    """Without the weight among the arguments, only its graph would be known and this would be refused."""
    x0, inputs = batch()
    settings = TIGHT | {"max_steps": 500}

    def second(adjoint: Any) -> tuple[Tensor, ...]:
        x = deqkit.solve(cell, x0, args=(inputs,), adjoint=adjoint, solver="fixed_point", **settings).value
        first = torch.autograd.grad(x.square().sum(), list(cell.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(cell.parameters()))

    torch.testing.assert_close(second("implicit"), second("unrolled"), rtol=1e-6, atol=1e-8)


def test_repeated_backward_and_two_forwards_before_one_backward(cell: Cell) -> None:
    layer = deqkit.nn.FixedPoint(cell, **TIGHT)
    x0, inputs = batch()
    first = layer(x0, inputs)
    once = gradients(first, cell, retain_graph=True)
    torch.testing.assert_close(gradients(first, cell, retain_graph=True), once)
    second = layer(x0, 2 * inputs)
    both = gradients(torch.cat([first, second]), cell, retain_graph=True)
    alone = gradients(second, cell)
    torch.testing.assert_close(both, tuple(a + b for a, b in zip(once, alone, strict=True)))


@pytest.mark.parametrize("wrapping", ["whole", "whole, reentrant", "f", "f, in the know"])
def test_activation_checkpointing(wrapping: str, cell: Cell) -> None:
    """Around the layer, or by f itself. Batch and width are equal, so that shapes alone would not betray a mix-up."""
    x0, inputs = batch(size=3)
    inputs.requires_grad_()
    expected = gradients(deqkit.solve(cell, x0, args=(inputs,), **TIGHT).value, cell)
    if wrapping.startswith("whole"):
        layer = deqkit.nn.FixedPoint(cell, **TIGHT)
        x: Any = checkpoint(layer, x0, inputs, use_reentrant="reentrant" in wrapping)
    else:
        extra: Any = {"context_fn": deqkit.nn.hold_in_checkpoint} if "know" in wrapping else {}
        f = lambda x, b: checkpoint(cell, x, b, use_reentrant=False, **extra)  # noqa: E731
        x = deqkit.solve(f, x0, args=(inputs,), **TIGHT).value
    if wrapping == "whole, reentrant":  # knows .backward() only
        x.square().sum().backward()
        found = tuple(p.grad for p in cell.parameters())
    else:
        found = gradients(x, cell)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("adjoint", ["implicit", "phantom", "unrolled"])
def test_a_weight_is_computed_once_per_solve(adjoint: str) -> None:
    counting = Counting()
    cell = Cell(lambda m: parametrize.register_parametrization(m, "weight", counting))
    layer = deqkit.nn.FixedPoint(cell, adjoint=adjoint)
    x0, inputs = batch()
    counting.count = 0
    layer(x0, inputs).sum().backward()
    assert counting.count == 1 and layer.last_solution.num_fn_evals > 3
    layer(x0, inputs)
    assert counting.count == 2


def test_a_solve_of_ones_own_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stems from deqkit.nn is held without being told, in a method that f is too."""
    cell = Cell(WRAPS["spectral_norm"])
    counts = []
    monkeypatch.setattr(
        type(cell.linear.parametrizations["weight"][0]),  # pyright: ignore
        "norm_bound",
        lambda self, w: counts.append(0) or torch.linalg.matrix_norm(w, 2),
    )
    x0, inputs = batch()
    sol = deqkit.solve(lambda x: cell(x, inputs), x0, **TIGHT)
    gradients(sol.value, cell)
    assert len(counts) == 1 and sol.num_fn_evals > 3


def test_the_power_iteration_of_torch_stands_still_during_a_solve() -> None:
    layer = deqkit.nn.FixedPoint(Cell(parametrizations.spectral_norm, n=6), **TIGHT)
    norm: Any = layer.module.linear.parametrizations.weight[0]  # pyright: ignore
    expected = copy.deepcopy(norm)
    weight = layer.module.linear.parametrizations.weight.original  # pyright: ignore
    x0, inputs = batch(6)
    x = layer(x0, inputs)
    held = expected(weight)  # one iteration
    torch.testing.assert_close((norm._u, norm._v), (expected._u, expected._v), rtol=0, atol=0)
    linear = layer.module.linear
    torch.testing.assert_close(x, torch.tanh(0.9 * nn.functional.linear(x, held, linear.bias) + inputs))  # pyright: ignore
    assert layer.last_solution.converged.all()


def test_nested_layers() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deqkit.nn.FixedPoint(Cell(WRAPS["spectral_norm"]), **TIGHT)
            self.linear = deqkit.nn.weight_norm(nn.Linear(3, 3, dtype=torch.float64), 0.2)

        def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
            return torch.tanh(self.inner(torch.zeros_like(x), self.linear(x) + inputs))

    outer, (x0, inputs) = Outer(), batch()
    mine = gradients(deqkit.nn.FixedPoint(outer, **TIGHT)(x0, inputs), outer)
    x = x0
    for _ in range(60):
        x = outer(x, inputs)
    torch.testing.assert_close(mine, gradients(x, outer), rtol=1e-7, atol=1e-9)


def test_one_module_with_two_sets_of_parameters_in_one_f() -> None:
    cell = Cell(WRAPS["weight_norm"])
    sets = [{k: (v * s).detach().requires_grad_() for k, v in cell.named_parameters()} for s in (1.0, -0.5)]
    x0, inputs = batch()
    f = lambda x: sum(0.5 * functional_call(cell, ps, (x, inputs)) for ps in sets)  # noqa: E731
    sol = deqkit.solve(f, x0, **TIGHT)
    torch.testing.assert_close(f(sol.value), sol.value)
    unrolled = deqkit.solve(f, x0, adjoint="unrolled", **TIGHT)
    leaves = [p for ps in sets for p in ps.values()]
    mine, theirs = (torch.autograd.grad(s.value.square().sum(), leaves) for s in (sol, unrolled))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_copies_of_a_block_keep_weights_of_their_own() -> None:
    """`parametrize.cached` would give all copies the weight of the first."""
    block = deqkit.nn.weight_norm(nn.Linear(3, 3, dtype=torch.float64), 0.4)
    blocks = nn.Sequential(*(copy.deepcopy(block) for _ in range(2)))
    with torch.no_grad():
        blocks[1].parametrizations["weight"].original1.normal_()  # pyright: ignore
    x0, inputs = batch()
    f = lambda x: torch.tanh(blocks(x) + inputs)  # noqa: E731
    sol = deqkit.solve(f, x0, **TIGHT)
    torch.testing.assert_close(f(sol.value), sol.value)
    with parametrize.cached():  # does no harm either
        layer = deqkit.nn.FixedPoint(Cell(WRAPS["weight_norm"]), **TIGHT)
        out = layer(x0, inputs)
    assert all(g.any() for g in gradients(out, layer))


def test_without_gradients() -> None:
    layer = deqkit.nn.FixedPoint(Cell(WRAPS["both"]), **TIGHT)
    x0, inputs = batch()
    expected = layer(x0, inputs)
    with torch.no_grad():
        assert torch.equal(layer(x0, inputs), expected)
    with torch.inference_mode():
        assert torch.equal(layer.eval()(x0, inputs), expected)
    with torch.no_grad():
        block = deqkit.nn.hold()
        block.__enter__()
        layer(x0, inputs)  # leaves weights without gradients in the block
    out = layer(x0, inputs)
    block.__exit__(None, None, None)
    torch.testing.assert_close(gradients(out, layer), gradients(expected, layer))


def test_hold() -> None:
    counting = Counting()
    cell = Cell(lambda m: parametrize.register_parametrization(m, "weight", counting))
    x0, inputs = batch()
    with deqkit.nn.hold(cell):
        counting.count = 0
        sol = deqkit.solve(cell, x0, args=(inputs,))
        loss = sol.value.sum() + cell(sol.value, inputs).sum()
        with deqkit.nn.hold():
            deqkit.solve(cell, x0, args=(inputs,))
        assert counting.count == 1
        loss.backward()
        with torch.no_grad():
            cell.linear.parametrizations["weight"].original.normal_()  # pyright: ignore
        before = cell.linear.weight
        cell.load_state_dict({k: -v for k, v in cell.state_dict().items()})
        torch.testing.assert_close(cell.linear.weight, -before)  # no stale weight
    counting.count = 0
    assert cell.linear.weight is not cell.linear.weight and counting.count == 2


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_the_steps_of_optimisers_are_noticed(settings: dict[str, bool]) -> None:
    layer, (x0, inputs) = deqkit.nn.FixedPoint(Cell(WRAPS["spectral_norm"]), **TIGHT), batch()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, **settings)  # pyright: ignore[reportArgumentType]
    with deqkit.nn.hold():
        for _ in range(3):
            optimizer.zero_grad()
            layer(x0, inputs).sum().backward()
            optimizer.step()
        held = layer(x0, inputs)
    torch.testing.assert_close(held, layer(x0, inputs))


class LowRank(nn.Module):
    """A parametrisation with parameters of its own, beside a frozen weight."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a = nn.Parameter(0.1 * torch.randn(n, 1, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(1, n, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


def test_a_change_of_what_makes_the_weight_is_noticed() -> None:
    def wrap(linear: nn.Module) -> nn.Module:
        linear.weight.requires_grad_(False).mul_(0.3)  # pyright: ignore
        parametrize.register_parametrization(linear, "weight", LowRank(3))
        return linear

    layer, (x0, inputs) = deqkit.nn.FixedPoint(Cell(wrap), **TIGHT), batch()
    with deqkit.nn.hold():
        before = layer(x0, inputs)
        with torch.no_grad():
            layer.module.linear.parametrizations["weight"][0].a.mul_(-1)  # pyright: ignore
        after = layer(x0, inputs)
        layer.float()  # which moves parameters without counting as a change of them
        layer.rtol = 1e-6
        moved = layer(x0.float(), inputs.float())
        layer.double()
    layer.rtol = TIGHT["rtol"]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, layer(x0, inputs))
    torch.testing.assert_close(moved.double(), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("outside", [True, False])
def test_a_weight_first_used_without_gradients_has_them_where_they_are_wanted(mode: Any, outside: bool) -> None:
    cell, (x0, inputs) = Cell(WRAPS["spectral_norm"]), batch()
    layer = deqkit.nn.FixedPoint(cell, **TIGHT)
    expected = gradients(layer(x0, inputs), cell)
    direct = gradients(cell(x0, inputs), cell)
    with mode() if outside else contextlib.nullcontext(), deqkit.nn.hold():
        with contextlib.nullcontext() if outside else mode():
            layer(x0, inputs)
        with torch.inference_mode(False), torch.enable_grad():
            found = gradients(layer(x0, inputs), cell, retain_graph=True), gradients(cell(x0, inputs), cell)
    torch.testing.assert_close(found, (expected, direct))


def test_threads_share_a_layer() -> None:
    layer = deqkit.nn.FixedPoint(Cell(WRAPS["spectral_norm"]), **TIGHT)

    def job(i: int) -> tuple[Tensor, ...]:
        x0 = torch.zeros(2, 3, dtype=torch.float64)
        inputs = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        with torch.set_grad_enabled(i % 2 == 0):
            x = layer(x0, inputs)
        return (x.detach(), *(gradients(x, layer) if x.requires_grad else ()))

    expected = [job(i) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(job, range(12)), expected, strict=True):
            assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_exception_leaves_no_scope_behind() -> None:
    cell = Cell(WRAPS["weight_norm"])
    x0, inputs = batch()

    def f(x: Tensor) -> Tensor:
        cell(x, inputs)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        deqkit.solve(f, x0)
    assert cell.linear.weight is not cell.linear.weight


def test_compiled_f() -> None:
    torch._dynamo.reset()
    cell = Cell(WRAPS["both"]).float()
    x0, inputs = (t.float() for t in batch())
    settings: dict[str, Any] = {"rtol": 1e-5}
    expected = deqkit.solve(cell, x0, args=(inputs,), **settings).value
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = deqkit.solve(compiled, x0, args=(inputs,), **settings).value
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(gradients(x, cell), gradients(deqkit.solve(cell, x0, args=(inputs,)).value, cell),
                                   rtol=1e-3, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize(("wrap", "adjoint"), [("both", "unrolled"), ("torch", "unrolled"), ("both", "neumann")])
def test_fixed_steps_in_one_graph_and_export(wrap: str, adjoint: str) -> None:
    torch._dynamo.reset()
    layer = deqkit.nn.FixedPoint(Cell(WRAPS[wrap]), adjoint=adjoint, solver="fixed_point", **FIXED | {"max_steps": 2})
    x0, inputs = batch()
    out = torch.compile(layer, backend="eager", fullgraph=True)(x0, inputs)
    torch.testing.assert_close(out, layer(x0, inputs))
    torch.testing.assert_close(gradients(out, layer), gradients(layer(x0, inputs), layer))
    program = torch.export.export(layer.eval(), (x0, inputs))
    torch.testing.assert_close(program.module()(x0, 2 * inputs), layer(x0, 2 * inputs))


def test_forward_mode() -> None:
    cell = Cell(WRAPS["spectral_norm"]).requires_grad_(False)
    x0, inputs = batch()
    tangents = []
    for adjoint in ("implicit", "unrolled"):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs, torch.ones_like(inputs))
            x = deqkit.solve(cell, x0, args=(dual,), adjoint=adjoint, **TIGHT).value
            tangents.append(forward_ad.unpack_dual(x).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-8, atol=1e-10)


# Copies, files, devices


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "both"])
def test_copies_pickles_and_state_dicts(wrap: str) -> None:
    layer = deqkit.nn.FixedPoint(Cell(WRAPS[wrap]), **TIGHT)
    x0, inputs = batch()
    x = layer(x0, inputs)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, pickle.loads(pickle.dumps(loaded))]
    fresh = deqkit.nn.FixedPoint(Cell(WRAPS[wrap]), **TIGHT)
    assert not torch.equal(fresh(x0, inputs), x)
    fresh.load_state_dict(layer.state_dict())
    for other in (*others, fresh):
        out = other(x0, inputs)
        assert torch.equal(out, x) and parametrize.is_parametrized(other.module.linear, "weight")
        assert repr(other) == repr(layer)
        torch.testing.assert_close(gradients(out, other), gradients(layer(x0, inputs), layer))
        with torch.no_grad():
            next(other.module.linear.parametrizations.parameters()).mul_(0.5)
        assert not torch.equal(other.module.linear.weight, layer.module.linear.weight)  # pyright: ignore
    assert torch.equal(layer(x0, inputs), x)
    last = others[-1].module.linear
    parametrize.remove_parametrizations(last, "weight")
    assert type(last) is nn.Linear and isinstance(last.weight, nn.Parameter)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "both"])
def test_a_copy_can_be_changed_apart_from_the_original(wrap: str, copied: Any) -> None:
    linear = WRAPS[wrap](nn.Linear(3, 3))
    x, expected = torch.ones(1, 3), linear.weight.detach()
    other = copied(linear)
    if copied is not copy.copy:  # which shares everything within
        deqkit.nn.weight_norm(other, name="bias", dim=None)
        parametrize.remove_parametrizations(other, "bias")
        parametrize.remove_parametrizations(other, "weight")
        assert type(other) is nn.Linear
    for one in (linear, other, copied(linear)):
        torch.testing.assert_close(one.weight, expected)
        assert one(x).shape == (1, 3)


def test_dtype_and_device_moves() -> None:
    layer = deqkit.nn.FixedPoint(Cell(WRAPS["both"]), **FIXED)
    x0, inputs = batch()
    expected = layer(x0, inputs)
    torch.testing.assert_close(layer.float()(x0.float(), inputs.float()), expected.float())
    layer.adjoint = deqkit.ImplicitAdjoint(rtol=0.0)
    # On the meta device an operation that meets a tensor of another device, or a look at a value, is an error.
    out = layer.to("meta")(x0.float().to("meta"), inputs.float().to("meta"))
    out.sum().backward()
    assert out.device.type == "meta" and all(p.grad is not None for p in layer.parameters())


def test_train_and_eval_are_the_same() -> None:
    layer = deqkit.nn.FixedPoint(Cell(WRAPS["spectral_norm"]), **TIGHT)
    x0, inputs = batch()
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer.train()(x0, inputs), layer.eval()(x0, inputs))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))
