"""Faults found in other libraries, one test each: what they got silently wrong, where they crashed, what they wasted.

The numbers are those of a list of 28 faults of torchdeq 0.1.0.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from equations import linear, tanh, tanh_layer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import deqkit
from deqkit import Status, arrays, linalg
from deqkit.adjoints import ADJOINTS
from deqkit.solvers import SOLVERS

QUASI_NEWTON = ["anderson", "broyden"]
CLASSIC = ["fixed_point", *QUASI_NEWTON]
EXACT_ADJOINT = deqkit.ImplicitAdjoint(rtol=1e-13, max_steps=200)
TIGHT: dict[str, Any] = {"rtol": 1e-13, "max_steps": 200, "on_failure": "ignore"}


def scalar(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def backward(solver: str) -> str:
    """The solver, or, where it refuses a backward pass by its name, the one in it."""
    return "anderson" if solver == "mixed_precision" else solver


def halving(x: Tensor, b: Tensor) -> Tensor:
    """Its fixed point is 2 b."""
    return 0.5 * x + b


class Cell(torch.nn.Module):
    """tanh(W x + b) with |W| = 0.5, and a dropout layer to tell train() from eval()."""

    def __init__(self, n: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(n, n, dtype=torch.float64)
        torch.nn.init.orthogonal_(self.linear.weight, gain=0.5, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.linear.bias)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, b: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(x) + b))


class Operations(TorchDispatchMode):
    """Records every tensor operation, but for those inside of f, as (name, shape of the result)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []
        self.inside_f = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside_f:
            self.seen.append((func.overloadpacket.__name__, tuple(out.shape) if isinstance(out, Tensor) else ()))
        return out

    def without(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """F, not recorded."""

        def unseen(*args: Any) -> Any:
            self.inside_f = True
            try:
                return f(*args)
            finally:
                self.inside_f = False

        return unseen


class Looks(TorchFunctionMode):
    """Counts how often the host asks a tensor for its values."""

    NAMES = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def operations_per_step(solver: str) -> float:
    """How many tensor operations a step takes beyond f, once the history is no longer empty."""
    eq = tanh(n=64, batch=4)

    def count(max_steps: int) -> int:
        with Operations() as operations, torch.no_grad():
            f = operations.without(lambda x: eq.f(x, *eq.args))
            sol = deqkit.solve(f, eq.x0, solver=solver, rtol=1e-30, max_steps=max_steps, on_failure="ignore")
        assert int(sol.num_steps.max()) == max_steps
        return len(operations.seen)

    return (count(22) - count(12)) / 10


def state_after(solver: deqkit.Solver, monkeypatch: pytest.MonkeyPatch, steps: int, n: int) -> Any:
    """What the solver remembers after a few steps."""
    states: list[Any] = []
    start = type(solver).start
    monkeypatch.setattr(type(solver), "start", lambda self: states.append(start(self)) or states[-1])
    eq = linear(n=n, batch=2, radius=0.9)
    with torch.no_grad():
        deqkit.solve(eq.f, eq.x0, args=eq.args, solver=solver, rtol=1e-30, max_steps=steps, on_failure="ignore")
    (state,) = states
    return state


def num_bytes(obj: Any) -> int:
    """Of all tensors that an object's attributes hold, each storage once."""
    found: dict[int, int] = {}
    todo = [obj]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            todo.extend(item)
        elif hasattr(item, "__dict__"):
            todo.extend(vars(item).values())
    return sum(found.values())


# Silently wrong


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_01_double_backward(solver: str) -> None:
    """Second derivatives were wrong without an error."""
    # x = c x^2 + b has the root (1 - sqrt(1 - 4 b c)) / 2c, which depends on c in a nonlinear way.
    if SOLVERS[solver].for_affine:  # it still solves the adjoint equation
        solver, adjoint = "newton_krylov", deqkit.ImplicitAdjoint(solver, rtol=1e-13)
    else:
        adjoint = deqkit.ImplicitAdjoint(backward(solver), rtol=1e-13, max_steps=200)
    b, c = scalar(0.3).requires_grad_(), scalar(0.5).requires_grad_()
    f = lambda x, b, c: c * x**2 + b  # noqa: E731
    x = deqkit.solve(f, scalar(0.0), args=(b, c), solver=solver, adjoint=adjoint, **TIGHT).value
    root = (1 - torch.sqrt(1 - 4 * b * c)) / (2 * c)

    def hessian(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.sum(), (b, c), create_graph=True)
        return [h for g in first for h in torch.autograd.grad(g.sum(), (b, c), retain_graph=True)]

    torch.testing.assert_close(hessian(x), hessian(root), rtol=1e-8, atol=0)


def test_fault_02_kept_states_leave_the_adjoint_exact() -> None:
    """Asking for states of the trajectory made the gradient a phantom one where the solve ended early."""
    b = scalar(1.0).requires_grad_()
    sol = deqkit.solve(
        halving, scalar(0.0), args=(b,), solver="fixed_point", adjoint=EXACT_ADJOINT, rtol=1e-3, keep=(2, 49)
    )
    assert sol.converged.all() and sol.num_steps.item() < 49
    for x in (sol.value, *sol.states.values()):  # a damped step or a few of them would give less than 2
        assert torch.autograd.grad(x.sum(), b)[0].item() == pytest.approx(2.0, rel=1e-10)
    assert sol.adjoint_stats.converged is not None and sol.adjoint_stats.converged.all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_03_nan_spares_the_best_point(solver: str) -> None:
    """One NaN wiped out the best point of all samples, for masks were multiplied."""
    eq, seen = tanh(n=6, batch=2), list[deqkit.StepInfo]()

    def f(x: Tensor) -> Tensor:
        known = len(seen) < 3 or any(torch.equal(x[0], info.value[0]) for info in seen[:3])
        spoil = torch.zeros_like(x)
        spoil[0] = 0.0 if known else torch.nan  # from the third step on
        return eq.f(x, *eq.args) + spoil

    settings: dict[str, Any] = {"solver": solver, "rtol": 1e-9, "max_steps": 200}
    sol = deqkit.solve(f, eq.x0, **settings, on_failure="ignore", callback=seen.append)
    best = min(seen[:3], key=lambda info: info.relative_residual[0].item())
    assert sol.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    assert torch.equal(sol.value[0], best.value[0]) and sol.residual[0] == best.residual[0]
    clean = deqkit.solve(eq.f, eq.x0, args=eq.args, **settings)
    assert torch.equal(sol.value[1], clean.value[1]) and sol.num_steps[1] == clean.num_steps[1]


def test_fault_04_a_single_slow_sample_is_no_stagnation() -> None:
    """The test for stagnation compared samples instead of steps: a batch of one ended after 30 steps, unconverged."""
    sol = deqkit.solve(lambda x: 0.95 * x + 1, scalar(0.0), solver="fixed_point", rtol=1e-6, max_steps=300)
    assert sol.status.tolist() == [Status.CONVERGED] and sol.num_steps.item() > 100


@pytest.mark.parametrize("history", [2, 5, 8])
def test_fault_05_short_broyden_history_stays_bounded(history: int) -> None:
    """With fewer pairs than steps, Broyden's residuals reached 1e47 and more."""
    eq = linear(n=40, batch=4, radius=0.95, seed=3)
    solver = deqkit.Broyden(history=history, restart_factor=float("inf"))  # nothing but the formula keeps it in check
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=solver, rtol=1e-10, max_steps=280, trace=True)
    assert sol.trace is not None and int(sol.num_steps.min()) > 5 * history  # at most 236, 116 and 110
    assert sol.trace.nan_to_num(nan=0.0).max() <= 1.5  # 1.0 at the start
    torch.testing.assert_close(sol.value, eq.solution, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", QUASI_NEWTON)
def test_fault_06_the_ridge_knows_no_scale(solver: str) -> None:
    """An absolute ridge stalled Anderson at small residuals, and the adjoint solve with it."""
    eq = tanh(n=40, batch=4, radius=0.95, seed=3)
    b = eq.args[1].clone().requires_grad_()
    small = 2.0**-40  # by powers of two every number scales without rounding, so all must be the same bit for bit
    settings: dict[str, Any] = {"solver": solver, "adjoint": deqkit.ImplicitAdjoint(solver, rtol=1e-10), "rtol": 1e-10}
    one = deqkit.solve(eq.f, eq.x0, args=(eq.args[0], b), **settings)
    tiny = deqkit.solve(lambda x: small * eq.f(x / small, *eq.args), eq.x0, **settings)
    assert torch.equal(one.num_steps, tiny.num_steps) and torch.equal(one.value * small, tiny.value)
    (grad,) = torch.autograd.grad(one.value.sum(), b, retain_graph=True)
    steps = one.adjoint_stats.num_steps
    (tiny_grad,) = torch.autograd.grad(small * one.value.sum(), b)
    assert (
        steps is not None and torch.equal(steps, one.adjoint_stats.num_steps) and torch.equal(grad * small, tiny_grad)
    )
    plain = deqkit.solve(eq.f, eq.x0, args=eq.args, solver="fixed_point", rtol=1e-10, max_steps=900)
    assert one.num_fn_evals < 0.6 * plain.num_fn_evals  # measured: 36 and 42 of 83


def test_fault_07_damping_does_not_shrink_the_report() -> None:
    """The length of the damped step was taken for the residual: 1e-3 was claimed at a true 0.099."""
    solver = deqkit.FixedPointIteration(damping=0.99)
    f = lambda x: 0.5 * x + 1  # noqa: E731
    sol = deqkit.solve(f, scalar(1.8), solver=solver, rtol=0, atol=1e-2, max_steps=5, on_failure="ignore")
    assert sol.status.item() == Status.MAX_STEPS  # the steps are 1e-3 long
    assert sol.residual.item() == (f(sol.value) - sol.value).abs().item() > 0.09


def test_fault_08_gradients_in_eval_mode() -> None:
    """In eval mode the answer had no gradient."""
    layer = deqkit.nn.FixedPoint(Cell(), adjoint=EXACT_ADJOINT, **TIGHT)
    b = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    grads = []
    for mode in (True, False):
        x = layer.train(mode)(torch.zeros_like(b), b)
        grads.append(torch.autograd.grad(x.square().sum(), layer.module.linear.weight)[0])
    assert grads[1].any() and torch.equal(*grads)


def test_fault_09_spectral_radius_of_complex_pairs() -> None:
    """A power iteration turns with the pair for ever, and gave whatever it saw last: 0.486 for 0.9."""
    skewed = torch.tensor([[0.0, -2.7], [0.3, 0.0]], dtype=torch.float64)  # eigenvalues +0.9i and -0.9i, not normal
    a = torch.block_diag(skewed, 0.8 * torch.eye(3, dtype=torch.float64))
    u = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    quotients = []
    for _ in range(200):
        u = u @ a
        u = u / u.norm()
        quotients.append(torch.linalg.vecdot(u @ a, u).abs().item())
    assert max(quotients[-10:]) - min(quotients[-10:]) > 0.1 or abs(quotients[-1] - 0.9) > 0.1
    x = torch.zeros(1, 5, dtype=torch.float64)
    assert deqkit.spectral_radius(lambda x: x @ a.T, x).item() == pytest.approx(0.9, rel=1e-12)
    for history in (3, 4):  # where the Krylov space is started again and again
        wide = torch.block_diag(a, torch.diag(torch.linspace(-0.7, 0.7, 60, dtype=torch.float64)))
        radius = deqkit.spectral_radius(
            lambda x, a=wide: x @ a.T, torch.zeros(1, 65, dtype=torch.float64), history=history, max_products=1000
        )
        assert radius.item() == pytest.approx(0.9, rel=1e-3)


def test_fault_10_settings_are_neither_changed_nor_swallowed() -> None:
    """The caller's settings were changed in place, and unknown ones ignored."""
    solver, adjoint, args = deqkit.Anderson(history=3), deqkit.ImplicitAdjoint(max_steps=9), (scalar(1.0),)
    settings = {"solver": solver, "adjoint": adjoint, "args": args, "keep": [2]}
    before, x0 = copy.deepcopy(settings), scalar(0.0)
    deqkit.solve(halving, x0, **settings).value.sum()
    assert settings == before and x0.item() == 0.0
    with pytest.raises(FrozenInstanceError):
        solver.history = 4  # pyright: ignore[reportAttributeAccessIssue]
    makers: list[Callable[..., Any]] = [
        lambda **kwargs: deqkit.solve(halving, x0, args=args, **kwargs),
        lambda **kwargs: deqkit.nn.FixedPoint(Cell(), **kwargs),
        *(type(SOLVERS[name]()) for name in SOLVERS),
        *ADJOINTS.values(),
    ]
    for make in makers:
        with pytest.raises(TypeError, match="f_max_iter"):
            make(f_max_iter=40)


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_11_a_stochastic_f_is_noticed(solver: str) -> None:
    """A function with dropout, which has no fixed point, was solved without a word."""
    b = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(4, 16)
    cell = Cell(16, dropout=0.2)
    with torch.random.fork_rng(), pytest.warns(deqkit.ConvergenceWarning, match="check that f is deterministic"):
        torch.manual_seed(0)
        sol = deqkit.solve(cell, torch.zeros_like(b), args=(b,), solver=solver, max_steps=300)
    assert not sol.converged.any()
    assert deqkit.solve(cell.eval(), torch.zeros_like(b), args=(b,), solver=solver, max_steps=300).converged.all()


# Crashes


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_12_exact_adjoint_under_autocast(solver: str) -> None:
    """The backward pass of the exact adjoint crashed under autocast."""
    linear_map = Cell().float().linear
    b = torch.linspace(-1, 1, 8).reshape(2, 4)

    def f(x: Tensor) -> Tensor:
        y = linear_map(x)
        return torch.tanh(y + b.to(y.dtype))

    def gradient(enabled: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert (f(b).dtype == torch.bfloat16) == enabled
            adjoint = deqkit.ImplicitAdjoint(backward(solver))
            sol = deqkit.solve(f, torch.zeros_like(b), solver=solver, adjoint=adjoint, rtol=1e-2, max_steps=200)
        return torch.autograd.grad(sol.value.square().sum(), linear_map.weight)[0]

    full, half = gradient(False), gradient(True)
    assert half.dtype == torch.float32 and (half - full).norm() <= 0.05 * full.norm()  # measured: 0.02 at most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton_krylov"])
def test_fault_13_half_precision(solver: str, dtype: torch.dtype) -> None:
    """Anderson crashed in bfloat16: its small system cannot be solved in that."""
    rates = torch.linspace(0.2, 0.9, 12).reshape(3, 4).to(dtype).requires_grad_()
    sol = deqkit.solve(lambda x, r: r * torch.cos(x), torch.zeros_like(rates), args=(rates,), solver=solver, rtol=2e-2)
    sol.value.sum().backward()
    assert sol.value.dtype == dtype and sol.converged.all() and (sol.num_steps > 1).all()
    slope = 1 + rates.detach().double() * torch.sin(sol.value.detach().double())
    expected = torch.cos(sol.value.detach().double()) / slope
    torch.testing.assert_close(rates.grad.double(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_fault_14_two_forwards_before_one_backward(adjoint: str) -> None:
    """Backward hooks of two forward passes called each other without end, and graphs were never freed."""
    cell = Cell()
    solver = "reversible" if adjoint == "reversible" else "anderson"
    layer = deqkit.nn.FixedPoint(cell, solver=solver, adjoint=adjoint, rtol=1e-12, max_steps=200)
    b = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)

    def gradient(*inputs: Tensor) -> Tensor:
        total = sum(layer(torch.zeros_like(b), c).square().sum() for c in inputs)
        return torch.autograd.grad(total, cell.linear.weight)[0]  # pyright: ignore[reportArgumentType]

    torch.testing.assert_close(gradient(b, 2 * b), gradient(b) + gradient(2 * b), rtol=1e-12, atol=1e-14)

    class F:
        def __call__(self, x: Tensor) -> Tensor:
            return cell(x, b)

    f = F()
    held = weakref.ref(f)
    gc.disable()  # a graph that only the garbage collector can free counts as a leak
    try:
        x = deqkit.solve(f, torch.zeros_like(b), solver=solver, adjoint=adjoint).value
        x.sum().backward()
        del f, x
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_15_every_solver_name_works_in_both_passes(solver: str) -> None:
    """A solver name that the documentation gave worked in the forward pass and raised in the backward pass."""
    b = scalar(1.0).requires_grad_()
    adjoint = deqkit.ImplicitAdjoint(backward(solver), rtol=1e-10)
    sol = deqkit.solve(halving, scalar(0.0), args=(b,), solver=solver, adjoint=adjoint, rtol=1e-10, max_steps=100)
    sol.value.sum().backward()
    assert b.grad is not None and b.grad.item() == pytest.approx(2.0, rel=1e-8)
    assert sol.solver == solver and sol.adjoint_stats.solver == backward(solver)


def test_fault_16_settings_of_a_call_and_of_the_backward_pass() -> None:
    """Another tolerance for one call raised, and the backward solver could not be set."""
    layer = deqkit.nn.FixedPoint(Cell(), solver="fixed_point")
    b = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    reached = []
    for rtol in (1e-2, 1e-8):
        layer.rtol = rtol
        layer(torch.zeros_like(b), b)
        assert layer.last_solution is not None and layer.last_solution.converged.all()
        reached.append(layer.last_solution.relative_residual.max().item())
    assert reached[1] <= 1e-8 < reached[0] <= 1e-2
    layer.adjoint = deqkit.ImplicitAdjoint("broyden", rtol=1e-3, max_steps=7)
    layer(torch.zeros_like(b), b).sum().backward()
    stats = layer.last_solution.adjoint_stats
    assert stats.solver == "broyden" and stats.relative_residual is not None and stats.num_steps is not None
    assert 1e-8 < stats.relative_residual.max() <= 1e-3 and stats.num_steps.max() <= 7
    layer.adjoint = deqkit.ImplicitAdjoint("fixed_point", max_steps=1)
    x = layer(torch.zeros_like(b), b)
    with pytest.warns(deqkit.ConvergenceWarning, match="adjoint solve.*after 1 steps"):
        x.sum().backward()


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_17_dict_state_empty_batch_history_of_one(solver: str) -> None:
    """A dict as the state, a batch without samples and a history of one pair each crashed."""
    f = lambda x: {"a": 0.5 * x["b"] + 1, "b": 0.5 * x["a"] + 1}  # noqa: E731
    for batch in (3, 0):
        x0 = {"a": torch.zeros(batch, 2, dtype=torch.float64), "b": torch.zeros(batch, 2, dtype=torch.float64)}
        sol = deqkit.solve(f, x0, solver=solver, rtol=1e-9, max_steps=100)
        assert list(sol.value) == ["a", "b"] and sol.status.tolist() == [Status.CONVERGED] * batch
        assert (sol.num_fn_evals > 0) == (batch > 0)  # not every f can do without samples
        torch.testing.assert_close(sol.value, {k: torch.full_like(v, 2.0) for k, v in x0.items()}, rtol=1e-7, atol=0)
    if hasattr(SOLVERS[solver], "history"):
        short = SOLVERS[solver](history=1)  # pyright: ignore[reportCallIssue]
        eq = linear(n=3, batch=2, radius=0.3)
        sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=short, rtol=1e-9, max_steps=200)
        torch.testing.assert_close(sol.value, eq.solution, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_18_no_device_is_taken_for_granted(solver: str) -> None:
    """Tensors were moved by a hard-coded .cuda()."""
    # On the meta device an operation that meets a tensor of another device, or a look at a value, is an error.
    b = torch.ones(2, 3, device="meta", requires_grad=True)
    sol = deqkit.solve(
        halving, torch.zeros(2, 3, device="meta"), args=(b,), solver=solver,
        adjoint=deqkit.ImplicitAdjoint(backward(solver), rtol=0.0), rtol=0, atol=0, max_steps=4, on_failure="ignore",
    )  # fmt: skip
    sol.value.sum().backward()
    stats = sol.adjoint_stats
    tensors = [sol.value, sol.status, sol.residual, sol.relative_residual, sol.num_steps, b.grad, stats.status]
    assert [t.device.type for t in tensors if t is not None] == ["meta"] * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fault_19_dropout_masks_are_those_of_the_input(device: str, dtype: torch.dtype) -> None:
    """Masks of variational dropout were float32 on the CPU, whatever the input."""
    dropout, outs = deqkit.nn.VariationalDropout(0.5), []

    def f(x: Tensor, b: Tensor) -> Tensor:
        outs.append(dropout(torch.ones_like(x)))
        return 0.25 * dropout(x) + b

    b = torch.ones(2, 8, dtype=dtype, device=device, requires_grad=True)
    adjoint = deqkit.ImplicitAdjoint(rtol=0.0)
    x = deqkit.solve(f, torch.zeros_like(b), args=(b,), adjoint=adjoint, rtol=0, max_steps=4, on_failure="ignore").value
    x.sum().backward()
    assert x.dtype == dtype and b.grad is not None and len(outs) >= 5
    assert all(out.dtype == dtype and out.device.type == device for out in outs)
    if device == "cpu":
        assert all(torch.equal(out, outs[0]) for out in outs) and set(outs[0].unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("constrain", [deqkit.nn.weight_norm, deqkit.nn.spectral_norm])
def test_fault_20_constrained_weights(constrain: Callable[..., torch.nn.Module]) -> None:
    """A second backward without a reset failed, deepcopy and pickle failed, a loaded state left a stale weight, and a
    weight computed under no_grad had no gradient.
    """
    x0, b = torch.zeros(2, 4, dtype=torch.float64), torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)

    def layer() -> deqkit.nn.FixedPoint:
        cell = Cell()
        constrain(cell.linear, 0.4)
        return deqkit.nn.FixedPoint(cell, **TIGHT)

    mine = layer()
    with torch.no_grad():
        mine(x0, b)  # no call before that leaves anything behind
    gradients = []
    for _ in range(2):
        mine.zero_grad()
        mine(x0, b).square().sum().backward()
        gradients.append([p.grad for p in mine.parameters()])
    assert all(g is not None and g.any() for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(other(x0, b), mine(x0, b))
    other = layer()
    before = other(x0, b)
    with torch.no_grad():
        for p in mine.parameters():
            p.mul_(0.5)
    other.load_state_dict(mine.state_dict())
    assert torch.equal(other(x0, b), mine(x0, b)) and not torch.allclose(other(x0, b), before)


@pytest.mark.parametrize("solver", CLASSIC)
def test_fault_21_function_transforms(solver: str) -> None:
    """Forward mode, torch.func and fullgraph compilation all failed."""
    b = torch.linspace(0.1, 0.6, 6, dtype=torch.float64).reshape(2, 3)
    f = lambda x, b: 0.5 * torch.tanh(x) + b  # noqa: E731

    def layer(b: Tensor, adjoint: str = "unrolled", **settings: Any) -> Tensor:
        settings = {"rtol": 1e-12, "max_steps": 100} | settings
        return deqkit.solve(f, torch.zeros_like(b), args=(b,), solver=solver, adjoint=adjoint, **settings).value

    x, dx = torch.func.jvp(layer, (b,), (torch.ones_like(b),))
    expected = 1 / (1 - 0.5 * (1 - torch.tanh(x) ** 2))
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.grad(lambda b: layer(b).sum())(b), expected, rtol=1e-6, atol=0)
    exact = deqkit.ImplicitAdjoint(solver)
    torch.testing.assert_close(torch.func.grad(lambda b: layer(b, exact).sum())(b), expected, rtol=1e-6, atol=0)
    dx = torch.func.jvp(lambda b: layer(b, exact), (b,), (torch.ones_like(b),))[1]
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)
    # Approximate adjoints have no tangent: an error, and never a wrong number.
    for adjoint in ("jfb", "neumann", "phantom"):
        leaf = b.clone().requires_grad_()
        expected = torch.autograd.grad(layer(leaf, adjoint).sum(), leaf)[0]
        torch.testing.assert_close(torch.func.grad(lambda b, a=adjoint: layer(b, a).sum())(b), expected)
        with pytest.raises(NotImplementedError, match="adjoint='implicit' or 'unrolled'"):
            torch.func.jvp(lambda b, a=adjoint: layer(b, a), (b,), (torch.ones_like(b),))


FULLGRAPH = [(solver, "unrolled") for solver in (*CLASSIC, "newton_krylov", "auto")]
FULLGRAPH += [("fixed_point", name) for name in ("implicit", "jfb", "neumann", "phantom")]
FULLGRAPH += [("anderson", "implicit"), ("broyden", "implicit")]


@pytest.mark.parametrize(("solver", "adjoint"), FULLGRAPH)
def test_fault_21_fixed_steps_are_one_graph_with_gradients(solver: str, adjoint: str) -> None:
    """A fixed number of steps did not compile with fullgraph."""

    def layer(b: Tensor) -> Tensor:
        f = lambda x, b: 0.5 * torch.tanh(x) + b  # noqa: E731
        how = deqkit.ImplicitAdjoint(solver) if adjoint == "implicit" else adjoint
        settings: dict[str, Any] = {"solver": solver, "adjoint": how, "rtol": 0, "max_steps": 2}
        return deqkit.solve(f, torch.zeros_like(b), args=(b,), on_failure="ignore", **settings).value

    b = torch.linspace(0.1, 0.6, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    values = compiled(b), layer(b)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), b)[0] for x in values))


