"""L2. Reversible fixed-point iteration: damped steps that can be taken back without having been stored.

    x_{k+1} = (1 - damping) f(x_k) + damping x_{k-1},   x_{-1} = x_0

    x_{k-1} = (x_{k+1} - (1 - damping) f(x_k)) / damping

The damping weighs the point before the last one. Written for two points a pair this is the scheme of McCallum, Arora &
Foster, "Reversible Deep Equilibrium Models", arXiv 2509.12917: y <- (1 - b) y + b f(z), then z <- (1 - b) z + b f(y),
with b = 1 - damping; their z and y are the even and the odd points, and one of their steps is two of these. It
converges wherever f contracts, if only with the square root of the damping per step at best.

Deliberate deviations:
* Every evaluation is measured and may end the solve, not every second one.
* The points are summed up in float64, where the device has it, and f sees them rounded: where f works in float32 or
  less, the way back is exact until rounding in float64 has grown to the last digit that f sees.
* The norms of all points are kept, one number per sample and step, for the way back to be checked by.

What the way back costs in precision: over the eigenvalues of df/dx, a step back multiplies an error by damping^(-1/2)
to damping^(-1), which is as much as the step itself had damped it. After k steps a rounding error of 1e-16 is one of
1e-16 damping^(-k/2) to 1e-16 damping^(-k). At a damping of 0.2 some 16 to 32 steps can be taken back, at 0.5 twice as
many; a solve that needs more is better off with a larger damping, or stored steps.

Legend: B samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.solvers.base import Point, Solver, SolverState, require_float
from deqkit.state import Blocks

_BEARABLE = 0.1  # error of a point on the way back, relative to its distance from the last one


@dataclass(frozen=True)
class Trajectory:
    """Where each sample's iteration ended, in the precision that it was summed up in.

    Attributes:
        last: the last point of each sample.
        before: the one before it.
        steps: the number of the last point, (B,).
        sizes: the norm of every point up to there, (steps + 1, B).
        damping: of the iteration.
    """

    last: Blocks
    before: Blocks
    steps: Tensor
    sizes: Tensor
    damping: float

    def back(self, new: Blocks, fx: Blocks) -> Blocks:
        """x_{k-1} from x_{k+1} and f(x_k)."""
        weight = 1 - self.damping
        return tuple((b - weight * a.to(b.dtype)) / self.damping for a, b in zip(fx, new, strict=True))

    def holds(self, x: Blocks, step: int) -> Tensor:
        """Whether ``x`` tells more of the point of ``step`` than the last point does, as far as norms tell, (B,)."""
        scale = linalg.norm(tuple(torch.sub(a, b) for a, b in zip(x, self.last, strict=True)))
        # An error in a random direction of d dimensions changes the norm by 1 / sqrt(d) of it.
        error = math.sqrt(sum(b.shape[1] for b in x)) * (linalg.norm(x) - self.sizes[step]).abs()
        return error <= _BEARABLE * scale

    def is_settled(self, tolerance: float) -> Tensor:
        """Whether the last step moved a sample by no more than ``tolerance``, relative, (B,)."""
        step = linalg.norm(tuple(torch.sub(a, b) for a, b in zip(self.last, self.before, strict=True)))
        return step <= tolerance * linalg.norm(self.last)


@dataclass(frozen=True)
class ReversibleIteration(Solver):
    """Reversible fixed-point iteration, for `deqkit.ReversibleAdjoint`.

    Args:
        damping: weight of the point before the last one, in (0, 1). The smaller, the faster where f contracts well, and
            the sooner the way back loses its precision, see above.
        check_every: see `Solver`.

    Raises:
        ValueError: damping out of range.
    """

    name: ClassVar[str] = "reversible"
    record: ClassVar[type | None] = Trajectory
    may_retreat: ClassVar[bool] = False  # what was taken back cannot be taken back again
    damping: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_float(self, "damping", 0.0, 1.0, ends="()")

    def start(self) -> SolverState:
        """A fresh state for one solve."""
        return _State(self.damping)

    def start_recording(self) -> _RecordingState:
        """A state that keeps the last two points of each sample."""
        return _RecordingState(self.damping)


class _State:
    """The last two points, unrounded."""

    def __init__(self, damping: float) -> None:
        self.damping = damping
        self.here: Blocks | None = None
        self.before: Blocks

    def step(self, point: Point) -> Blocks:
        wide = linalg.small_dtype(point.x[0].device)
        if self.here is None:
            self.here = self.before = tuple(b.to(wide) for b in point.x)
        pairs = zip(point.fx, self.before, strict=True)
        new = tuple(torch.add((1 - self.damping) * a.to(wide), b, alpha=self.damping) for a, b in pairs)
        self.here, self.before = new, self.here
        return tuple(b.to(x.dtype) for b, x in zip(new, point.x, strict=True))


class _RecordingState(_State):
    """Besides, each sample's last two points up to where it ended."""

    def __init__(self, damping: float) -> None:
        super().__init__(damping)
        self.sizes: list[Tensor] = []
        self.last: Blocks
        self.last_before: Blocks
        self.steps: Tensor

    def step(self, point: Point) -> Blocks:
        self._record(point)
        return super().step(point)

    def conclude(self, point: Point) -> Trajectory:
        """The trajectory up to the last point."""
        self._record(point)
        return Trajectory(self.last, self.last_before, self.steps, torch.stack(self.sizes), self.damping)

    @torch.no_grad()
    def _record(self, point: Point) -> None:
        if self.here is None:
            self.last = self.last_before = tuple(b.detach().to(linalg.small_dtype(b.device)) for b in point.x)
            self.steps, here = torch.zeros_like(point.active, dtype=torch.int64), self.last
        else:
            here, before = (tuple(b.detach() for b in blocks) for blocks in (self.here, self.before))
            self.last = linalg.where(point.active, here, self.last)
            self.last_before = linalg.where(point.active, before, self.last_before)
            self.steps = self.steps + point.active
        self.sizes.append(linalg.norm(here))
