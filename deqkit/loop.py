"""L3. The one loop: limits, counting, freezing, best point, status. It knows nothing of any particular solver.

Every sample runs its own race. After each evaluation a sample that has converged, diverged, stagnated or left the
finite numbers is frozen at its best point; `torch.where` keeps what is frozen apart from what goes on, so that a NaN in
one sample cannot reach another. The points are never written in place, so the best one is kept by reference as long as
the whole batch improves.

A step that leaves the domain of f, where f is not finite, is taken back: the sample goes on from its best point with a
damped plain step, shorter each time, and is given up as not finite when `_MAX_RETREATS` in a row were in vain. The
solver is shown the best point again instead of the one outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.norms import StateNorm
from deqkit.solution import Status
from deqkit.solvers.base import Point, Solver
from deqkit.state import Blocks, Evaluator, versions_of
from deqkit.termination import Patience, Termination

_MAX_RETREATS = 4


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each evaluation of f.

    Attributes:
        step: solver steps taken so far; 0 at x0.
        value: the point evaluated, of x0's structure. Frozen samples show their best point.
        residual: |f(x) - x|, batch.
        relative_residual: residual / |f(x)|, batch.
        active: which samples were still being solved, bool, batch.
    """

    step: int
    value: Any
    residual: Tensor
    relative_residual: Tensor
    active: Tensor


@dataclass
class LoopResult:
    """The best point per sample and how it was reached; tensors of shape (B,) unless said otherwise."""

    x: Blocks
    status: Tensor
    residual: Tensor
    relative_residual: Tensor
    num_steps: Tensor
    trace: Tensor | None  # (evaluations, B)
    kept: dict[int, Blocks]  # points by step, of those asked for that were reached