# Cost and reporting


@pytest.mark.parametrize(("solver", "torchdeq"), [("fixed_point", 42), ("anderson", 90), ("broyden", 150)])
def test_fault_22_no_more_operations_than_torchdeq(solver: str, torchdeq: int) -> None:
    """A step took many tensor operations beyond f; counted for torchdeq 0.1.0 in the same way, without gradients."""
    assert operations_per_step(solver) <= torchdeq


@pytest.mark.parametrize(
    ("solver", "measured"), [("fixed_point", 14), ("anderson", 66), ("broyden", 73), ("newton_krylov", 280)]
)
def test_fault_22_operations_and_looks_per_step(solver: str, measured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step took many tensor operations beyond f, and each looked at the device."""
    assert operations_per_step(solver) <= 1.02 * measured  # so that none creep in
    monkeypatch.setattr(arrays, "free_to_look", lambda device: False)  # as on a GPU
    eq = tanh(n=8, batch=4)
    for check_every in (1, 5):
        lazy = SOLVERS[solver](check_every=check_every)
        counts = []
        for max_steps in (10, 20):
            with Looks() as looks, torch.no_grad():
                deqkit.solve(
                    eq.f, eq.x0, args=eq.args, solver=lazy, rtol=1e-30, max_steps=max_steps, on_failure="ignore"
                )
            counts.append(looks.count)
        assert counts[1] - counts[0] == 10 / check_every


def test_fault_23_histories_are_allocated_and_computed_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broyden took memory for all steps at once, and Anderson computed its whole Gram matrix at every step."""
    n, batch, size = 1000, 2, 8
    for solver in (deqkit.Anderson(history=200), deqkit.Broyden(history=200)):
        state = state_after(solver, monkeypatch, steps=5, n=n)
        buffers = [h for h in vars(state).values() if isinstance(h, linalg.History)]
        assert len(buffers) == 2 and all(0 < h.num_columns <= 5 for h in buffers)
        assert num_bytes(buffers) <= 2 * 8 * batch * n * size  # capacities go 2, 4, 8; of 200
    eq = linear(n=30, batch=batch, radius=0.9)
    with Operations() as operations, torch.no_grad():
        f = operations.without(lambda x: eq.f(x, *eq.args))
        deqkit.solve(f, eq.x0, rtol=1e-30, max_steps=15, on_failure="ignore")
    products = [shape for name, shape in operations.seen if name in ("bmm", "mm", "matmul", "baddbmm", "einsum")]
    # No matrix times matrix: a product with all columns is taken of one vector, or of two at once.
    assert len(products) >= 2 * 12 and all(min(shape[1:]) <= 2 for shape in products)


@pytest.mark.parametrize("solver", [deqkit.Anderson, deqkit.Broyden])
def test_fault_23_memory_knows_no_limit_that_was_not_reached(
    solver: Callable[..., deqkit.Solver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broyden took memory for all steps at once."""
    sizes = [num_bytes(state_after(solver(history=m), monkeypatch, steps=5, n=20)) for m in (10, 100)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("solver", CLASSIC)
def test_fault_24_leaves_are_not_concatenated(solver: str) -> None:
    """A state of several tensors was concatenated and taken apart at every call of f."""
    a = torch.linspace(0.1, 0.9, 24).reshape(2, 3, 4)
    views: list[bool] = []

    def f(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        views.extend(leaf._is_view() for leaf in x)
        return a * x[0] + 1, 0.5 * x[1] + x[0].sum(2)

    with Operations() as operations, torch.no_grad():
        x0 = (torch.zeros(2, 3, 4), torch.zeros(2, 3))
        sol = deqkit.solve(operations.without(f), x0, solver=solver, max_steps=12, rtol=1e-30, on_failure="ignore")
    assert sol.num_fn_evals == 13 and len(views) == 26 and all(views)  # what f gets is not a copy
    joined = [shape for name, shape in operations.seen if name in ("cat", "stack", "hstack", "concat")]
    assert all(15 not in shape and 15 * 2 not in shape for shape in joined)  # as a sample has 12 + 3 numbers


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_25_no_evaluation_is_thrown_away(solver: str) -> None:
    """Anderson did not use its first two evaluations, and a start at the very answer cost three."""
    f = lambda x: 0.5 * x + 1  # noqa: E731
    with torch.no_grad():
        assert deqkit.solve(f, scalar(2.0), solver=solver).num_fn_evals == 1
        if solver not in ("fixed_point", "reversible"):
            # Two values of an affine function of one number tell its root; the third one is there to see it.
            sol = deqkit.solve(f, scalar(0.0), solver=solver, rtol=1e-6)
            assert sol.num_fn_evals == 3 and sol.value.item() == pytest.approx(2.0, rel=1e-6)


def test_fault_26_flags_counts_and_traces_are_measured() -> None:
    """There was no flag for convergence and no count of calls, and traces began at 1e8 and were padded."""
    rates, calls = torch.tensor([[0.2], [0.99]], dtype=torch.float64), 0

    def f(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return rates * x + 1

    x0 = torch.ones_like(rates)
    sol = deqkit.solve(f, x0, solver="fixed_point", max_steps=20, trace=True, on_failure="ignore")
    assert sol.converged.tolist() == [True, False] and sol.num_fn_evals == calls == 22
    assert sol.trace is not None and sol.trace.shape == (21, 2)
    x = x0
    for step, row in enumerate(sol.trace):
        true = ((rates * x + 1 - x) / (rates * x + 1)).abs()[:, 0]
        for sample in (0, 1):
            if step <= sol.num_steps[sample]:
                torch.testing.assert_close(row[sample], true[sample], rtol=1e-12, atol=0)
            else:
                assert row[sample].isnan()
        x = rates * x + 1


def test_fault_26_traces_and_states_of_stages_have_no_gaps() -> None:
    """Traces held rows at which nothing was measured."""
    rates = torch.tensor([[-1.0], [0.9]], dtype=torch.float64)  # the first one jumps to and fro, and stagnates
    solver = deqkit.Auto((deqkit.FixedPointIteration(), deqkit.Anderson()))
    settings: dict[str, Any] = {"solver": solver, "max_steps": 400, "trace": True, "keep": (51,), "rtol": 1e-6}
    both = deqkit.solve(lambda x: rates * x + 1, torch.zeros(2, 1, dtype=torch.float64), **settings)
    alone = deqkit.solve(lambda x: -x + 1, scalar(0.0), **settings)
    assert both.trace is not None and alone.trace is not None
    assert both.num_steps[0] == alone.num_steps[0] == 52 < both.num_steps[1]
    torch.testing.assert_close(both.trace[:53, 0], alone.trace[:, 0])
    torch.testing.assert_close(both.states[51][0], alone.states[51][0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_27_the_batch_is_what_the_caller_says(solver: str) -> None:
    """The first dim was always taken for the batch."""
    rates = torch.tensor([[0.0, 0.3, 0.6], [0.2, 0.5, 0.8]], dtype=torch.float64)
    solutions = [
        deqkit.solve(lambda x: rates * torch.cos(x), torch.zeros(2, 3, dtype=torch.float64), solver=solver,
                     rtol=1e-9, max_steps=200, batch_dims=batch_dims)
        for batch_dims in (0, 1, 2)
    ]  # fmt: skip
    fx = [rates * torch.cos(sol.value) for sol in solutions]
    for dims, (sol, image) in enumerate(zip(solutions, fx, strict=True)):
        assert sol.status.shape == sol.num_steps.shape == rates.shape[:dims] and sol.converged.all()
        true = (image - sol.value).reshape(*rates.shape[:dims], -1).norm(dim=-1)
        torch.testing.assert_close(sol.residual, true)
        torch.testing.assert_close(sol.value, solutions[0].value, rtol=1e-7, atol=1e-9)
    assert len(set(solutions[2].num_steps.flatten().tolist())) > 1  # each number is a sample and stops by itself


@pytest.mark.parametrize("solver", SOLVERS)
def test_fault_28_state_k_is_that_after_k_steps(solver: str) -> None:
    """The states of the trajectory were one step off."""
    eq = tanh(n=5, batch=2, radius=0.9)
    seen: list[Tensor] = []
    sol = deqkit.solve(
        eq.f, eq.x0, args=eq.args, solver=solver, rtol=1e-6, max_steps=100, keep=range(4),
        callback=lambda info: seen.append(info.value.clone()), on_failure="ignore",
    )  # fmt: skip
    assert list(sol.states) == [0, 1, 2, 3] and torch.equal(sol.states[0], eq.x0)
    for k, x in sol.states.items():
        assert torch.equal(x, seen[k])
        if solver == "fixed_point" and k:
            assert torch.equal(x, tanh_layer(seen[k - 1], *eq.args))
