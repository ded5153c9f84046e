"""The solver in mixed precision: cheap calls first, and a report, a value and a gradient of full precision."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from equations import affine, linear, tanh
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deqkit
from adapters.detection import ImplicitFPN
from deqkit import Status

MIXED = deqkit.MixedPrecision()
SOLVERS = [deqkit.Anderson(), deqkit.Broyden(), deqkit.FixedPointIteration(), deqkit.NewtonKrylov()]
EPS = torch.finfo(torch.bfloat16).eps

solve = torch.no_grad()(deqkit.solve)  # without the evaluation that carries the gradient


class Counted:
    """tanh(A x + b) in float32, which notes the precision of each call."""

    def __init__(self, n: int = 20, batch: int = 4, radius: float = 0.8, seed: int = 0) -> None:
        self.eq = tanh(n, batch, radius, seed)
        self.a, self.b = (t.float() for t in self.eq.args)
        self.x0 = torch.zeros_like(self.b)
        self.low: list[bool] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.low.append(is_low())
        return torch.tanh(x @ self.a.T + self.b)

    def residual(self, x: Tensor) -> Tensor:
        """Relative, of f in full precision, measured in float64."""
        fx = torch.tanh(x.double() @ self.a.double().T + self.b.double())
        return (fx - x).norm(dim=1) / fx.norm(dim=1)


def is_low() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def same(a: deqkit.Solution, b: deqkit.Solution) -> bool:
    names = ("value", "status", "residual", "num_steps")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.num_fn_evals == b.num_fn_evals


# ---------------------------------------------------------------------------------------------------------------------
# what it does


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_low_calls_come_first_and_what_is_reported_is_true(solver: deqkit.Solver) -> None:
    f = Counted()
    sol = solve(f, f.x0, solver=deqkit.MixedPrecision(solver), rtol=1e-5, max_steps=100)
    assert sol.solver == "mixed_precision" and sol.converged.all()
    num_low = sum(f.low)
    assert 0 < num_low < len(f.low) == sol.num_fn_evals and f.low == sorted(f.low, reverse=True)
    torch.testing.assert_close(sol.relative_residual.double(), f.residual(sol.value), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(sol.value.double(), f.eq.solution, rtol=0, atol=3e-4)
    # It is no worse than one evaluation more and the new start.
    alone = solve(f, f.x0, solver=solver, rtol=1e-5, max_steps=100)
    assert sol.num_fn_evals <= alone.num_fn_evals + 6 and sol.num_fn_evals - num_low < alone.num_fn_evals - 4


def test_a_tolerance_that_low_precision_reaches_takes_one_full_evaluation() -> None:
    f = Counted()
    sol = solve(f, f.x0, solver="mixed_precision", rtol=0.05)
    assert sol.converged.all() and f.low.count(False) == 1
    assert (f.residual(sol.value) <= 0.05).all()


def test_float16_goes_further_before_it_ends() -> None:
    counts = {}
    for dtype in (torch.bfloat16, torch.float16):
        low: list[bool] = []
        f = Counted()

        def g(x: Tensor, f: Any = f, low: list[bool] = low) -> Tensor:
            low.append(torch.is_autocast_enabled("cpu"))
            return f(x)

        sol = solve(g, f.x0, solver=deqkit.MixedPrecision(dtype=dtype), rtol=1e-5)
        assert sol.converged.all()
        counts[dtype] = low.count(False)
    assert counts[torch.float16] < counts[torch.bfloat16]


def test_samples_do_not_notice_one_another() -> None:
    g = torch.Generator().manual_seed(0)
    a = tanh(12, 6, 0.9).args[0].float()
    gain, b = torch.linspace(0.1, 1.2, 6).unsqueeze(1), torch.randn(6, 12, generator=g)
    f = lambda x, gain, b: torch.tanh(gain * (x @ a.T) + b)  # noqa: E731
    settings: dict[str, Any] = {"solver": MIXED, "rtol": 1e-5, "max_steps": 80, "trace": True}
    sol = solve(f, torch.zeros(6, 12), args=(gain, b), **settings)
    assert sol.converged.all() and len(set(sol.num_steps.tolist())) > 3
    for i in range(6):
        own = slice(i, i + 1)
        alone = solve(f, torch.zeros(1, 12), args=(gain[own], b[own]), **settings)
        assert alone.status[0] == sol.status[i] and abs(int(alone.num_steps[0] - sol.num_steps[i])) <= 1
        torch.testing.assert_close(alone.value[0], sol.value[i], rtol=0, atol=1e-4)
    narrow = solve(f, torch.zeros(6, 12), args=(gain, b), sample_args=(0, 1), **settings)
    assert narrow.converged.all()
    torch.testing.assert_close(narrow.value, sol.value, rtol=0, atol=1e-4)


def test_sample_args_narrow_f_in_both_stages() -> None:
    a = tanh(12, 8, 0.9).args[0].float()
    gain, b = torch.linspace(0.05, 1.2, 8).unsqueeze(1), torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    sizes: list[tuple[bool, int]] = []

    def f(x: Tensor, gain: Tensor, b: Tensor) -> Tensor:
        sizes.append((is_low(), len(x)))
        return torch.tanh(gain * (x @ a.T) + b)

    solve(f, torch.zeros(8, 12), args=(gain, b), sample_args=(0, 1), solver=MIXED, rtol=1e-5, max_steps=80)
    for stage in (True, False):
        mine = [size for low, size in sizes if low == stage]
        assert mine[0] == 8 and min(mine) < 6 and mine == sorted(mine, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# where there is nothing to gain, it is its solver


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float16, torch.bfloat16], ids=str)
def test_states_that_autocast_would_not_lower(dtype: torch.dtype) -> None:
    eq = linear()
    a, b = (t.to(dtype) for t in eq.args)
    calls: list[bool] = []

    def f(x: Tensor) -> Tensor:
        calls.append(is_low())
        return affine(x, a, b)

    settings = {"rtol": 16 * torch.finfo(dtype).eps, "max_steps": 100, "on_failure": "ignore"}
    mixed = solve(f, torch.zeros_like(b), solver=MIXED, **settings)
    assert not any(calls) and same(mixed, solve(f, torch.zeros_like(b), **settings))


def test_a_leaf_of_float64_keeps_all_in_full_precision() -> None:
    f = lambda s: (0.5 * s[0] + 1, 0.5 * s[1] + s[0])  # noqa: E731
    x0 = (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64))
    mixed = solve(f, x0, solver=MIXED, rtol=1e-6)
    assert mixed.num_fn_evals == solve(f, x0, rtol=1e-6).num_fn_evals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inside_of_autocast(dtype: torch.dtype) -> None:
    f = Counted()
    with torch.autocast("cpu", dtype=dtype):
        settings = {"rtol": 2e-2, "max_steps": 30, "on_failure": "ignore"}
        assert same(solve(f, f.x0, solver=MIXED, **settings), solve(f, f.x0, **settings))
        with torch.autocast("cpu", enabled=False):
            f.low.clear()
            sol = solve(f, f.x0, solver=MIXED, rtol=1e-5)
    assert sol.converged.all() and any(f.low) and not f.low[-1]


def test_casts_cached_in_another_precision() -> None:
    """PyTorch caches the cast of a parameter, whatever the dtype, until the outermost autocast ends."""
    f = Counted()
    weight = nn.Parameter(f.a)
    half = lambda: nn.functional.linear(f.x0, weight).dtype  # noqa: E731
    with torch.autocast("cpu", dtype=torch.float16):
        assert half() == torch.float16
        with torch.autocast("cpu", enabled=False):
            sol = solve(lambda x: torch.tanh(nn.functional.linear(x, weight) + f.b), f.x0, solver=MIXED, rtol=1e-5)
        assert half() == torch.float16
    assert sol.converged.all()


class Casts(TorchDispatchMode):
    """Counts casts of what requires grad."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._to_copy.default and args[0].requires_grad
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [MIXED, deqkit.MixedPrecision(deqkit.Broyden(), torch.float16)])
def test_weights_are_cast_once_in_a_solve(solver: deqkit.Solver) -> None:
    f = Counted()
    weight = nn.Parameter(f.a)
    for _ in range(2):
        with Casts() as casts:
            sol = solve(lambda x: torch.tanh(nn.functional.linear(x, weight) + f.b), f.x0, solver=solver, rtol=1e-5)
            assert casts.num == 1 and sol.converged.all()
        torch.no_grad()(weight.mul_)(-1)


