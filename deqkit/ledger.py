"""L3. The records of a solve, one entry per sample: who is still going on, how the others ended, the best points."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqkit import arrays, linalg
from deqkit.arrays import Array
from deqkit.solution import Status
from deqkit.solvers.base import Measured, Point
from deqkit.state import Blocks
from deqkit.termination import Patience, Termination

_MAX_RETREATS = 4


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
    parts: Tensor | None  # relative residual of every part that the norm tells apart (K, B); None for a single one
    record: Any = None  # the solver's, if it was asked for


@dataclass(frozen=True)
class Look:
    """What the host knows of the batch; nothing is ruled out where it did not look."""

    all_active: bool = False
    none_active: bool = False
    any_outside: bool = True


_ALL_GO_ON = Look(all_active=True, any_outside=False)


class Ledger:
    """Kept on the host where it looks at every step anyway, else on the device: see `deqkit.arrays`.

    Args:
        x: the first point.
        r: its residual.
        on_host: where to keep the books.
        termination: when a sample has ended.
        trace: whether to keep the relative residual of every evaluation.
        active: which samples to solve, bool (B,); None for all.
        may_retreat: whether a step out of the domain of f may be taken back.
        limits: largest number of steps per sample (B,); None: whoever keeps the ledger sees to it.
    """

    def __init__(
        self,
        x: Blocks,
        r: Blocks,
        on_host: bool,
        termination: Termination,
        trace: bool,
        active: Tensor | None,
        may_retreat: bool = True,
        limits: Tensor | None = None,
    ) -> None:
        self.on_host, self.termination = on_host, termination
        self.may_retreat = may_retreat and not termination.fixed_steps
        self.best_x, self.best_r = x, r
        self.parts: tuple[Array, Array] | None = None  # residuals and scales (K, B), where there are several
        self.trace: list[Array] | None = [] if trace else None
        self.step = -1
        self._given = active
        self.limits: Array | None = arrays.to_host(limits) if on_host and limits is not None else limits

    def _open(self, residual: Array, scale: Array, distance: Array) -> None:
        """Begin the books, with the first evaluation."""
        everywhere = residual == residual
        if self._given is None:
            everywhere = everywhere | ~everywhere
        else:
            everywhere = arrays.to_host(self._given) if self.on_host else self._given
        self.patience = Patience(self.termination, residual, scale)
        self.active = self.was_active = self.better = everywhere
        self.all_active = arrays.known_all(everywhere)  # as far as is known
        self.nowhere = self.outside = everywhere & ~everywhere
        self.retreats = self.nothing = self.nowhere * 0  # tries in a row
        self.status = self.nothing + int(Status.MAX_STEPS)
        self.num_steps = self.nothing
        self.residual, self.scale, self.distance = residual, scale, distance
        self.best_residual, self.best_scale, self.best_parts = residual, scale, self.parts
        self.best_distance = arrays.where(self.nowhere, distance, torch.inf)

    def record(self, step: int, residuals: Array, scales: Array) -> None:
        """Enter one evaluation: residuals and scales (K, B) as `deqkit.norms.StateNorm` gives them."""
        with arrays.quiet():
            given = _both_to_host(residuals, scales) if self.on_host else self._as_tensors(residuals, scales)
            measured = self.termination.measure(*given)
            self.parts = given if len(residuals) > 1 else None
            if self.step < 0:
                self._open(*measured)
            self.step = step
            self.was_active = self.active
            self.residual, self.scale, self.distance = measured
            self._improve()
            self.patience.record(self.best_distance)
            if self.trace is not None:
                self.trace.append(arrays.where(self.active, _relative(self.residual, self.scale), torch.nan))
            self._end()

    def _improve(self) -> None:
        better = self.distance < self.best_distance
        self.better = better if self.all_active else self.active & better
        if arrays.known_all(self.better):
            self.best_distance, self.best_residual, self.best_scale = self.distance, self.residual, self.scale
            self.best_parts = self.parts
        elif not arrays.known_none(self.better):
            self.best_distance = arrays.where(self.better, self.distance, self.best_distance)
            self.best_residual = arrays.where(self.better, self.residual, self.best_residual)
            self.best_scale = arrays.where(self.better, self.scale, self.best_scale)
            if self.parts is not None and self.best_parts is not None:
                new, old = self.parts, self.best_parts
                self.best_parts = arrays.where(self.better, new[0], old[0]), arrays.where(self.better, new[1], old[1])

    def _end(self) -> None:
        """Take the samples that have ended out of the race, with the reason; a later reason in this list wins."""
        finite, done = self.distance < torch.inf, self.distance <= self.termination.target
        if self.on_host and self._all_go_on(finite, done):
            self.outside, self.retreats = self.nowhere, self.nothing
            return
        reasons, ended = [(Status.CONVERGED, done), (Status.NONFINITE, ~finite)], done | ~finite
        if not self.termination.fixed_steps:
            diverged = self.patience.diverged(self.residual)
            ended = ended | diverged
            reasons = [(Status.DIVERGED, diverged), *reasons]
            stagnated = self.patience.stagnated()
            if stagnated is not None:
                ended = ended | stagnated
                far = stagnated & (self.residual > self.patience.low_limit)
                reasons = [(Status.STAGNATED, stagnated), (Status.DIVERGED, far), *reasons]
            if self.limits is not None:
                hopeless = self.patience.hopeless(self.limits - self.step)
                if hopeless is not None:
                    ended, reasons = ended | hopeless, [(Status.STAGNATED, hopeless), *reasons]
                late = self.limits <= self.step
                ended, reasons = ended | late, [(Status.MAX_STEPS, late), *reasons]
        if self.may_retreat:
            self._step_outside(~finite)
            ended = ended & ~self.outside
        ended = ended & self.active
        if arrays.known_none(ended):
            return
        for status, met in reasons:
            self.status = arrays.where(met & ended, int(status), self.status)
        self.num_steps = arrays.where(ended, self.step, self.num_steps)
        self.active, self.all_active = self.active & ~ended, False

    def _all_go_on(self, finite: Array, done: Array) -> bool:
        """Whether no sample has any reason to end: so it is after most evaluations, and quickly seen."""
        going = finite & ~done
        if not self.termination.fixed_steps:
            if self.patience.is_running_out or self.limits is not None:
                return False
            going = going & ~self.patience.diverged(self.residual)
        return arrays.known_all(going if self.all_active else going | ~self.active)

    def _step_outside(self, not_finite: Array) -> None:
        """Note where f is not finite although it has been, and another try is granted."""
        if arrays.known_none(not_finite):
            self.outside, self.retreats = self.nowhere, self.nothing
            return
        self.outside = self.active & not_finite & (self.best_distance < torch.inf) & (self.retreats < _MAX_RETREATS)
        self.retreats = (self.retreats + 1) * self.outside

    def shown(self) -> tuple[Array, Array]:
        """Residual and scale of the present points, those of the best one where f may not be called any more."""
        residual = arrays.where(self.was_active, self.residual, self.best_residual)
        return residual, arrays.where(self.was_active, self.scale, self.best_scale)

    def look(self, step: int, x: Blocks, r: Blocks, check_every: int) -> Look:
        """Settle the best point now that ``x`` is recorded, and say how the batch stands, as far as is known.

        Args:
            step: solver steps taken so far.
            x: the point; samples that had ended before rest at their best points, see `freeze`.
            r: its residual.
            check_every: see `Solver`.
        """
        if not self.on_host:
            self._keep_best(x, r)
            unseen = self.termination.fixed_steps or bool(step % check_every)
            return Look(none_active=not unseen and not bool(self.active.any()), any_outside=self.may_retreat)
        # Those that had ended rest at their best points already.
        if arrays.known_all(self.better) or arrays.known_all(self.better | ~self.was_active):
            self.best_x, self.best_r = x, r
        elif not arrays.known_none(self.better):
            self._keep_best(x, r)
        if self.all_active and self.outside is self.nowhere:
            return _ALL_GO_ON
        return Look(self.all_active, arrays.known_none(self.active), not arrays.known_none(self.outside))

    def _keep_best(self, x: Blocks, r: Blocks) -> None:
        better = self._mask(self.better)
        self.best_x = linalg.where(better, x, self.best_x)
        if self.may_retreat:
            self.best_r = linalg.where(better, r, self.best_r)

    def point(self, x: Blocks, fx: Blocks, r: Blocks, steps_left: int, resolution: float) -> Point:
        """What the solver is told of the evaluation just recorded."""
        measured = Measured(self.residual, self.distance, self.best_distance, self.was_active)
        return Point(x, fx, r, measured, steps_left, resolution)

    def inside(self, point: Point) -> Point:
        """The point, with the best one in its place for samples that are outside."""
        outside = self._mask(self.outside)
        fx = tuple(torch.add(a, b) for a, b in zip(self.best_x, self.best_r, strict=True))
        measured = Measured(
            arrays.where(self.outside, self.best_residual, self.residual),
            arrays.where(self.outside, self.best_distance, self.distance),
            self.best_distance,
            self.was_active,
        )
        return replace(
            point,
            x=linalg.where(outside, self.best_x, point.x),
            fx=linalg.where(outside, fx, point.fx),
            r=linalg.where(outside, self.best_r, point.r),
            measured=measured,
        )

    def retreat(self, new: Blocks) -> Blocks:
        """The new point, but where a sample is outside a shorter way from its best point."""
        length = (0.5 ** arrays.as_tensor(self.retreats, self.best_x[0])).to(self.best_x[0].dtype).unsqueeze(1)
        shorter = tuple(torch.add(a, length * b) for a, b in zip(self.best_x, self.best_r, strict=True))
        return linalg.where(self._mask(self.outside), shorter, new)

    def freeze(self, new: Blocks) -> Blocks:
        """The new point for samples that go on, the best one for the others."""
        return linalg.where(self._mask(self.active), new, self.best_x)

    def _as_tensors(self, *values: Array) -> tuple[Array, ...]:
        return tuple(arrays.as_tensor(a, self.best_x[0]) for a in values)

    def _mask(self, mask: Array) -> Tensor:
        return arrays.as_tensor(mask, self.best_x[0])

    def result(self, kept: dict[int, Blocks]) -> LoopResult:
        """What the loop returns, measured sizes in the working dtype."""
        x = self.best_x[0]
        num_steps = arrays.where(self.active, self.step, self.num_steps)
        with arrays.quiet():
            relative = _relative(self.best_residual, self.best_scale)
            parts = None if self.best_parts is None else _relative(*self.best_parts)
        trace = None
        if self.trace is not None:
            trace = torch.stack([arrays.as_tensor(row, x) for row in self.trace]).to(x.dtype)
            # A lazy look lets the loop run on after all samples have ended: nothing was measured there.
            if not (self.termination.fixed_steps or torch.compiler.is_compiling()):
                trace = trace[: int(num_steps.max()) + 1]
        residual, relative = (arrays.as_tensor(a, x).to(x.dtype) for a in (self.best_residual, relative))
        return LoopResult(
            self.best_x,
            arrays.as_tensor(self.status, x),
            residual,
            relative,
            arrays.as_tensor(num_steps, x),
            trace,
            kept,
            None if parts is None else arrays.as_tensor(parts, x).to(x.dtype),
        )


def _both_to_host(residuals: Array, scales: Array) -> tuple[Array, Array]:
    if not isinstance(residuals, Tensor):
        return residuals, scales
    if arrays.free_to_look(residuals.device):
        return arrays.to_host(residuals), arrays.to_host(scales)
    both = arrays.to_host(torch.stack([residuals, scales]))
    return both[0], both[1]


def _relative(residual: Array, scale: Array) -> Array:
    return arrays.where(residual == 0, 0.0, residual / scale)


def relative(residual: Array, scale: Array) -> Array:
    """The residual in units of |f(x)|, and 0 where it is 0."""
    with arrays.quiet():
        return _relative(residual, scale)
