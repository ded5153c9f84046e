"""deqkit.solve where numbers are tiny, huge, coarse or infinite: the report stays true."""

from __future__ import annotations

import warnings

import pytest
import torch
from equations import tanh, tanh_layer

import deqkit
from deqkit import Status, linalg


@pytest.mark.parametrize("size", [1e-38, 1e-25, 5e18, 1e37])
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_tiny_and_huge_states_are_not_taken_for_converged(solver: str, size: float) -> None:
    """In float32 the squares of such numbers under- or overflow."""
    b = torch.full((2, 4), size)
    sol = deqkit.solve(lambda x: 0.9 * x + b, 3 * b, solver=solver, max_steps=100)
    true = ((0.9 * sol.value + b).double() - sol.value.double()).norm(dim=1)
    assert sol.converged.all() and (sol.num_steps > 0).all() and sol.residual.dtype == torch.float32
    torch.testing.assert_close(sol.residual, true.float(), rtol=1e-5, atol=1e-44)
    torch.testing.assert_close(sol.value, 10 * b, rtol=2e-3, atol=0)


def test_a_tiny_neighbour_leaves_the_norm_of_a_sample_as_it_is() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    alone = linalg.row_norm(x[:1])
    for factor in (1e-30, 1e25, 0.0):
        both = linalg.row_norm(torch.cat([x[:1], factor * x[1:]]))
        assert torch.equal(both[:1], alone)
        torch.testing.assert_close(both[1:], factor * x[1:].double().norm(dim=1), rtol=1e-6, atol=0)
    wide = 1e-200 * x.double()
    torch.testing.assert_close(linalg.row_norm(wide), 1e-200 * x.double().norm(dim=1), rtol=1e-12, atol=0)
    assert linalg.row_norm(torch.tensor([[torch.inf, 1.0]], dtype=torch.float64)).isinf().all()


def test_an_infinite_scale_is_no_convergence() -> None:
    """f(1) = 3.5 is said to be infinitely large, while the residual there is an ordinary number."""
    norm = lambda x: torch.where(x[:, 0] == 3.5, torch.inf, 1.0)  # noqa: E731
    sol = deqkit.solve(lambda x: 0.5 * x + 3, torch.ones(1, 2), norm=norm, on_failure="ignore")
    assert sol.status.item() == Status.NONFINITE


def test_leaf_max_picks_the_leaf_by_the_test_that_it_must_pass() -> None:
    """The leaf with the worse relative residual meets its absolute tolerance; the other one doesn't."""

    def f(x: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.0 * x[0] + 1e-6, 0.9 * x[1] + 1.0

    x0 = (torch.full((1, 1), 3e-6), torch.zeros(1, 1))
    sol = deqkit.solve(f, x0, solver="fixed_point", rtol=1e-3, atol=1e-4, norm="leaf_max", max_steps=200)
    assert sol.converged.all() and sol.num_steps.item() > 20
    residual = (f(sol.value)[1] - sol.value[1]).abs()
    assert residual.item() <= 1e-4 + 1e-3 * 10
    torch.testing.assert_close(sol.residual, residual[0])


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_autocast_is_for_f_alone(solver: str) -> None:
    """The solver's own arithmetic in bfloat16 would stagnate far above this tolerance."""
    eq = tanh(n=20, batch=4, radius=0.9)
    a, b = (t.float() for t in eq.args)
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", enabled=False):
            return tanh_layer(x, a, b)

    settings = {"solver": solver, "rtol": 1e-5, "max_steps": 200}
    expected = deqkit.solve(f, torch.zeros_like(b), **settings)
    assert not any(seen)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = deqkit.solve(f, torch.zeros_like(b), **settings)
        assert torch.is_autocast_enabled("cpu")
    assert all(seen) and torch.equal(sol.value, expected.value) and torch.equal(sol.num_steps, expected.num_steps)


def test_fixed_steps_report_what_is_no_longer_finite() -> None:
    def run(policy: str) -> deqkit.Solution:
        f = lambda x: torch.tensor([[0.5], [torch.nan]]) * x + 1  # noqa: E731
        return deqkit.solve(f, torch.zeros(2, 1), solver="fixed_point", rtol=0, atol=0, max_steps=5, on_failure=policy)  # pyright: ignore

    with pytest.warns(deqkit.ConvergenceWarning, match=r"1 of 2 samples.*1 NONFINITE.*damping or solver='fixed_point'"):
        run("warn")
    with pytest.raises(deqkit.ConvergenceError, match="1 NONFINITE"):
        run("raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("ignore").status.tolist() == [Status.MAX_STEPS, Status.NONFINITE]


def test_a_tiny_start_of_an_expanding_map_is_no_divergence() -> None:
    sol = deqkit.solve(lambda x: torch.tanh(2 * x + 1e-6), torch.zeros(1, 1), solver="fixed_point", max_steps=100)
    assert sol.converged.all() and sol.value.item() > 0.9