def run(
    f: Evaluator,
    x0: Blocks,
    solver: Solver,
    termination: Termination,
    *,
    max_steps: int,
    norm: StateNorm,
    active: Tensor | None = None,
    trace: bool = False,
    keep: Collection[int] = (),
    callback: Callable[[StepInfo], None] | None = None,
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
        trace: whether to keep the relative residual of every evaluation.
        keep: steps whose points are wanted.
        callback: called after every evaluation.

    Returns:
        The best visited point per sample. Its residual is the true one: f was evaluated at exactly this point.
    """
    state = solver.start()
    x = tuple(b.clone() for b in x0)
    book: _Book | None = None
    kept: dict[int, Blocks] = {}
    for step in range(max_steps + 1):
        if step in keep:
            kept[step] = x
        # The last point of an unrolled solve is evaluated only to be measured: nothing is differentiated through it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and step < max_steps):
            fx = f(x)
            r = tuple(torch.sub(a, b) for a, b in zip(fx, x, strict=True))
        with torch.no_grad():
            residual, scale, distance = termination.measure(*norm(r, fx))
            if book is None:
                book = _Book(x, r, residual, scale, termination, trace, active)
            book.record(step, residual, scale, distance)
            if callback is not None:
                _tell(callback, f, step, x, book)
        look = book.look(step, x, r, solver.check_every)
        if look.none_active or step == max_steps:
            break
        point = Point(x, fx, r, residual, distance, max_steps - step, f.resolution)
        new = state.step(book.inside(point) if look.any_outside else point)
        if look.any_outside:
            new = linalg.where(book.outside, book.retreat(), new)
        new = f.layout.round(new)
        x = new if look.all_active else linalg.where(book.active, new, book.best_x)
    assert book is not None
    return book.result(kept)


@dataclass(frozen=True)
class _Look:
    """What the host knows of the batch; nothing is ruled out where it did not look."""

    all_active: bool = False
    none_active: bool = False
    any_outside: bool = True


class _Book:
    """The records of a solve, one entry per sample."""

    def __init__(
        self,
        x: Blocks,
        r: Blocks,
        residual: Tensor,
        scale: Tensor,
        termination: Termination,
        trace: bool,
        active: Tensor | None,
    ) -> None:
        self.termination = termination
        self.patience = Patience(termination, residual, scale)
        self.active = torch.ones_like(residual, dtype=torch.bool) if active is None else active
        self.was_active = self.active
        self.better = self.active
        self.status = torch.full_like(residual, Status.MAX_STEPS, dtype=torch.int64)
        self.num_steps = torch.zeros_like(self.status)
        self.outside = torch.zeros_like(self.active)  # where f was not finite just now, and another try is granted
        self.retreats = torch.zeros_like(self.status)  # tries in a row
        self.best_x, self.best_r = x, r
        self.best_distance = torch.full_like(residual, torch.inf)
        self.best_residual, self.best_scale = residual, scale
        self.trace: list[Tensor] | None = [] if trace else None
        self.residual, self.scale = residual, scale

    def record(self, step: int, residual: Tensor, scale: Tensor, distance: Tensor) -> None:
        """Enter one evaluation; ``distance`` is that of `Termination.measure`."""
        self.was_active, self.residual, self.scale = self.active, residual, scale
        self.better = self.active & (distance < self.best_distance)
        self.best_distance = torch.where(self.better, distance, self.best_distance)
        self.best_residual = torch.where(self.better, residual, self.best_residual)
        self.best_scale = torch.where(self.better, scale, self.best_scale)
        self.num_steps = torch.where(self.active, step, self.num_steps)
        if self.trace is not None:
            self.trace.append(torch.where(self.active, _relative(residual, scale), torch.nan))
        self._end(distance)

    def _end(self, distance: Tensor) -> None:
        """Take the samples that have ended out of the race, with the reason; a later reason in this list wins."""
        not_finite, done = torch.isnan(distance), distance <= self.termination.target
        reasons, ended = [(Status.CONVERGED, done), (Status.NONFINITE, not_finite)], done | not_finite
        if not self.termination.fixed_steps:
            # The best distance is never NaN: infinite only where no point has been finite yet.
            self.outside = self.active & not_finite & (self.best_distance < torch.inf) & (self.retreats < _MAX_RETREATS)
            self.retreats = (self.retreats + 1) * self.outside
            stagnated = self.patience.stagnated(distance)
            diverged = self.patience.diverged(self.residual, stagnated)
            reasons = [(Status.STAGNATED, stagnated), (Status.DIVERGED, diverged), *reasons]
            ended = (ended | stagnated | diverged) > self.outside
        ended = ended & self.was_active
        for status, met in reasons:
            self.status = self.status.masked_fill(met & ended, int(status))
        self.active = self.active ^ ended

    def look(self, step: int, x: Blocks, r: Blocks, check_every: int) -> _Look:
        """Settle the best point now that ``x`` is recorded, and ask the device how it stands (one synchronisation)."""
        if self.termination.fixed_steps or step % check_every:
            self._keep_best(x, r)
            return _Look(any_outside=not self.termination.fixed_steps)
        total = self.active.numel()
        going_on, better, outside = torch.stack([self.active.sum(), self.better.sum(), self.outside.sum()]).tolist()
        if better == total:
            self.best_x, self.best_r = x, r
        elif better:
            self._keep_best(x, r)
        return _Look(going_on == total, going_on == 0, outside > 0)

    def _keep_best(self, x: Blocks, r: Blocks) -> None:
        self.best_x = linalg.where(self.better, x, self.best_x)
        if not self.termination.fixed_steps:  # in which no step is taken back
            self.best_r = linalg.where(self.better, r, self.best_r)

    def inside(self, point: Point) -> Point:
        """The point, with the best one in its place for samples that are outside."""
        fx = tuple(torch.add(a, b) for a, b in zip(self.best_x, self.best_r, strict=True))
        return replace(
            point,
            x=linalg.where(self.outside, self.best_x, point.x),
            fx=linalg.where(self.outside, fx, point.fx),
            r=linalg.where(self.outside, self.best_r, point.r),
            residual=torch.where(self.outside, self.best_residual, point.residual),
            distance=torch.where(self.outside, self.best_distance, point.distance),
        )

    def retreat(self) -> Blocks:
        """Where the samples that are outside try next."""
        length = (0.5**self.retreats).to(self.best_x[0].dtype).unsqueeze(1)
        return tuple(torch.add(a, length * b) for a, b in zip(self.best_x, self.best_r, strict=True))

    def result(self, kept: dict[int, Blocks]) -> LoopResult:
        """What the loop returns, measured sizes in the working dtype."""
        dtype = self.best_x[0].dtype
        relative = _relative(self.best_residual, self.best_scale).to(dtype)
        trace = None if self.trace is None else torch.stack(self.trace).to(dtype)
        # A lazy look lets the loop run on after all samples have ended: nothing was measured there.
        if trace is not None and not (self.termination.fixed_steps or torch.compiler.is_compiling()):
            trace = trace[: int(self.num_steps.max()) + 1]
        return LoopResult(self.best_x, self.status, self.best_residual.to(dtype), relative, self.num_steps, trace, kept)


def _relative(residual: Tensor, scale: Tensor) -> Tensor:
    return torch.where(residual == 0, 0.0, residual / scale)


def _tell(callback: Callable[[StepInfo], None], f: Evaluator, step: int, x: Blocks, book: _Book) -> None:
    per_sample, dtype = f.layout.per_sample, f.layout.dtype
    relative = _relative(book.residual, book.scale)
    versions = versions_of(x)
    callback(
        StepInfo(
            step,
            f.layout.unpack(x),
            per_sample(book.residual.to(dtype)),
            per_sample(relative.to(dtype)),
            per_sample(book.was_active),
        )
    )
    if versions != versions_of(x):
        raise RuntimeError(
            "callback changed info.value in place; it must leave it as it is, and change a clone instead"
        )
