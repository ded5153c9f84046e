"""L2. Anderson acceleration, type II, in its difference form.

With r_k = f(x_k) - x_k and the last m differences dx_i = x_{i+1} - x_i, dr_i = r_{i+1} - r_i,

    gamma = argmin | r_k - sum_i gamma_i dr_i |^2
    x_{k+1} = x_k + beta r_k - sum_i gamma_i (dx_i + beta dr_i)

Source: Walker & Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011), eq. 2.4;
Fang & Saad, "Two classes of multisecant methods", Numer. Linear Algebra Appl. 16 (2009).

Deliberate deviations:
* Every pair is divided by |dr_i| before it is stored. The Gram matrix then has a unit diagonal, so the ridge is
  relative to its trace and old, large differences do not drown new, small ones (an absolute ridge stalls at small
  residuals).
* One row of the Gram matrix is computed per step; the m by m system is solved in float64.
* Each sample has a safeguard of its own: a pair that is no use (f did not change, or not finite) is skipped, a solve
  that fails falls back to the plain step, and a residual far above the best one seen clears that sample's history.

Legend: B samples, m history, n <= m columns in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.solvers.base import Point, Safeguard, Solver, require_float, require_int
from deqkit.state import Blocks


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration (type II).

    Args:
        history: m, how many past differences are combined.
        mixing: beta, the weight of the residual in the new point, in (0, 1].
        ridge: regularisation of the least-squares problem relative to the mean diagonal of its Gram matrix; None takes
            the precision of the working dtype.
        restart_factor: a sample forgets its history when its distance from the tolerance exceeds this multiple of its
            best one.
        check_every: see `Solver`.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "anderson"
    history: int = 50
    mixing: float = 1.0
    ridge: float | None = None
    restart_factor: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "history", minimum=1)
        require_float(self, "mixing", 0.0, 1.0, ends="(]")
        if self.ridge is not None:
            require_float(self, "ridge", 0.0, float("inf"))
        require_float(self, "restart_factor", 1.0, float("inf"), ends="[]")

    def start(self) -> _State:
        """A fresh state for one solve."""
        return _State(self)


class _State:
    """Last point, and the ring of normalised pairs with their Gram matrix."""

    def __init__(self, settings: Anderson) -> None:
        self.settings = settings
        self.last: Point | None = None
        self.dr = linalg.History(settings.history)
        self.move = linalg.History(settings.history)  # dx + beta dr
        self.gram: Tensor
        self.safeguard: Safeguard

    def step(self, point: Point) -> Blocks:
        if self.last is None:
            self._allocate(point)
        else:
            self.safeguard.restart(point.distance)
            self._remember(point, self.last)
        self.last = point
        plain = tuple(x.add(r, alpha=self.settings.mixing) for x, r in zip(point.x, point.r, strict=True))
        if self.dr.count == 0:
            return plain
        return self.move.subtract_combination(plain, self._coefficients(point))

    def _allocate(self, point: Point) -> None:
        m, x = self.settings.history, point.x[0]
        dtype = linalg.small_dtype(x.device)
        self.gram = torch.eye(m, dtype=dtype, device=x.device).repeat(x.shape[0], 1, 1)
        self.safeguard = Safeguard(m, self.settings.restart_factor, point.distance)

    def _remember(self, point: Point, last: Point) -> None:
        beta, slot = self.settings.mixing, self.dr.next_slot
        dr = tuple(torch.sub(a, b) for a, b in zip(point.r, last.r, strict=True))
        factor, good = linalg.inverse_size(linalg.norm(dr), dr[0].dtype)
        move = tuple((a - b).add_(d, alpha=beta) for a, b, d in zip(point.x, last.x, dr, strict=True))
        dr = linalg.scale(dr, factor)
        self.dr.push(dr)
        self.move.push(linalg.scale(move, factor))
        row = self.dr.dot(dr).to(self.gram.dtype)
        self.gram = linalg.write_column(linalg.write_row(self.gram, slot, row), slot, row)
        self.safeguard.admit(slot, good)

    def _coefficients(self, point: Point) -> Tensor:
        """gamma, (B, n): zero for columns that are not usable, and for samples whose small system fails."""
        n = self.dr.num_columns
        usable = self.safeguard.usable[:, :n]
        right = torch.where(usable, self.dr.dot(point.r).to(self.gram.dtype), 0.0)
        identity = torch.eye(n, dtype=self.gram.dtype, device=right.device)
        both = usable.unsqueeze(1) & usable.unsqueeze(2)
        ridge = self.settings.ridge
        if ridge is None:
            ridge = 10 * torch.finfo(point.x[0].dtype).eps
        system = torch.where(both, self.gram[:, :n, :n], identity) + ridge * identity
        factor, info = torch.linalg.cholesky_ex(system)
        gamma = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
        good = (info == 0) & torch.isfinite(gamma).all(dim=1)
        return torch.where(good.unsqueeze(1), gamma, 0.0)
