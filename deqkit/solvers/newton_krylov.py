"""L2. Newton-Krylov: Newton steps whose linear systems are solved by GMRES on differences of f.

It seeks the root of F(x) = f(x) - x. At a base point x with residual r = F(x) and A = I - df/dx, the Newton step solves
A delta = r. The Krylov space of r is explored by evaluating f beside the base,

    A z = (F(x) - F(x + eps z)) / eps,

so that nothing but calls of f is needed. The direction that is probed, z, is the residual of the linear system, or the
last basis vector where that residual hardly fell. With the images v_i of the directions kept orthonormal, and p_i what
they are images of (A p_i = v_i), the system's residual is minimised by one projection per direction:

    alpha = <v, r>,   delta <- delta + alpha p,   r <- r - alpha v

Source: Knoll & Keyes, "Jacobian-free Newton-Krylov methods", J. Comput. Phys. 193 (2004); Saad & Schultz, SIAM J. Sci.
Stat. Comput. 7 (1986); for the choice of z: Jiranek & Rozloznik, "Adaptive version of Simpler GMRES", Numer.
Algorithms 53 (2010).

Deliberate deviations:
* A direction counts as one step of the solve, like every other evaluation of f: steps are comparable between solvers.
* Every sample has a base, a Krylov space and a line search of its own, at its own pace.
* The linear system is solved no further than the tolerance of the whole solve asks for.
* The last step of the solve always goes to where the directions found so far lead.

Legend: B samples, m history, n <= m columns in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.solvers.base import Point, Solver, require_float, require_int
from deqkit.state import Blocks

_DECREASE = 0.1  # of the residual, that a Newton step must bring relative to its length (Armijo)
_WINDOW = 8  # Newton steps
_MAX_HALVINGS = 6  # of a Newton step, before the plain step is taken instead
_STALLED = 0.9  # where a direction leaves more than this of the linear residual, the next one is the basis vector
_DEPENDENT = 1e-3  # of a direction's image, in units of the square root of the precision, that must be new


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """Newton's method with GMRES on differences of f: for hard problems, where memory for its history is to be had.

    Args:
        history: m, the most directions per Newton step; the solver stores 2 m states.
        forcing: how far the residual of each linear system is brought down, relative, in [0, 1).
        difference: length of the differences relative to the state; None takes the square root of the precision in
            which f is known. For an affine f, large differences are exact and best: see `GMRES`.
        check_every: see `Solver`.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "newton_krylov"
    history: int = 20
    forcing: float = 0.1
    difference: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "history", minimum=1)
        require_float(self, "forcing", 0.0, 1.0)
        if self.difference is not None:
            require_float(self, "difference", 0.0, float("inf"), ends="()")

    @property
    def blind_steps(self) -> int:
        """Probes, and the halvings of a step, find no better point."""
        return self.history + _MAX_HALVINGS + 1

    def start(self) -> _State:
        """A fresh state for one solve."""
        return _State(self)