def test_autocast_is_as_it_was_afterwards() -> None:
    f = Counted()

    def breaks(x: Tensor) -> Tensor:
        if len(f.low) == 3:
            raise KeyError("f")
        return f(x)

    with pytest.raises(KeyError):
        solve(breaks, f.x0, solver=MIXED)
    assert f.low == [True] * 3 and not torch.is_autocast_enabled("cpu")


def test_a_fixed_number_of_steps_is_all_in_full_precision() -> None:
    f = Counted()
    settings = {"rtol": 0, "atol": 0, "max_steps": 7, "trace": True}
    mixed = solve(f, f.x0, solver=MIXED, **settings)
    assert not any(f.low) and same(mixed, solve(f, f.x0, **settings))


# ---------------------------------------------------------------------------------------------------------------------
# where low precision fails


class Precise(nn.Module):
    """x -> x / 2 + 1 in full precision, and whatever ``low`` makes of x under autocast."""

    def __init__(self, low: Any) -> None:
        super().__init__()
        self.low, self.calls = low, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(is_low())
        return self.low(x) if is_low() else 0.5 * x + 1


@pytest.mark.parametrize(
    "low",
    {
        "no fixed point": torch.exp,
        "repelling": lambda x: -30 * x - 10,
        "nan": lambda x: x * torch.nan,
        "nan further on": lambda x: torch.where(x > 0.9, torch.nan, x + 0.5),
        "another fixed point": lambda x: 0.5 * x - 50,
        "noise": lambda x: 0.5 * x + 1 + 3 * torch.sin(1e4 * x),
        "the start": lambda x: x,
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda s: s.name)
def test_full_precision_makes_up_for_a_low_one_that_fails(solver: deqkit.Solver, low: Any) -> None:
    f = Precise(low[1])
    sol = solve(f, torch.zeros(3, 2), solver=deqkit.MixedPrecision(solver), rtol=1e-6, max_steps=100)
    assert sol.converged.all() and f.calls[0] and sum(f.calls) < 60
    torch.testing.assert_close(sol.value, torch.full((3, 2), 2.0), rtol=1e-5, atol=0)


def test_values_beyond_the_range_of_float16() -> None:
    a = 0.5 * torch.eye(4)
    f = lambda x: x @ a + 1e5  # noqa: E731
    sol = solve(f, torch.zeros(2, 4), solver=deqkit.MixedPrecision(dtype=torch.float16), rtol=1e-6)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, torch.full((2, 4), 2e5), rtol=1e-5, atol=0)


