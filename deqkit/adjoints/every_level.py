"""L4. One fixed-point problem, solved once and differentiable wherever it is differentiated.

Under the transforms of `torch.func` the problem is handed down, level by level, to the ground, where it is solved. On
the way back up every level that differentiates attaches its own gradient or tangent to the answer, as the adjoint does
for an ordinary backward pass: by an evaluation of f at that level, at a point that carries the derivatives of all
levels below. Derivatives of derivatives follow from there, as the adjoint's own linear equation takes the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from deqkit import levels
from deqkit.adjoints.base import Adjoint, Problem
from deqkit.ledger import LoopResult
from deqkit.levels import Level
from deqkit.lowered import LoweredEvaluator, lowered_norm
from deqkit.solution import AdjointStats
from deqkit.state import Blocks, primal

Run = Callable[[Problem, Blocks], LoopResult]


def solve_at_every_level(
    adjoint: Adjoint, problem: Problem, x0: Blocks, run: Run, *, own: tuple[int | None, str] | None = None
) -> LoopResult:
    """Run a solve on the ground, and give its points their derivatives at this level and all below.

    Args:
        adjoint: how the points are differentiated.
        problem: what is solved, at this level.
        x0: the starting point.
        run: solves a problem at the ground, without regard to derivatives.
        own: a level, and "reverse" or "forward", of which the problem is a part itself: it gets no derivative there.

    Raises:
        NotImplementedError: the adjoint does not go through the transforms that run.
    """
    solve = _uncompiled if levels.active() else _solve
    return solve(adjoint, problem, x0, run, own)


def _solve(adjoint: Adjoint, problem: Problem, x0: Blocks, run: Run, own: tuple[int | None, str] | None) -> LoopResult:
    level = levels.innermost(x0)
    if level is None or (adjoint.unrolls and not level.maps):
        if levels.any_maps():
            _check_unrolled(problem, x0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and adjoint.unrolls):
            result = run(problem, primal(x0) if problem.f.drops_tangents else x0)
        problem = replace(problem, record=result.record)
        here, reverse, forward = 0, True, True
    else:
        result = _from_below(adjoint, problem, x0, run, level, own)
        here, reverse, forward = level.number, level.reverse, level.forward
    # An exported graph holds no backward pass.
    if reverse and torch.is_grad_enabled() and not torch.compiler.is_exporting() and own != (here, "reverse"):
        if level is not None and not adjoint.has_levels:
            raise NotImplementedError(
                f"torch.func does not go through adjoint={adjoint.name!r}: use adjoint='implicit' or 'unrolled' inside "
                f"torch.func.grad, vjp and jacrev, or torch.autograd in place of torch.func"
            )
        result = _map_points(adjoint.attach, problem, result)
    if forward and problem.f.drops_tangents and own != (here, "forward"):
        result = _map_points(adjoint.with_tangent, problem, result)
    return result


# A compiler that has given up the transform still tries its hand at every function called inside.
_uncompiled: Any = torch.compiler.disable(_solve, reason="a compiler knows of no level but the innermost")


def _check_unrolled(problem: Problem, x0: Blocks) -> None:
    """Steps that are recorded at their own level cannot leave it, and a solve has to look at values.

    Raises:
        NotImplementedError: the values are mapped.
    """
    with torch.no_grad():
        if any(levels.holds_mapped(b) for b in (*x0, *problem.f(x0))):
            raise NotImplementedError(
                "torch.func.grad, vjp, jacrev and jvp under torch.vmap do not go through adjoint='unrolled': use "
                "adjoint='implicit', or torch.vmap inside of the other transform"
            )


def _from_below(
    adjoint: Adjoint, problem: Problem, x0: Blocks, run: Run, level: Level, own: tuple[int | None, str] | None
) -> LoopResult:
    if level.maps and not level.notice(x0):
        with torch.no_grad():
            level.notice(problem.f(x0))
    start = tuple(level.down_rows(b) for b in x0)
    with level.below():
        lowered = replace(
            problem,
            f=LoweredEvaluator(problem.f, level, keeps_tangents=adjoint.unrolls),
            norm=lowered_norm(problem.norm, level),
        )
        result = solve_at_every_level(adjoint, lowered, start, run, own=own)
    return LoopResult(
        x=tuple(level.up_rows(b) for b in result.x),
        status=level.up_rows(result.status),
        residual=level.up_rows(result.residual),
        relative_residual=level.up_rows(result.relative_residual),
        num_steps=level.up_rows(result.num_steps),
        trace=None if result.trace is None else level.up_rows(result.trace, dim=1),
        kept={step: tuple(level.up_rows(b) for b in x) for step, x in result.kept.items()},
        parts=None if result.parts is None else level.up_rows(result.parts, dim=1),
    )


def _map_points(differentiate: Callable[[Problem, Blocks], Blocks], problem: Problem, result: LoopResult) -> LoopResult:
    """The result with a derivative for its answer, and one for every point kept."""
    x = differentiate(problem, result.x)
    kept = {k: differentiate(replace(problem, stats=AdjointStats()), at) for k, at in result.kept.items()}
    return replace(result, x=x, kept=kept)