@dataclass(frozen=True)
class GMRES(NewtonKrylov):
    """Restarted GMRES, for an f that is affine in x, as the equation of the implicit adjoint is.

    `NewtonKrylov` with long differences, which are exact for such an f, and systems solved to the end.

    Args:
        history: m, directions between restarts; the solver stores 2 m states.
        forcing: see `NewtonKrylov`.
        difference: see `NewtonKrylov`.
        check_every: see `Solver`.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "gmres"
    for_affine: ClassVar[bool] = True
    history: int = 50
    forcing: float = 0.0
    difference: float | None = 1.0


class _State:
    """Where each sample's Newton step starts, and what its Krylov space has taught so far.

    A sample is either probing, its next point lies beside the base, or arriving, it is where the Newton step leads.
    """

    def __init__(self, settings: NewtonKrylov) -> None:
        self.settings = settings
        self.images = linalg.History(settings.history)  # v, orthonormal
        self.directions = linalg.History(settings.history)  # p, with A p = v
        self.started = False
        self.probing: Tensor  # (B,)
        self.x: Blocks  # the base
        self.r: Blocks
        self.residuals: Tensor  # (B, w), of the last bases in the norm of the solve
        self.length: Tensor  # (B,), eps
        self.delta: Blocks  # the Newton step so far
        self.linear: Blocks  # what it leaves of r
        self.linear_size: Tensor  # (B,), its Euclidean norm
        self.goal: Tensor  # (B,), to which that is to fall
        self.usable: Tensor  # (B, m), which columns belong to this Newton step
        self.halvings: Tensor  # (B,)

    def step(self, point: Point) -> Blocks:
        if self.started:
            probed = self.probing
            rejected = ~probed & ~self._sufficient(point)
            direction, complete = self._explore(point, probed)
            self._halve(rejected)
            settled = ~probed & ~rejected
        else:
            self._allocate(point)
            settled, direction, complete = ~self.probing, point.r, self.probing
            probed = self.probing
        self._rebase(point, settled)
        direction = linalg.where(settled, _unit(self.r, self.linear_size), direction)
        self.probing = settled | (probed & ~complete)
        if point.steps_left <= 1:
            self.probing = torch.zeros_like(self.probing)
        # The plain step: where nothing has been learnt yet, and where no length of the Newton step would do.
        plain = ~self.usable.any(dim=1) | (self.halvings > _MAX_HALVINGS)
        step = linalg.where(plain, self.r, self.delta)
        step = linalg.where(self.probing, linalg.scale(direction, self.length.to(direction[0].dtype)), step)
        return tuple(torch.add(a, b) for a, b in zip(self.x, step, strict=True))

    def _allocate(self, point: Point) -> None:
        m, batch = self.settings.history, point.residual
        self.started, self.probing = True, torch.zeros_like(batch, dtype=torch.bool)
        self.x, self.r = point.x, point.r
        self.residuals = torch.zeros(batch.shape[0], _WINDOW, dtype=batch.dtype, device=batch.device)
        self.delta, self.linear = point.r, point.r
        self.length, self.linear_size, self.goal = batch, batch, batch
        self.usable = torch.zeros(batch.shape[0], m, dtype=torch.bool, device=batch.device)
        self.halvings = torch.zeros_like(batch, dtype=torch.int64)

    def _sufficient(self, point: Point) -> Tensor:
        """Whether the residual has fallen enough for the length of the step, or the last resort has been taken."""
        limit = (1 - _DECREASE * 0.5**self.halvings) * self.residuals.amax(dim=1)
        return (point.residual <= limit) | (self.halvings > _MAX_HALVINGS)

    def _halve(self, rejected: Tensor) -> None:
        self.delta = linalg.where(rejected, tuple(0.5 * b for b in self.delta), self.delta)
        self.halvings = self.halvings + rejected

    def _rebase(self, point: Point, settled: Tensor) -> None:
        """Begin a Newton step at the point, for the samples that have settled there."""
        size = linalg.norm(point.r)
        difference = self.settings.difference
        if difference is None:
            difference = math.sqrt(point.resolution)
        self.x, self.r = linalg.where(settled, point.x, self.x), linalg.where(settled, point.r, self.r)
        self.linear = linalg.where(settled, point.r, self.linear)
        self.delta = linalg.where(settled, tuple(torch.zeros_like(b) for b in point.r), self.delta)
        recent = torch.cat([self.residuals[:, 1:], point.residual.unsqueeze(1)], dim=1)
        self.residuals = torch.where(settled.unsqueeze(1), recent, self.residuals)
        self.length = torch.where(settled, difference * (linalg.norm(point.x) + size), self.length)
        self.linear_size = torch.where(settled, size, self.linear_size)
        self.usable = self.usable & ~settled.unsqueeze(1)
        self.halvings = torch.where(settled, 0, self.halvings)
        # Half the tolerance of the solve: more would be lost on the way to it.
        enough = torch.where(point.distance > 1, 0.5 / point.distance, 0.0)
        self.goal = torch.where(settled, enough.clamp(min=self.settings.forcing) * size, self.goal)

    def _explore(self, point: Point, probed: Tensor) -> tuple[Blocks, Tensor]:
        """Learn from a probe.

        Returns:
            The direction to probe next, of unit length, and which samples' Newton steps are complete.
        """
        dtype = point.x[0].dtype
        per_length, good = linalg.inverse_size(torch.where(probed, self.length, 0.0), dtype)
        good = good & torch.isfinite(point.residual)
        per_length = torch.where(good, per_length, 0.0)
        p = linalg.scale(tuple(torch.sub(a, b) for a, b in zip(point.x, self.x, strict=True)), per_length)
        v = linalg.scale(tuple(torch.sub(a, b) for a, b in zip(self.r, point.r, strict=True)), per_length)
        before = linalg.norm(v)
        for _ in range(2):  # once is not enough in finite precision
            if self.images.count:
                n = self.images.num_columns
                part = torch.where(self.usable[:, :n], self.images.dot(v), 0.0)
                v = self.images.subtract_combination(v, part)
                p = self.directions.subtract_combination(p, part)
        size = linalg.norm(v)
        per_size, positive = linalg.inverse_size(size, dtype)
        good = good & positive & (size > _DEPENDENT * math.sqrt(point.resolution) * before)
        per_size = torch.where(good, per_size, 0.0)
        v, p = linalg.scale(v, per_size), linalg.scale(p, per_size)
        slot = self.images.next_slot
        self.images.push(v)
        self.directions.push(p)
        self.usable = self.usable.clone()
        self.usable[:, slot] = good

        alpha = linalg.dot(v, self.linear)
        self.linear = tuple(torch.sub(a, b * alpha.unsqueeze(1)) for a, b in zip(self.linear, v, strict=True))
        self.delta = tuple(torch.add(a, b * alpha.unsqueeze(1)) for a, b in zip(self.delta, p, strict=True))
        last, self.linear_size = self.linear_size, torch.where(probed, linalg.norm(self.linear), self.linear_size)
        full = self.usable.sum(dim=1) >= self.settings.history
        complete = ~good | full | (self.linear_size <= self.goal)
        fell = self.linear_size <= _STALLED * last
        return linalg.where(fell, _unit(self.linear, self.linear_size), v), complete


def _unit(blocks: Blocks, size: Tensor) -> Blocks:
    factor, _ = linalg.inverse_size(size, blocks[0].dtype)
    return linalg.scale(blocks, factor)