def test_a_nan_sample_costs_its_neighbours_nothing() -> None:
    f = Counted(batch=3)
    without = solve(f, f.x0, solver=MIXED, rtol=1e-5)
    f.b[1, 0] = torch.nan
    sol = solve(f, f.x0, solver=MIXED, rtol=1e-5, on_failure="ignore")
    assert sol.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert torch.equal(sol.value[::2], without.value[::2]) and torch.equal(sol.num_steps[::2], without.num_steps[::2])
    assert torch.equal(sol.value[1], f.x0[1]) and sol.residual[1].isnan()


@pytest.mark.parametrize("max_steps", [0, 1, 3, 6])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_steps_that_low_precision_uses_up(solver: deqkit.Solver, max_steps: int) -> None:
    f = Counted(radius=0.97)
    mixed = deqkit.MixedPrecision(solver)
    settings: dict[str, Any] = {"rtol": 1e-6, "max_steps": max_steps, "on_failure": "ignore", "trace": True}
    sol = solve(f, f.x0, solver=mixed, **settings)
    assert (sol.status == Status.MAX_STEPS).all() and (sol.num_steps == max_steps).all()
    assert f.low == [True] * (max_steps + 1) + [False]
    torch.testing.assert_close(sol.relative_residual.double(), f.residual(sol.value), rtol=1e-4, atol=0)
    assert sol.trace is not None and len(sol.trace) == max_steps + 1
    assert torch.equal(sol.trace[-1], sol.relative_residual)


