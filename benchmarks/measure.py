"""Accuracy and cost of `deqkit.solve` after a given number of steps, on problems whose solution is known."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from options import NamedSolver
from problems import Problem
from reporting import timed
from torch.utils._pytree import tree_leaves

import deqkit


@dataclass(frozen=True)
class Row:
    """One solve of one problem: one solver, one number of steps.

    Attributes:
        problem: name of the problem.
        solver: label of the solver.
        steps: solver steps asked for, all of them taken.
        calls: evaluations of f, as reported.
        residual_median: |f(x)-x| / |f(x)| of the value returned, as reported: median over samples.
        residual_worst: the same of the worst sample.
        error_median: |x-x*| / |x*| of the value returned, in float64: median over samples.
        error_worst: the same of the worst sample.
        seconds: wall time of the solve, median of the repeats.
        overhead: wall time of the solve / time of as many bare calls of f, median of the repeats.
        residual_confirmed: whether the reported residuals agree with those recomputed in float64, up to rounding.
    """

    problem: str
    solver: str
    steps: int
    calls: int
    residual_median: float
    residual_worst: float
    error_median: float
    error_worst: float
    seconds: float
    overhead: float
    residual_confirmed: bool


def measure(
    problem: Problem, solvers: Sequence[NamedSolver], steps: Sequence[int], repeats: int, tick: Callable[[], Any]
) -> list[Row]:
    """Solve with every solver and every number of steps.

    A solve runs in fixed-step mode and returns the best point it has visited, by the residual. Each combination is
    solved once for its accuracy and then ``repeats`` times against the clock, in rounds that go through all solvers
    and step counts, so that a disturbance of the machine does not fall on one of them alone.

    Args:
        problem: what to solve.
        solvers: the solvers.
        steps: the step counts.
        repeats: rounds of timing.
        tick: called after every solve.
    """
    cases = [(k, named) for k in steps for named in solvers]
    solutions = {}
    for case in cases:
        solutions[case] = _solve(problem, *case)
        tick()
    seconds: dict[Any, list[float]] = {case: [] for case in cases}
    overhead: dict[Any, list[float]] = {case: [] for case in cases}
    for round_ in range(repeats):
        bare = bare_call_seconds(problem)
        # The other way round every other time: what runs first after the bare calls should not always be the same.
        for case in cases if round_ % 2 == 0 else reversed(cases):
            duration = timed(lambda case=case: _solve(problem, *case), _device(problem))
            seconds[case].append(duration)
            overhead[case].append(duration / (solutions[case].num_fn_evals * bare))
            tick()
    return [
        _row(
            problem,
            named,
            k,
            solutions[k, named],
            statistics.median(seconds[k, named]),
            statistics.median(overhead[k, named]),
        )
        for named in solvers
        for k in steps
    ]


def num_solves(solvers: Sequence[NamedSolver], steps: Sequence[int], repeats: int) -> int:
    """How often `measure` will tick."""
    return len(solvers) * len(steps) * (1 + repeats)


def bare_call_seconds(problem: Problem, calls: int = 20) -> float:
    """Time of one bare call of f: the mean of several, one after the other, as a solver makes them."""

    def repeat() -> None:
        x = problem.x0
        for _ in range(calls):
            x = problem.f(x)

    with torch.no_grad():
        return timed(repeat, _device(problem)) / calls


def _solve(problem: Problem, steps: int, named: NamedSolver) -> deqkit.Solution:
    with torch.no_grad():
        return deqkit.solve(problem.f, problem.x0, solver=named.solver, rtol=0, atol=0, max_steps=steps)


def _device(problem: Problem) -> torch.device:
    return tree_leaves(problem.x0)[0].device


def _row(
    problem: Problem, named: NamedSolver, steps: int, solution: deqkit.Solution, seconds: float, overhead: float
) -> Row:
    reported = solution.relative_residual.double()
    true = problem.relative_residual(solution.value)
    error = problem.relative_error(solution.value)
    # f in the working dtype and f in float64 differ by its rounding.
    rounding = 10 * max(torch.finfo(leaf.dtype).eps for leaf in tree_leaves(problem.x0))
    confirmed = ((reported - true).abs() <= 1e-3 * true + rounding).all().item()
    return Row(
        problem=problem.name,
        solver=named.label,
        steps=steps,
        calls=solution.num_fn_evals,
        residual_median=reported.median().item(),
        residual_worst=reported.max().item(),
        error_median=error.median().item(),
        error_worst=error.max().item(),
        seconds=seconds,
        overhead=overhead,
        residual_confirmed=bool(confirmed),
    )
