"""deqkit.solve: right answers, true reports, independent samples (promises 1 and 2)."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from equations import EQUATIONS, linear, matrix, tanh, tanh_layer

import deqkit
from deqkit import Status

SOLVERS = {
    "fixed_point": deqkit.FixedPointIteration(),
    "damped": deqkit.FixedPointIteration(damping=0.3),
    "adaptive": deqkit.FixedPointIteration(adaptive=True),
    "anderson": deqkit.Anderson(),
    "anderson_1": deqkit.Anderson(history=1),
    "anderson_mixed": deqkit.Anderson(history=4, mixing=0.7),
    "broyden": deqkit.Broyden(),
    "broyden_short": deqkit.Broyden(history=3),
    "broyden_1": deqkit.Broyden(history=1),
    "broyden_bad": deqkit.Broyden(variant="bad"),
    "broyden_searching": deqkit.Broyden(history=20, line_search=2),
    "anderson_type_1": deqkit.Anderson(history=8, type=1),
    "auto": deqkit.Auto(),
    "auto_short": deqkit.Auto((deqkit.FixedPointIteration(), deqkit.Anderson(history=3))),
    "newton_krylov": deqkit.NewtonKrylov(),
    "newton_krylov_short": deqkit.NewtonKrylov(history=3),
    "reversible": deqkit.ReversibleIteration(),
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_known_answers(solver: str, equation: str) -> None:
    eq = EQUATIONS[equation]()
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver=SOLVERS[solver], rtol=1e-11, max_steps=400)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, eq.solution, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_steps", [0, 1, 2, 5, 50])
def test_reported_residual_is_that_of_the_returned_point(solver: str, max_steps: int) -> None:
    eq = tanh(radius=2.0)
    sol = deqkit.solve(
        eq.f, eq.x0, args=eq.args, solver=SOLVERS[solver], max_steps=max_steps, rtol=1e-6, on_failure="ignore"
    )
    fx = eq.f(sol.value, *eq.args)
    torch.testing.assert_close(sol.residual, (fx - sol.value).norm(dim=1))
    torch.testing.assert_close(sol.relative_residual, (fx - sol.value).norm(dim=1) / fx.norm(dim=1))
    assert torch.equal(sol.converged, sol.residual <= 1e-6 * fx.norm(dim=1))


def test_damped_residual_is_undamped() -> None:
    eq = tanh()
    sol = deqkit.solve(
        eq.f, eq.x0, args=eq.args, solver=deqkit.FixedPointIteration(damping=0.99), max_steps=3, on_failure="ignore"
    )
    true = (eq.f(sol.value, *eq.args) - sol.value).norm(dim=1)
    torch.testing.assert_close(sol.residual, true)
    assert not sol.converged.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_returned_point_is_the_best_visited(solver: str) -> None:
    eq = linear(radius=1.3)
    visited: list[deqkit.StepInfo] = []
    sol = deqkit.solve(
        eq.f, eq.x0, args=eq.args, solver=SOLVERS[solver], max_steps=12, on_failure="ignore", trace=True,
        callback=visited.append,
    )  # fmt: skip
    assert sol.trace is not None
    best = torch.stack([v.relative_residual for v in visited]).argmin(0)
    torch.testing.assert_close(sol.relative_residual, sol.trace.nan_to_num(nan=torch.inf).amin(0))
    for sample, step in enumerate(best.tolist()):
        assert torch.equal(sol.value[sample], visited[step].value[sample])


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [(s, a) for s in ("fixed_point", "anderson", "broyden") for a in ("implicit", "jfb", "neumann", "phantom")]
    + [("anderson", "shine"), ("broyden", "shine"), ("fixed_point", "unrolled"), ("anderson", "unrolled")]
    + [("broyden", "unrolled"), ("reversible", "reversible"), ("reversible", "unrolled")],
)
def test_value_is_the_same_with_and_without_gradients(solver: str, adjoint: str) -> None:
    eq = tanh()
    a, b = (t.clone().requires_grad_() for t in eq.args)
    with_grad = deqkit.solve(eq.f, eq.x0, args=(a, b), solver=solver, adjoint=adjoint)
    with torch.no_grad():
        without = deqkit.solve(eq.f, eq.x0, args=(a, b), solver=solver, adjoint=adjoint)
    with torch.inference_mode():
        inference = deqkit.solve(eq.f, eq.x0, args=(a, b), solver=solver, adjoint=adjoint)
    assert with_grad.value.requires_grad and not without.value.requires_grad
    assert torch.equal(without.value, inference.value)
    if adjoint == "unrolled" and solver in ("anderson", "broyden"):  # solves its small systems in another way
        torch.testing.assert_close(with_grad.value, without.value, rtol=1e-5, atol=1e-6)
        assert torch.equal(with_grad.num_steps, without.num_steps)
        return
    assert torch.equal(with_grad.value, without.value)
    assert torch.equal(with_grad.residual, without.residual)


def test_value_is_the_same_in_train_and_eval() -> None:
    layer = torch.nn.Linear(6, 6)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)
    b = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    values = []
    for mode in (True, False):
        layer.train(mode)
        sol = deqkit.solve(lambda x: torch.tanh(layer(x) + b), torch.zeros(3, 6))
        assert sol.value.requires_grad
        values.append(sol.value.detach())
    assert torch.equal(*values)


@pytest.mark.parametrize("solver", SOLVERS)
def test_alone_and_in_a_batch(solver: str) -> None:
    """Samples of very different difficulty: the easy ones freeze long before the hard ones end."""
    radii = (0.0, 0.3, 0.8, 0.95, 1.6)
    a = torch.stack([matrix(10, r, seed=3) for r in radii])
    b = torch.randn(len(radii), 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def f(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.tanh((a @ x.unsqueeze(2)).squeeze(2)) + b

    def run(index: slice) -> deqkit.Solution:
        args = (a[index], b[index])
        return deqkit.solve(
            f,
            torch.zeros_like(b[index]),
            args=args,
            solver=SOLVERS[solver],
            rtol=1e-8,
            on_failure="ignore",
            max_steps=60,
        )

    batch = run(slice(None))
    assert len(set(batch.num_steps.tolist())) > 2
    for i in range(len(radii)):
        alone = run(slice(i, i + 1))
        assert alone.num_steps.item() == batch.num_steps[i].item()
        assert alone.status.item() == batch.status[i].item()
        torch.testing.assert_close(alone.value[0], batch.value[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_bad_sample_costs_its_neighbours_nothing(solver: str) -> None:
    eq = tanh()
    a, b = eq.args

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        fx = tanh_layer(x, a, b)
        late_nan = torch.where(x[1].abs().sum() > 0, torch.nan, 0.0)  # finite at x0, NaN from the first step on
        spoil = torch.zeros_like(fx)
        spoil[1] = late_nan
        spoil[2] = torch.inf
        return fx + spoil

    settings = {"solver": SOLVERS[solver], "rtol": 1e-8, "max_steps": 100}
    with pytest.warns(deqkit.ConvergenceWarning, match="2 NONFINITE"):
        sol = deqkit.solve(poisoned, eq.x0, **settings)
    clean = deqkit.solve(eq.f, eq.x0, args=eq.args, **settings)
    assert sol.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.NONFINITE, Status.CONVERGED]
    assert torch.isfinite(sol.value).all()
    assert torch.equal(sol.value[[0, 3]], clean.value[[0, 3]])
    assert torch.equal(sol.num_steps[[0, 3]], clean.num_steps[[0, 3]])
    tries = (5, 10, 15) if SOLVERS[solver].may_retreat else (1,)
    assert sol.num_steps[1] in tries and torch.isfinite(sol.residual[1])


def test_converged_samples_are_frozen() -> None:
    rates = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    seen: list[deqkit.StepInfo] = []
    sol = deqkit.solve(
        lambda x: rates * x + 1, torch.zeros_like(rates), solver="fixed_point", max_steps=200, callback=seen.append
    )
    assert sol.converged.all() and len(set(sol.num_steps.tolist())) == 3
    for sample, end in enumerate(sol.num_steps.tolist()):
        frozen = {info.value[sample].item() for info in seen[end:]}
        assert frozen == {sol.value[sample].item()}
        assert [bool(info.active[sample]) for info in seen] == [step <= end for step in range(len(seen))]


@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_start_costs_one_evaluation(solver: str) -> None:
    eq = EQUATIONS["square_root"]()
    sol = deqkit.solve(eq.f, eq.solution, args=eq.args, solver=SOLVERS[solver])
    assert sol.converged.all() and (sol.num_steps == 0).all() and sol.num_fn_evals == 2  # one more carries the gradient
    with torch.no_grad():
        assert deqkit.solve(eq.f, eq.solution, args=eq.args, solver=SOLVERS[solver]).num_fn_evals == 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("check_every", [1, 4])
def test_every_call_of_f_is_counted(solver: str, check_every: int) -> None:
    eq = tanh()
    calls = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return eq.f(x, *eq.args)

    lazy = dataclasses.replace(SOLVERS[solver], check_every=check_every)
    sol = deqkit.solve(f, eq.x0, solver=lazy, max_steps=200)
    assert calls == sol.num_fn_evals
    eager = deqkit.solve(f, eq.x0, solver=SOLVERS[solver], max_steps=200)
    assert torch.equal(sol.num_steps, eager.num_steps) and torch.equal(sol.status, eager.status)
    assert 0 <= sol.num_fn_evals - eager.num_fn_evals < check_every
    torch.testing.assert_close(sol.value, eager.value, rtol=1e-12, atol=0)


def test_statuses() -> None:
    def scaled(rate: float) -> deqkit.Solution:
        return deqkit.solve(
            lambda x: rate * x + 1, torch.ones(1, 1), solver="fixed_point", max_steps=80, on_failure="ignore", rtol=1e-5
        )

    assert scaled(0.5).status.item() == Status.CONVERGED
    assert scaled(0.99).status.item() == Status.MAX_STEPS
    assert scaled(2.0).status.item() == Status.DIVERGED
    assert scaled(-1.0).status.item() == Status.STAGNATED  # jumps between two points for ever
    assert scaled(float("nan")).status.item() == Status.NONFINITE


def test_stagnation_is_judged_over_time_and_not_over_the_batch() -> None:
    """A single sample that converges slowly but surely must be left to it."""
    sol = deqkit.solve(
        lambda x: 0.97 * x + 1, torch.zeros(1, 1, dtype=torch.float64), solver="fixed_point", max_steps=900
    )
    assert sol.converged.all() and sol.num_steps.item() > 100


def test_trace_holds_only_what_was_measured() -> None:
    rates = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    sol = deqkit.solve(
        lambda x: rates * x + 1, torch.ones(2, 1).double(), solver="fixed_point", max_steps=100, trace=True
    )
    assert sol.trace is not None and sol.trace.shape == (int(sol.num_steps.max()) + 1, 2)
    for sample, steps in enumerate(sol.num_steps.tolist()):
        assert torch.isfinite(sol.trace[: steps + 1, sample]).all()
        assert torch.isnan(sol.trace[steps + 1 :, sample]).all()
        assert sol.trace[steps, sample] == sol.relative_residual[sample]
    expected = (0.9 * 1 + 1 - 1) / (0.9 * 1 + 1)
    assert sol.trace[0, 1].item() == pytest.approx(expected)


@pytest.mark.parametrize("policy", ["warn", "raise", "ignore"])
def test_failure_policies(policy: str) -> None:
    def run() -> deqkit.Solution:
        return deqkit.solve(
            lambda x: 0.999 * x + 1, torch.zeros(3, 1), solver="fixed_point", max_steps=7, on_failure=policy  # pyright: ignore
        )  # fmt: skip

    words = r"3 of 3 samples did not converge \(3 MAX_STEPS\).*after 7 steps.*raise max_steps"
    if policy == "warn":
        with pytest.warns(deqkit.ConvergenceWarning, match=words) as record:
            run()
        assert record[0].filename == __file__
    elif policy == "raise":
        with pytest.raises(deqkit.ConvergenceError, match=words) as error:
            run()
        assert error.value.solution.num_steps.tolist() == [7, 7, 7]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run()


def test_fixed_steps_run_to_the_end_without_complaint() -> None:
    eq = tanh()
    for steps in (0, 1, 6):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.no_grad():
                sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver="fixed_point", rtol=0, atol=0, max_steps=steps)
        x = eq.x0
        for _ in range(steps):
            x = eq.f(x, *eq.args)
        assert torch.equal(sol.value, x) and (sol.num_steps == steps).all() and sol.num_fn_evals == steps + 1
        assert (sol.status == Status.MAX_STEPS).all()


def test_absolute_tolerance() -> None:
    sol = deqkit.solve(lambda x: 0.5 * x, torch.ones(2, 1), solver="fixed_point", rtol=0.0, atol=1e-3)
    assert sol.converged.all() and (sol.residual <= 1e-3).all() and (sol.residual > 1e-4).all()


def test_leaf_max_sees_what_a_flat_norm_hides() -> None:
    def f(x: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.1 * x[0] + 1e4, 0.9 * x[1] + 1e-3

    x0 = (torch.zeros(1, 50), torch.zeros(1, 2))
    flat = deqkit.solve(f, x0, solver="fixed_point", rtol=1e-3, max_steps=200)
    strict = deqkit.solve(f, x0, solver="fixed_point", rtol=1e-3, max_steps=200, norm="leaf_max")
    small = [(f(s.value)[1] - s.value[1]).norm() / f(s.value)[1].norm() for s in (flat, strict)]
    assert flat.converged.all() and small[0] > 0.1
    assert strict.converged.all() and small[1] <= 1e-3
    torch.testing.assert_close(strict.relative_residual[0], small[1])


@pytest.mark.parametrize("solver", ["fixed_point", "broyden", "auto_short"])
@pytest.mark.parametrize("max_steps", [4, 200])
def test_leaf_residuals_are_those_of_the_value(solver: str, max_steps: int) -> None:
    rates = torch.tensor([0.2, 0.9, -1.1])  # under plain steps the last sample runs away

    def f(x: list[torch.Tensor]) -> list[torch.Tensor]:
        return [rates.view(-1, 1) * x[0] + 1, (rates * x[1].sum(1)).unsqueeze(1).tanh() + x[0][:, :1]]

    x0 = [torch.randn(3, 5, generator=torch.manual_seed(0)), torch.zeros(3, 1)]
    settings = {"rtol": 1e-4, "max_steps": max_steps, "on_failure": "ignore"}
    sol = deqkit.solve(f, x0, solver=SOLVERS[solver], norm="leaf_max", **settings)
    pairs = zip(f(sol.value), sol.value, strict=True)
    expected = torch.stack([(fx - x).norm(dim=1) / fx.norm(dim=1) for fx, x in pairs])
    torch.testing.assert_close(sol.leaf_residuals, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(sol.leaf_residuals.amax(0), sol.relative_residual)
    assert deqkit.solve(f, x0, solver=SOLVERS[solver], **settings).leaf_residuals is None


@pytest.mark.parametrize(("leaves", "batch_dims"), [(1, 1), (1, 0), (2, 2), (3, 1)])
def test_shape_of_leaf_residuals(leaves: int, batch_dims: int) -> None:
    for batch in (4, 0) if batch_dims else (4,):
        x0 = {str(j): torch.ones(batch, 2, 3 + j) for j in range(leaves)}
        sol = deqkit.solve(
            lambda x: {k: v / 2 for k, v in x.items()}, x0, batch_dims=batch_dims, norm="leaf_max", atol=1.0
        )
        assert sol.leaf_residuals.shape == (leaves, *x0["0"].shape[:batch_dims])


def test_norm_function() -> None:
    sol = deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(2, 3), norm=lambda x: x.abs().amax(dim=1))
    fx = 0.5 * sol.value + 1
    torch.testing.assert_close(sol.residual, (fx - sol.value).abs().amax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_norm_function_of_any_dtype(dtype: torch.dtype) -> None:
    largest = lambda x: x.abs().amax(dim=1)  # noqa: E731
    sol = deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(2, 3, dtype=dtype), norm=largest, rtol=1e-2)
    assert sol.converged.all()
    torch.testing.assert_close(sol.residual, largest(0.5 * sol.value + 1 - sol.value).float())


@pytest.mark.parametrize("norm", [lambda x: x.sum(dim=1), lambda x: (1000 * x.abs().amax(dim=1)).long()])
def test_norm_function_must_return_real_numbers(norm: Any) -> None:
    with pytest.raises(TypeError, match="norm must return real floating numbers"):
        deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(2, 3, dtype=torch.complex64), norm=norm)


def test_printing() -> None:
    sol = deqkit.solve(
        lambda x: torch.tensor([[0.5], [0.999]]) * x + 1, torch.zeros(2, 1), solver="fixed_point", on_failure="ignore"
    )
    text = str(sol)
    assert "1 of 2 samples converged" in text and "1 MAX_STEPS" in text and 2 <= len(text.splitlines()) <= 3
    assert "no adjoint solve yet" in str(sol.adjoint_stats)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_fixed_steps_compile_as_one_graph(solver: str) -> None:
    """No look at the data, so nothing breaks the graph. (The "eager" backend traces without generating code.)"""
    a, b = tanh().args

    def layer(b: torch.Tensor) -> torch.Tensor:
        f = lambda x: tanh_layer(x, a, b)  # noqa: E731
        return deqkit.solve(f, torch.zeros_like(b), solver=solver, rtol=0, atol=0, max_steps=4).value

    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(b), layer(b))


def test_patience_grows_with_the_step_limit() -> None:
    """Nothing gained in the first 40 steps, all of it in the 41st."""
    steps = iter(range(10**6))
    f = lambda x: x + 1 if next(steps) < 40 else 0 * x + 50.0  # noqa: E731
    sol = deqkit.solve(
        f, torch.zeros(1, 1), solver="fixed_point", norm=lambda x: x.abs().clamp(max=1)[:, 0], max_steps=400
    )
    assert sol.converged.all()


def test_a_callback_must_leave_the_point_alone() -> None:
    with pytest.raises(RuntimeError, match="callback changed info.value in place"):
        deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(2, 3), callback=lambda info: info.value.zero_())


def test_what_a_callback_does_to_the_numbers_it_is_told_stays_with_it() -> None:
    told = lambda info: [t.zero_() for t in (info.residual, info.relative_residual, info.active)]  # noqa: E731
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    sol = deqkit.solve(lambda x: 0.5 * torch.cos(x) + 1, x0, callback=told)
    torch.testing.assert_close(sol.residual, (0.5 * torch.cos(sol.value) + 1 - sol.value).norm(dim=1))


def test_the_states_kept_share_no_memory_with_the_value() -> None:
    x0 = torch.zeros(2, 3)
    sol = deqkit.solve(
        lambda x: 0.5 * x + 1, x0, solver="fixed_point", max_steps=3, keep=(0, 3, 9), on_failure="ignore"
    )
    sol.value.zero_()
    assert (sol.states[3] > 1).all() and (sol.states[9] > 1).all()


def test_messages_name_what_was_measured() -> None:
    words = r"worst residual 1\.00e\+00, asked for atol=1\.00e-03"
    with pytest.warns(deqkit.ConvergenceWarning, match=words):
        deqkit.solve(lambda x: x + 1, torch.zeros(1, 1), solver="fixed_point", rtol=0, atol=1e-3, max_steps=3)
    with pytest.warns(deqkit.ConvergenceWarning, match="worst relative residual inf"):
        deqkit.solve(lambda x: 0 * x, torch.ones(1, 1), solver="fixed_point", max_steps=0)


def test_trace_ends_where_the_last_sample_did() -> None:
    solver = deqkit.FixedPointIteration(check_every=7)
    sol = deqkit.solve(lambda x: 0.5 * x + 1, torch.zeros(2, 1), solver=solver, trace=True)
    assert sol.trace is not None and len(sol.trace) == int(sol.num_steps.max()) + 1
    assert sol.trace.isfinite().all()


def test_solutions_compare_by_identity_and_can_be_copied() -> None:
    b = torch.ones(2, 3, requires_grad=True)
    sol = deqkit.solve(lambda x, b: 0.5 * x + b, torch.zeros(2, 3), args=(b,), trace=True)
    copied = copy.deepcopy([sol, sol])
    assert copied[0] is copied[1] and copied[0] != sol and len({sol, copied[0]}) == 2
    assert not copied[0].value.requires_grad and torch.equal(copied[0].value, sol.value)
    assert copied[0].adjoint_stats is not sol.adjoint_stats and copied[0].adjoint_stats != sol.adjoint_stats
    sol.value.sum().backward()
    assert copied[0].adjoint_stats.status is None and sol.adjoint_stats.status is not None
    assert str(copied[0]) == str(sol)