# ---------------------------------------------------------------------------------------------------------------------
# the report


def test_trace_states_and_callback_count_through() -> None:
    f = Counted(batch=5, radius=0.95)
    told: list[deqkit.StepInfo] = []
    steps = range(40)
    sol = solve(f, f.x0, solver=MIXED, rtol=1e-5, trace=True, keep=steps, callback=told.append)
    assert sol.trace is not None and len(sol.trace) == int(sol.num_steps.max()) + 1
    assert len(told) == sol.num_fn_evals and [info.step for info in told] == sorted(info.step for info in told)
    assert torch.equal(sol.states[0], f.x0) and torch.equal(sol.states[39], sol.value)
    for i, last in enumerate(sol.num_steps.tolist()):
        assert sol.trace[: last + 1, i].isfinite().all() and sol.trace[last + 1 :, i].isnan().all()
        assert sol.trace[last, i] == sol.relative_residual[i] == sol.trace[: last + 1, i].min()
        assert torch.equal(sol.states[last][i], sol.value[i])
        for k in range(last + 1):  # each row is the residual of that step's point, but for rounding in low precision
            true = f.residual(sol.states[k])[i].item()
            assert abs(float(sol.trace[k, i]) - true) <= EPS + 1e-6
            if k >= last - 2:
                assert float(sol.trace[k, i]) == pytest.approx(true, rel=0.02)


def test_a_step_kept_at_the_change_is_the_point_that_was_gone_on_from() -> None:
    """In the second stage a sample starts from its best point, wherever the first one ended."""
    f = Precise(lambda x: torch.where(x < 0.9, x + 0.5, -3 * x))  # 0.2 off at step 3, and not again
    told: list[deqkit.StepInfo] = []
    settings: dict[str, Any] = {"rtol": 1e-6, "trace": True, "max_steps": 60}
    sol = solve(
        f, torch.zeros(1, 2), solver=deqkit.MixedPrecision(deqkit.FixedPointIteration()), keep=range(60),
        callback=told.append, **settings,
    )  # fmt: skip
    change = sum(f.calls) - 1
    start = told[sum(f.calls)]
    assert start.step == change and torch.equal(start.value, sol.states[change])
    assert sol.trace is not None and torch.equal(sol.trace[change], start.relative_residual)
    for info in told[change + 1 :]:
        assert torch.equal(sol.states[info.step], info.value)
    for info in told[:change]:
        assert torch.equal(sol.states[info.step], info.value)


