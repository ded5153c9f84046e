"""L3. The one loop: limits, counting, freezing, best point, status. It knows nothing of any particular solver.

Every sample runs its own race. After each evaluation a sample that has converged, diverged, stagnated or left the
finite numbers is frozen at its best point; `torch.where` keeps what is frozen apart from what goes on, so that a NaN in
one sample cannot reach another. The points are never written in place, so the best one is kept by reference as long as
the whole batch improves.

A step that leaves the domain of f, where f is not finite, is taken back: the sample goes on from its best point with a
damped plain step, shorter each time, and is given up as not finite when four in a row were in vain. The
solver is shown the best point again instead of the one outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqkit import arrays
from deqkit.ledger import Ledger, LoopResult, relative
from deqkit.norms import StateNorm
from deqkit.shrinking import ShrinkingSolve
from deqkit.solvers.base import Point, Solver
from deqkit.state import Blocks, Evaluator, is_changed, versions_of
from deqkit.termination import Termination


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each evaluation of f.

    Attributes:
        step: solver steps taken so far; 0 at x0.
        value: the point evaluated, of x0's structure. Frozen samples show their best point.
        residual: |f(x) - x|, batch. Frozen samples show that of their best point, as it was when they ended.
        relative_residual: residual / |f(x)|, batch.
        active: which samples were still being solved, bool, batch.
    """

    step: int
    value: Any
    residual: Tensor
    relative_residual: Tensor
    active: Tensor


def run(
    f: Evaluator,
    x0: Blocks,
    solver: Solver,
    termination: Termination,
    *,
    max_steps: int,
    norm: StateNorm,
    active: Tensor | None = None,
    limits: Tensor | None = None,
    trace: bool = False,
    keep: Collection[int] = (),
    callback: Callable[[StepInfo], None] | None = None,
    record: bool = False,
) -> LoopResult:
    """Iterate ``solver`` on ``f`` from ``x0`` until every sample has ended.

    Args:
        f: the map, which counts its own calls.
        x0: the starting point, (B, d) per leaf; left as it is.
        solver: settings of the solver.
        termination: when a sample has ended.
        max_steps: limit of solver steps; f is evaluated at most max_steps + 1 times.
        norm: residual and scale per sample.
        active: which samples to solve, bool (B,); None for all. The others stay where they are, with a status that
            means nothing.
        limits: limit of solver steps per sample, int (B,), none above ``max_steps``; None: ``max_steps`` for all.
        trace: whether to keep the relative residual of every evaluation.
        keep: steps whose points are wanted.
        callback: called after every evaluation.
        record: whether the solver is to hand over its record, see `Solver.start_recording`.

    Returns:
        The best visited point per sample. Its residual is the true one: f was evaluated at exactly this point.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the solve would have to look at its residuals.
    """
    recorder = solver.start_recording() if record else None
    state = solver.start() if recorder is None else recorder
    x = tuple(b.clone() for b in x0)
    ledger: Ledger | None = None
    point: Point | None = None
    kept: dict[int, Blocks] = {}
    on_host = _keeps_books_on_host(f, solver, termination)
    with_grad = torch.is_grad_enabled()
    shrinks = on_host and not (with_grad or record or termination.fixed_steps)
    solve = ShrinkingSolve(f, state)
    if shrinks and active is not None:
        solve.let_go(arrays.to_host(active))
    for step in range(max_steps + 1):
        if step in keep:
            kept[step] = x
        # The last point of an unrolled solve is evaluated only to be measured: nothing is differentiated through it.
        with torch.no_grad() if with_grad and step == max_steps else contextlib.nullcontext():
            fx = solve.evaluate(x)
            r = tuple(torch.sub(a, b) for a, b in zip(fx, x, strict=True))
        with torch.no_grad() if with_grad else contextlib.nullcontext():
            if ledger is None:
                ledger = Ledger(x, r, on_host, termination, trace, active, solver.may_retreat, limits)
            ledger.record(step, *norm(r, fx))
            if callback is not None:
                _tell(callback, f, step, x, ledger)
        look = ledger.look(step, x, r, solver.check_every)
        point = ledger.point(x, fx, r, max_steps - step, f.resolution)
        if look.none_active or step == max_steps:
            break
        if shrinks and not look.all_active:
            solve.let_go(ledger.active)
        with arrays.quiet():
            new = solve.step(ledger.inside(point) if look.any_outside else point)
        if look.any_outside:
            new = ledger.retreat(new)
        new = f.layout.round(new)
        x = new if look.all_active else ledger.freeze(new)
    assert ledger is not None and point is not None
    result = ledger.result(kept)
    if recorder is None:
        return result
    with arrays.quiet():
        return replace(result, record=recorder.conclude(point))


def _keeps_books_on_host(f: Evaluator, solver: Solver, termination: Termination) -> bool:
    """Whether the host looks at every step anyway, or at no cost."""
    device = f.layout.device
    if termination.fixed_steps:
        return arrays.free_to_look(device)
    if arrays.is_capturing(device):
        raise RuntimeError(
            "a solve to a tolerance looks at its residuals, which is not allowed while a CUDA graph is captured: fix "
            "the number of steps with rtol=0 and atol=0, in the adjoint, too, as in ImplicitAdjoint(rtol=0.0)"
        )
    return solver.check_every == 1 and arrays.may_look(device)


def _tell(callback: Callable[[StepInfo], None], f: Evaluator, step: int, x: Blocks, ledger: Ledger) -> None:
    per_sample, dtype = f.layout.per_sample, f.layout.dtype
    residual, scale = ledger.shown()
    sizes = residual, relative(residual, scale), ledger.was_active
    residual, relative_residual, active = (per_sample(arrays.as_tensor(a, x[0])) for a in sizes)
    versions = versions_of(x)
    own = residual.to(dtype, copy=True), relative_residual.to(dtype), active.clone()
    callback(StepInfo(step, f.layout.unpack(x), *own))
    if is_changed(x, versions):
        raise RuntimeError(
            "callback changed info.value in place; it must leave it as it is, and change a clone instead"
        )
