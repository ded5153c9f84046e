"""L2. BiCGSTAB, for an f that is affine in x, on evaluations of f alone.

With f(x) = J x + b, A = I - J and the residual r = f(x) - x = b - A x, one iteration is

    v = A p,   alpha = <q, r> / <q, v>,   x <- x + alpha p,   r <- r - alpha v
    t = A r,   omega = <t, r> / <t, t>,   x <- x + omega r,   r <- r - omega t
    beta = (<q, r> / <q, r>_before) (alpha / omega),          p <- r + beta (p - omega v)

with p = q = r at the start. Source: van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the
solution of nonsymmetric linear systems", SIAM J. Sci. Stat. Comput. 13 (1992).

The memory is that of seven states, whatever the number of steps: where GMRES would need a long history, this takes its
place. Its residuals are not monotone, and need not fall at all where A has eigenvalues close to the imaginary axis.

Deliberate deviations:
* A product is an evaluation of f beside a base point: A p = (f(base) - base - (f(base + c p) - base - c p)) / c. Long
  differences are exact for an affine f, so c p is as long as the state. One product is one step of the solve, half an
  iteration: `max_steps` counts evaluations, as for every other solver.
* An iterate costs an evaluation of its own, and is evaluated only where its residual, which the recurrence knows, meets
  half the tolerance; every `_CHECK_EVERY` products, so that the loop sees progress; and in the last step. The true
  residual takes the place of the recurrence's then (Sleijpen & van der Vorst, "Reliable updated residuals in hybrid
  Bi-CG methods", Computing 56 (1996)). A sample whose recurrence had promised a solution, wrongly, starts anew.
* All is in units of the first residual, so that tiny systems do not underflow.
* Where <q, r> breaks down, the sample starts anew from its iterate; where <q, v> does in the first iteration, q is
  chosen between r and v; where omega does, the step is as long as if t and r met at an angle of cosine 0.7 (Sleijpen &
  van der Vorst, "Maintaining convergence properties of BiCGstab methods in finite precision arithmetic", Numer.
  Algorithms 10 (1995)).

Legend: B samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.solvers.base import Point, Solver
from deqkit.state import Blocks

_CHECK_EVERY = 32  # products
_WIDEST_COSINE = 0.7  # of the angle between t and r that omega is computed for where theirs is a right angle
_DRIFTED = 0.5  # of the true residual, by which the recurrence's may differ before the sample starts anew


@dataclass(frozen=True)
class BiCGSTAB(Solver):
    """BiCGSTAB, for an f that is affine in x, as the equation of the implicit adjoint is, in the memory of few states.

    Where the history of `GMRES` fits into memory, that needs fewer evaluations.

    Args:
        check_every: see `Solver`.
    """

    name: ClassVar[str] = "bicgstab"
    for_affine: ClassVar[bool] = True

    @property
    def blind_steps(self) -> int:
        """Products alone find no better point."""
        return _CHECK_EVERY + 1

    def start(self) -> _State:
        """A fresh state for one solve."""
        return _State()


class _State:
    """Each sample's base, where its iterate lies from there, and the vectors of the recurrence.

    A sample is either multiplying, its next point lies beside the base, or arriving, it is the iterate.
    """

    def __init__(self) -> None:
        self.started = False
        self.base_x: Blocks
        self.base_r: Blocks
        self.length: Tensor  # (B,), of the differences
        self.unit: Tensor  # (B,), in which everything below is measured
        self.offset: Blocks  # of the iterate from the base
        self.r: Blocks
        self.p: Blocks
        self.q: Blocks
        self.q_size: Tensor  # (B,)
        self.v: Blocks  # A p
        self.rho: Tensor  # (B,), <q, r> at the start of the iteration
        self.alpha: Tensor  # (B,)
        self.goal: Tensor  # (B,), at which the residual is small enough to be looked at
        self.fresh: Tensor  # (B,), whether this is the first iteration since a start
        self.second: Tensor  # (B,), whether the next product is A r
        self.arriving: Tensor  # (B,)
        self.products: Tensor  # (B,), since the last look at the true residual
        self.reach: Tensor  # (B,), the size of the direction that is being multiplied

    def step(self, point: Point) -> Blocks:
        if self.started:
            arrived = self.arriving
            self._iterate(*self._product(point), ~arrived)
        else:
            self._allocate(point)
            arrived = self.arriving
        self._rebase(point, arrived)
        size = linalg.norm(self.r)
        self.arriving = (size <= self.goal) | (self.products >= _CHECK_EVERY)
        if point.steps_left <= 1:
            self.arriving = torch.ones_like(self.arriving)
        direction = linalg.where(self.second, self.r, self.p)
        self.reach = linalg.norm(direction)
        dtype = direction[0].dtype
        per_reach, _ = linalg.inverse_size(self.reach, dtype)
        probe = linalg.scale(linalg.scale(direction, per_reach), self.length.to(dtype))
        iterate = linalg.scale(self.offset, self.unit.to(dtype))
        move = linalg.where(self.arriving, iterate, probe)
        return tuple(torch.add(a, b) for a, b in zip(self.base_x, move, strict=True))

    def _allocate(self, point: Point) -> None:
        batch, zero = point.residual, tuple(torch.zeros_like(b) for b in point.r)
        self.started, self.arriving = True, torch.ones_like(batch, dtype=torch.bool)
        self.base_x, self.base_r = point.x, point.r
        self.offset = self.r = self.p = self.q = self.v = zero
        self.length = self.unit = self.rho = self.alpha = self.q_size = self.goal = self.reach = torch.zeros_like(batch)
        self.fresh = self.second = ~self.arriving
        self.products = torch.zeros_like(batch, dtype=torch.int64)

    def _product(self, point: Point) -> tuple[Blocks, Blocks]:
        """The direction that was probed, as rounding has left it, and its image under A."""
        dtype = point.x[0].dtype
        per_length, good = linalg.inverse_size(self.length, dtype)
        per_length = torch.where(good & torch.isfinite(point.residual) & ~self.arriving, per_length, 0.0)
        reach = self.reach.to(dtype)
        direction = tuple(torch.sub(a, b) for a, b in zip(point.x, self.base_x, strict=True))
        image = tuple(torch.sub(a, b) for a, b in zip(self.base_r, point.r, strict=True))
        return tuple(linalg.scale(linalg.scale(b, per_length), reach) for b in (direction, image))  # pyright: ignore

    def _iterate(self, direction: Blocks, image: Blocks, probed: Tensor) -> None:
        """Half an iteration, for the samples that have multiplied."""
        first, second = probed & ~self.second, probed & self.second
        size, image_size = linalg.norm(self.r), linalg.norm(image)
        along, lost = self._shadow(image, image_size, size, first)
        omega = self._omega(image, image_size, size)
        self.alpha = torch.where(first, _ratio(self.rho, along), self.alpha)
        self.v = linalg.where(first, image, self.v)
        length = _column(torch.where(probed, torch.where(second, omega, self.alpha), 0.0), image)
        self.offset = tuple(torch.addcmul(a, length, b) for a, b in zip(self.offset, direction, strict=True))
        self.r = tuple(torch.addcmul(a, length, b, value=-1) for a, b in zip(self.r, image, strict=True))
        self.products = self.products + probed

        rho, size = linalg.dot(self.q, self.r).to(size.dtype), linalg.norm(self.r)
        beta = _ratio(rho, self.rho) * _ratio(self.alpha, omega)
        lost = lost | (second & (_vanishes(rho, self.q_size, size, image) | (beta == 0) | ~torch.isfinite(beta)))
        weight, omega = _column(beta, image), _column(omega, image)
        p = tuple(r + weight * (p - omega * v) for r, p, v in zip(self.r, self.p, self.v, strict=True))
        self.p = linalg.where(second, p, self.p)
        self.rho = torch.where(second, rho, self.rho)
        self.fresh = self.fresh & ~second
        self.second = torch.where(probed, first, self.second)
        self._return(~torch.isfinite(size))
        self._start(lost | ~torch.isfinite(size))

    def _shadow(self, image: Blocks, image_size: Tensor, size: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """<q, v>, and the samples whose q is of no use any more; in the first iteration, another is found for them."""
        along = linalg.dot(self.q, image).to(size.dtype)
        lost = first & _vanishes(along, self.q_size, image_size, image)
        change = lost & self.fresh & (image_size > 0)
        # Here p = r. Neither product vanishes with r + sign <r, v> v |r| / |v|.
        part, per_image = linalg.dot(self.r, image).to(size.dtype), _ratio(size, image_size)
        weight = _column(torch.where(part < 0, -per_image, per_image), image)
        q = tuple(torch.addcmul(a, weight, b) for a, b in zip(self.r, image, strict=True))
        self.q = linalg.where(change, q, self.q)
        self.q_size = torch.where(change, linalg.norm(self.q), self.q_size)
        self.rho = torch.where(change, size**2 + part.abs() * per_image, self.rho)
        other = part + torch.where(part < 0, -image_size, image_size) * size
        return torch.where(change, other, along), lost & ~change

    def _omega(self, image: Blocks, image_size: Tensor, size: Tensor) -> Tensor:
        part = linalg.dot(image, self.r).to(size.dtype)
        widest = torch.where(part < 0, -_WIDEST_COSINE, _WIDEST_COSINE) * _ratio(size, image_size)
        right = _vanishes(part, image_size, size, image)
        return torch.where(right, widest, _ratio(part, image_size**2))

    def _return(self, mask: Tensor) -> None:
        """Go back to the base, for the samples in ``mask``."""
        per_unit, _ = linalg.inverse_size(self.unit, self.base_r[0].dtype)
        self.offset = linalg.where(mask, tuple(torch.zeros_like(b) for b in self.offset), self.offset)
        self.r = linalg.where(mask, linalg.scale(self.base_r, per_unit), self.r)

    def _start(self, mask: Tensor) -> None:
        """Begin the recurrence anew from the present iterate, for the samples in ``mask``."""
        self.p, self.q = linalg.where(mask, self.r, self.p), linalg.where(mask, self.r, self.q)
        size = linalg.norm(self.r)
        self.q_size, self.rho = torch.where(mask, size, self.q_size), torch.where(mask, size**2, self.rho)
        self.fresh, self.second = self.fresh | mask, self.second & ~mask

    def _rebase(self, point: Point, arrived: Tensor) -> None:
        """Take the true residual of the iterates that have been evaluated in the place of the recurrence's."""
        size = linalg.norm(point.r)
        drift = (size - self.unit * linalg.norm(self.r)).abs()
        anew = arrived & ~(drift <= _DRIFTED * size)
        self.base_x, self.base_r = (
            linalg.where(arrived, point.x, self.base_x),
            linalg.where(arrived, point.r, self.base_r),
        )
        self.length = torch.where(arrived, linalg.norm(point.x) + size, self.length)
        self.unit = torch.where(anew, size, self.unit)
        # Half the tolerance of the solve: more would be lost on the way to it.
        enough = torch.where(point.distance > 1, 0.5 / point.distance, 0.0)
        self.goal = torch.where(arrived, enough * _ratio(size, self.unit), self.goal)
        self.products = torch.where(arrived, 0, self.products)
        self._return(arrived)
        self._start(anew)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, zero where ``b`` is."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _vanishes(product: Tensor, a: Tensor, b: Tensor, blocks: Blocks) -> Tensor:
    """Whether an inner product of vectors of sizes ``a`` and ``b`` is nothing but rounding."""
    return ~(product.abs() > torch.finfo(blocks[0].dtype).eps * a * b)


def _column(factor: Tensor, blocks: Blocks) -> Tensor:
    """Factors (B,) for the rows of every block."""
    return factor.to(blocks[0].dtype).unsqueeze(1)