def test_leaves_are_judged_apart() -> None:
    f = Counted(n=12)

    def pair(s: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y = f(torch.cat(s, dim=1) * torch.tensor([1.0] * 6 + [100.0] * 6))
        return y[:, :6], y[:, 6:] / 100

    x0 = (torch.zeros(4, 6), torch.zeros(4, 6))
    sol = solve(pair, x0, solver=MIXED, norm="leaf_max", rtol=1e-5)
    assert sol.converged.all() and sol.leaf_residuals is not None and any(f.low)
    with torch.no_grad():
        true = torch.stack(
            [(a - b).norm(dim=1) / a.norm(dim=1) for a, b in zip(pair(sol.value), sol.value, strict=True)]
        )
    torch.testing.assert_close(sol.leaf_residuals, true, rtol=1e-2, atol=1e-7)


def test_empty_batch_and_other_batch_dims() -> None:
    f = Counted(n=8, batch=6)
    assert solve(lambda x: x, torch.zeros(0, 3), solver=MIXED).num_fn_evals == 0
    for dims, shape in ((0, (48,)), (2, (2, 3, 8))):
        g = lambda x, shape=shape: f(x.reshape(6, 8)).reshape(shape)  # noqa: E731
        f.low.clear()
        sol = solve(g, torch.zeros(shape), solver=MIXED, batch_dims=dims, rtol=1e-5, trace=True)
        assert sol.converged.all() and sol.status.shape == shape[:dims] and any(f.low)
        torch.testing.assert_close(sol.value.reshape(6, 8).double(), f.eq.solution, rtol=0, atol=3e-4)


def test_copies() -> None:
    solver = deqkit.MixedPrecision(deqkit.Broyden(history=4), dtype=torch.float16)
    assert copy.deepcopy(solver) == pickle.loads(pickle.dumps(solver)) == solver and hash(solver) is not None
    assert repr(deqkit.MixedPrecision()).startswith("MixedPrecision(")


@pytest.mark.parametrize("lazy", [1, 3])
def test_looking_seldom_changes_nothing(lazy: int) -> None:
    f = Counted()
    eager = solve(f, f.x0, solver=MIXED, rtol=1e-5)
    seldom = solve(f, f.x0, solver=deqkit.MixedPrecision(deqkit.Anderson(check_every=lazy)), rtol=1e-5)
    torch.testing.assert_close(seldom.value, eager.value, rtol=0, atol=1e-4)
    assert seldom.converged.all() and (seldom.num_steps - eager.num_steps).abs().max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# gradients


def gradients(solver: Any, adjoint: Any = "implicit", rtol: float = 1e-6) -> tuple[Tensor, Tensor, deqkit.Solution]:
    f = Counted()
    f.a.requires_grad_()
    f.b.requires_grad_()
    sol = deqkit.solve(f, f.x0, solver=solver, adjoint=adjoint, rtol=rtol)
    (sol.value**2).sum().backward()
    assert f.a.grad is not None and f.b.grad is not None
    return f.a.grad, f.b.grad, sol


@pytest.mark.parametrize("adjoint", ["implicit", "phantom", "jfb", "neumann"])
def test_gradients_are_those_of_full_precision(adjoint: str) -> None:
    *found, sol = gradients(MIXED, adjoint)
    *expected, _ = gradients("anderson", adjoint)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # At the point found they are the same to the last bit, as no trace of low precision is left.
    f = Counted()
    f.a.requires_grad_()
    at = deqkit.solve(f, sol.value.detach(), adjoint=adjoint, rtol=1e-6)
    assert torch.equal(at.value, sol.value)
    (at.value**2).sum().backward()
    assert torch.equal(found[0], f.a.grad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("adjoint", ["unrolled", deqkit.UnrolledAdjoint(checkpoint=True)])
def test_unrolled_differentiates_both_stages(adjoint: Any) -> None:
    *found, sol = gradients(MIXED, adjoint)
    *expected, _ = gradients("anderson")
    with torch.no_grad():
        f = Counted()
        assert torch.equal(deqkit.solve(f, f.x0, solver=MIXED, rtol=1e-6).value, sol.value)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_unrolled_reaches_the_start_through_low_precision() -> None:
    """x -> x/2 + 1, three steps in low precision and none left: dx3/dx0 = 1/8, for plain steps."""
    x0 = torch.zeros(1, 2, requires_grad=True)
    sol = deqkit.solve(
        lambda x: 0.5 * x + 1, x0, solver=deqkit.MixedPrecision(deqkit.FixedPointIteration()), adjoint="unrolled",
        rtol=1e-6, max_steps=3, on_failure="ignore",
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.value.sum(), x0)
    assert torch.equal(grad, torch.full((1, 2), 0.125))


def test_double_backward() -> None:
    f = Counted(n=5, batch=2)
    f.b.requires_grad_()

    def second(solver: Any) -> Tensor:
        sol = deqkit.solve(f, f.x0, solver=solver, rtol=1e-6)
        (g,) = torch.autograd.grad((sol.value**3).sum(), f.b, create_graph=True)
        return torch.autograd.grad((g**2).sum(), f.b)[0]

    torch.testing.assert_close(second(MIXED), second("anderson"), rtol=1e-3, atol=1e-3)


def test_transforms() -> None:
    f = Counted(n=6, batch=3)
    a = f.a

    def value(b: Tensor, solver: Any) -> Tensor:
        def map(x: Tensor, b: Tensor) -> Tensor:
            f.low.append(is_low())
            return torch.tanh(x @ a.T + b)

        return deqkit.solve(map, torch.zeros_like(b), args=(b,), solver=solver, rtol=1e-6).value

    loss = lambda b, s: (value(b, s) ** 2).sum()  # noqa: E731
    stacked = torch.stack([f.b, 0.5 * f.b])
    for take in (
        lambda s: torch.func.grad(loss)(f.b, s),
        lambda s: torch.vmap(lambda b: value(b, s))(stacked),
        lambda s: torch.vmap(torch.func.grad(lambda b: loss(b, s)))(stacked),
        lambda s: torch.func.jvp(lambda b: value(b, s), (f.b,), (torch.ones_like(f.b),))[1],
        lambda s: torch.func.jacrev(lambda b: value(b, s))(f.b),
    ):
        f.low.clear()
        found = take(MIXED)
        assert any(f.low) and not all(f.low)
        torch.testing.assert_close(found, take("anderson"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"rtol": 1e-5}, {"rtol": 0, "max_steps": 4, "on_failure": "ignore"}])
def test_compiled(settings: dict[str, Any]) -> None:
    f = Counted()
    f.a.requires_grad_()

    def value(x0: Tensor) -> Tensor:
        map = lambda x: torch.tanh(x @ f.a.T + f.b)  # noqa: E731
        return deqkit.solve(map, x0, solver="mixed_precision", adjoint="phantom", **settings).value

    torch.compiler.reset()
    compiled: Any = torch.compile(value, backend="eager", fullgraph=settings["rtol"] == 0)
    torch.testing.assert_close(compiled(f.x0), value(f.x0))


# ---------------------------------------------------------------------------------------------------------------------
# in its surroundings


def test_refusals() -> None:
    with pytest.raises(TypeError, match="MixedPrecision: solver must be a solver object, got 'anderson'"):
        deqkit.MixedPrecision("anderson")  # pyright: ignore[reportArgumentType]
    for several in (deqkit.Auto(), MIXED):
        with pytest.raises(ValueError, match="MixedPrecision: solver must be a single one"):
            deqkit.MixedPrecision(several)
    with pytest.raises(ValueError, match="Auto: each of the solvers must be a single one"):
        deqkit.Auto((MIXED, deqkit.Broyden()))
    for dtype in (torch.float32, torch.float64, "bfloat16"):
        with pytest.raises(ValueError, match="dtype must be torch.bfloat16 or torch.float16"):
            deqkit.MixedPrecision(dtype=dtype)  # pyright: ignore[reportArgumentType]
    for adjoint in (deqkit.ImplicitAdjoint, deqkit.ShineAdjoint):
        for solver in ("mixed_precision", MIXED):
            with pytest.raises(ValueError, match="solver='mixed_precision' is none for a backward pass.*'anderson'"):
                adjoint(solver=solver)
    for adjoint in ("shine", "reversible"):
        with pytest.raises(ValueError, match="solver='mixed_precision' does not record"):
            deqkit.solve(lambda x: x, torch.zeros(1, 1), solver="mixed_precision", adjoint=adjoint)


def test_variational_dropout_keeps_its_scale() -> None:
    """A mask drawn in bfloat16 would leave 1 / 0.9 wrong for all of the solve."""
    drop = deqkit.nn.VariationalDropout(0.1)
    a = 0.5 * torch.eye(8)
    seen: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        seen.append(drop(x @ a))
        return seen[-1] + 1

    with torch.no_grad():
        sol = deqkit.solve(f, torch.zeros(2, 8), solver=MIXED, rtol=1e-6)
    kept = seen[-1] != 0
    assert seen[0].dtype == torch.bfloat16 and seen[-1].dtype == torch.float32 and 0 < kept.sum()
    torch.testing.assert_close(seen[-1][kept], (0.5 * sol.value / 0.9)[kept], rtol=1e-5, atol=0)


def test_layer_and_monitor() -> None:
    torch.manual_seed(0)
    linear = deqkit.nn.spectral_norm(nn.Linear(8, 8), cap=0.8)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor, b: Tensor) -> Tensor:
            return torch.tanh(self.linear(x) + b)

    layer = deqkit.nn.FixedPoint(Cell(), solver="mixed_precision", rtol=1e-5)
    b = torch.randn(4, 8)
    with deqkit.Monitor(layer) as monitor:
        for _ in range(2):
            layer(torch.zeros(4, 8), b).sum().backward()
            monitor.step()
    assert layer.last_solution is not None and layer.last_solution.converged.all()
    assert "all 2 solves converged" in str(monitor)
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    layer.solver = "anderson"
    for _ in range(2):
        layer(torch.zeros(4, 8), b).sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in layer.parameters()], rtol=1e-3, atol=1e-3)


