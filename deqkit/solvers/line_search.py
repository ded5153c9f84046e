"""L2. A line search for multisecant methods that learns from the steps it takes back, sample by sample.

From a base point x with residual r and inverse Jacobian H, a step s = -H r that leads to a residual above the largest
of the last `_WINDOW` ones is taken back. What it has taught is kept: the pair (s, r(x + s) - r) enters H, and the next
try is the step that the new H proposes from the same base, at most half as long as the last. After a number of tries
the sample moves on with the last of them whatever its residual.

Source: the nonmonotone condition is that of Grippo, Lampariello & Lucidi, "A nonmonotone line search technique for
Newton's method", SIAM J. Numer. Anal. 23 (1986), without a slope, which is not known here; for line searches without
derivatives in Broyden's method see Li & Fukushima, Optim. Methods Softw. 13 (2000).

Deliberate deviation: directions are not kept while their length is searched for. Shorter and shorter steps in one
direction teach H nothing else than the first one did. And as Broyden's residuals rise on the way even where it
converges, no sample insists on a decrease for longer than its tries last.

Legend: B samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from deqkit import arrays, linalg
from deqkit.arrays import Array
from deqkit.rows import Rows
from deqkit.solvers.base import Point
from deqkit.solvers.multisecant import Formula, MultisecantState
from deqkit.state import Blocks

_WINDOW = 8  # accepted points
_SHRINK = 0.5  # of the length of a try


class LineSearchState(MultisecantState):
    """A multisecant state whose `last` point is each sample's base.

    Args:
        formula: see `MultisecantState`.
        tries: how many steps in a row a sample may take back.
        recording: see `MultisecantState`.
    """

    def __init__(self, formula: Formula, tries: int, *, recording: bool = False) -> None:
        super().__init__(formula, recording=recording)
        self.tries = tries
        self.residuals: list[Array] = []  # of the last bases, each (B,)
        self.taken_back: Array  # (B,), in a row

    def step(self, point: Point) -> Blocks:
        """The next point: a step from here, or a shorter one from the base."""
        base, accepted = self.last, self._accept(point.measured.residual)
        if base is None or arrays.known_all(accepted):
            return super().step(point)
        best = point.measured.best_distance
        distance = arrays.where(accepted, point.measured.distance, best)  # a step taken back is no reason to restart
        self.safeguard.restart(replace(point, measured=replace(point.measured, distance=distance)))
        plain = self._plain(point)
        self._remember(point, plain, base)
        tried = linalg.norm(tuple(torch.sub(a, b) for a, b in zip(point.x, base.x, strict=True)))

        mask = arrays.as_tensor(accepted, point.x[0])
        x, r = linalg.where(mask, point.x, base.x), linalg.where(mask, point.r, base.r)
        self.last, self.last_plain = replace(point, x=x, r=r), linalg.where(mask, plain, self.last_plain)
        right = self._small(self.left.dot(self.last.r))
        proposed = self.move.subtract_combination(self.last_plain, self._coefficients(right, x[0]))
        step = tuple(torch.sub(a, b) for a, b in zip(proposed, x, strict=True))
        shorter = (_SHRINK * tried / linalg.norm(step)).clamp(max=1.0).to(step[0].dtype)
        short = tuple(torch.add(a, b) for a, b in zip(x, linalg.scale(step, shorter), strict=True))
        return linalg.where(mask, proposed, short)

    def select(self, rows: Rows) -> None:
        """Go on with these samples alone."""
        super().select(rows)
        if self.last is None:
            return
        self.residuals = [rows.of(residual) for residual in self.residuals]
        self.taken_back = rows.of(self.taken_back)

    def _accept(self, residual: Array) -> Array:
        """Whether a sample moves on from the point with this residual; enters it if so."""
        if not self.residuals:
            self.residuals = [residual] * _WINDOW
            self.taken_back = 0 * (residual > 0)
            return residual == residual
        largest = self.residuals[0]
        for other in self.residuals[1:]:
            largest = arrays.where(other > largest, other, largest)
        accepted = (residual <= largest) | (self.taken_back >= self.tries)
        self.taken_back = arrays.where(accepted, 0, self.taken_back + 1)
        later = [*self.residuals[1:], residual]
        self.residuals = [arrays.where(accepted, b, a) for a, b in zip(self.residuals, later, strict=True)]
        return accepted