def test_diagnose_tries_it_where_it_is_asked_for() -> None:
    f = Counted()
    f.a.requires_grad_()
    x0, call = f.x0, lambda x, a: torch.tanh(x @ a.T + f.b)
    found = deqkit.diagnose(call, x0, args=(f.a,), solvers=["mixed_precision"], adjoints=["implicit", "shine"])
    assert found.healthy and [t.name for t in found.solvers] == ["mixed_precision"]
    assert found.adjoints[0].relative_error is not None and found.adjoints[1].relative_error is None


@pytest.mark.parametrize("rtol", [None, 1e-3])
def test_neck(rtol: float | None) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"adjoint": "implicit", "rtol": rtol, "max_steps": 30}
    neck = ImplicitFPN([4, 8], 16, solver=MIXED, **settings)
    low: list[bool] = []
    neck.transform.register_forward_pre_hook(lambda *_: low.append(is_low()))
    features = OrderedDict(c3=torch.randn(2, 4, 16, 16), c4=torch.randn(2, 8, 8, 8))
    found = neck(features)
    assert neck.last_solution is not None and neck.last_solution.converged.all() and low[0] and not low[-1]
    assert len(low) == neck.last_solution.num_fn_evals
    if rtol is None:
        assert low.count(False) == 2  # the last evaluation, and the one that carries the gradient
    sum(p.square().mean() for p in found.values()).backward()  # pyright: ignore
    grads = [p.grad.clone() for p in neck.parameters() if p.grad is not None]
    neck.zero_grad()
    neck.solver = "anderson"
    expected = neck(features)
    sum(p.square().mean() for p in expected.values()).backward()  # pyright: ignore
    tolerance = 3 * neck.last_solution.rtol
    for name in expected:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm()
    for g, p in zip(grads, neck.parameters(), strict=True):
        assert p.grad is not None and (g - p.grad).norm() <= 3 * tolerance * p.grad.norm()
